"""TinyFT: fine-tune language models on machines that are too small for it.

Importing this package loads nothing heavy: no torch, no CUDA, no network. Names resolve on use.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# In a source checkout `kernels/` and `targets/` stand beside this package; an installed wheel has
# them inside it. Either way they are `tinyft.kernels` and `tinyft.targets`, never top-level names.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))

_PUBLIC = {
    "MeZO": "tinyft.optim.mezo",
    "LoRA": "tinyft.optim.lora",
    "Full": "tinyft.optim.full",
    "TrainConfig": "tinyft.config",
    "fit": "tinyft.library",
    "evaluate": "tinyft.evaluate",
    "load": "tinyft.models",
    "BudgetError": "tinyft.errors",
    "InputError": "tinyft.errors",
    "TinyFTError": "tinyft.errors",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'tinyft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
