"""TinyFT: fine-tune language models on machines that are too small for it.

Importing this package loads nothing heavy: no torch, no CUDA, no network. Names resolve on use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__version__ = "0.1.0"


class _Checkout(FileFinder):
    """Finds what stands in a checkout's root, but for the folders that are parts of this package.

    On the path (as the working directory, say) `kernels/` would else be a namespace package of the
    name of Hugging Face's, which libraries that look for theirs take to be installed.
    """

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        return None if fullname in ("kernels", "targets") else super().find_spec(fullname, target)


# In a source checkout `kernels/` and `targets/` stand beside this package; an installed wheel has
# them inside it. Either way they are `tinyft.kernels` and `tinyft.targets`, never top-level names.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))
    for _entry in {str(_root), *(e for e in sys.path if e and Path(e).resolve() == _root)}:
        sys.path_importer_cache[_entry] = _Checkout(_entry, (SourceFileLoader, SOURCE_SUFFIXES))

_PUBLIC = {
    "MeZO": "tinyft.optim.mezo",
    "LoRA": "tinyft.optim.lora",
    "Full": "tinyft.optim.full",
    "GreenTrainer": "tinyft.optim.green_trainer",
    "SparseLoRA": "tinyft.optim.sparse_lora",
    "RoSTE": "tinyft.optim.roste",
    "RoSTEMeZO": "tinyft.optim.roste",
    "TrainConfig": "tinyft.config",
    "Budget": "tinyft.budget",
    "fit": "tinyft.library",
    "plan": "tinyft.library",
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
