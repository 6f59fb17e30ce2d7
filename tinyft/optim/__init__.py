"""The methods, one file an algorithm. Importing this package registers them all."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from tinyft.optim.base import METHODS, Optimizer, register

# Every file in this folder is imported, so that adding a method is adding a file.
for _path in sorted(Path(__file__).parent.glob("*.py")):
    if _path.stem not in ("__init__", "base"):
        import_module(f"{__name__}.{_path.stem}")

__all__ = ["METHODS", "Optimizer", "register"]
