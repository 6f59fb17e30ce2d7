"""Zeroth order: random directions, forward passes at perturbed weights, and the log of a run.

`directions` draws z, `forward` evaluates a model at theta + s eps z without writing to theta,
`update` writes theta - c z, `seed_log` stores a run as a few bytes a step. `tinyft.optim.mezo` puts
them together.
"""
