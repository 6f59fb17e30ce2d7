"""Contextual sparsity: which channels of a frozen model matter for a batch, and using only those.

`estimator` guesses a projection's outputs from a few singular vectors, `channels` chooses by them,
`tokens` says where, `layers` does the arithmetic in a model's MLPs and attention, and `schedule`
says how much of it each layer may leave out.
"""
