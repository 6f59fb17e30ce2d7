"""Rotated, quantised transformers: what RoSTE trains, and what its artefacts run as.

`quantisers` rounds numbers, `rotation` turns a model's channels without changing its function,
`layers` are the modules of a quantised model, `search` chooses rotations and clips by a calibration
batch, `artefact` writes the result packed and reads it back.
"""
