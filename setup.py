"""Packaging. `kernels/` and `targets/` install as `tinyft.kernels` and `tinyft.targets`.

A top-level package called `kernels` would shadow Hugging Face's package of that name, which
transformers imports; hence the mapping, and hence no `__init__.py` directly in `kernels/` nor in
`targets/`.
"""

from setuptools import setup

setup(
    packages=[
        *("tinyft", "tinyft.benchmark", "tinyft.optim", "tinyft.rotated", "tinyft.sparse"),
        *("tinyft.zeroth", "tinyft.kernels", "tinyft.kernels.gpu", "tinyft.targets"),
    ],
    package_dir={"tinyft.kernels": "kernels", "tinyft.targets": "targets"},
    package_data={"tinyft": ["evidence.json"], "tinyft.targets": ["profiles.yaml"]},
)
