"""Triton twins of the operations beside this folder, under the same names.

A kernel reads the globals of its module, `tl` among them, so Triton cannot be imported lazily in
the file of the reference; each operation imports its module here when it is about to launch.

Their numerics are tested in Triton's interpreter and they are compiled ahead of time for several
architectures (`tinyft.kernels.aot`); none has been run or timed on a GPU: speed is unmeasured.
"""
