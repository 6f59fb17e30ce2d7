"""Packaging. `kernels/` and `targets/` install as `tinyft.kernels` and `tinyft.targets`.

A top-level package called `kernels` would shadow Hugging Face's package of that name, which
transformers imports; hence the mapping, and hence no `__init__.py` directly in `kernels/`.
"""

from setuptools import setup

setup(
    packages=["tinyft", "tinyft.optim", "tinyft.zeroth", "tinyft.kernels"],
    package_dir={"tinyft.kernels": "kernels"},
)
