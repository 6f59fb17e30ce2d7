"""Contextual sparsity: which channels of a frozen model matter for a batch, and using only those.

`tokens` says where, and which of them a choice is made by; `estimator` is the published way to
make it, from a few singular vectors; `channels` chooses, `layers` does the arithmetic in a model's
MLPs and attention, and `schedule` says how much of it each layer may leave out.
"""
