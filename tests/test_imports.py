"""Who may import whom, and that importing the package loads nothing heavy."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"tinyft": ROOT / "tinyft", "tinyft.kernels": ROOT / "kernels"}
# The layers, lowest first: a module imports from its own and from those below. Imports inside
# functions count too; only what is under TYPE_CHECKING does not.
LAYERS = [
    ["tinyft.errors"],
    ["tinyft.kernels", "tinyft.cost", "tinyft.memory", "tinyft.interrupt"],
    [
        *("tinyft.checkpoint", "tinyft.heap", "tinyft.packing", "tinyft.modules"),
        *("tinyft.activations", "tinyft.updates"),
    ],
    ["tinyft.sources", "tinyft.examples", "tinyft.chat"],
    ["tinyft.encoding", "tinyft.batches", "tinyft.data", "tinyft.losses"],
    [
        *("tinyft.assets", "tinyft.references", "tinyft.adapters", "tinyft.models"),
        "tinyft.prefix",
        *("tinyft.zeroth", "tinyft.gradient", "tinyft.optim"),
    ],
    ["tinyft.config", "tinyft.schedule", "tinyft.evaluate", "tinyft.trainer"],
    ["tinyft.progress", "tinyft.plots", "tinyft.output", "tinyft.inputs", "tinyft.report"],
    ["tinyft.train", "tinyft.library", "tinyft.demo"],
    ["tinyft.cli"],
]
# Stricter than the layers.
ONLY = {
    "tinyft.kernels": {"tinyft.kernels"},
    "tinyft.cost": {"tinyft.errors"},
    "tinyft.memory": set(),
    "tinyft.checkpoint": {"tinyft.errors"},
    "tinyft.plots": set(),
}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return found


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it."""
    tree, found = ast.parse(path.read_text()), set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from tinyft import models` imports a module, `from tinyft.x import f` does not.
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else str(node.module))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return {name for name in found if name.split(".")[0] == "tinyft"}


MODULES = modules()


def layer_of(module: str) -> int | None:
    for level, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return level
    return None


@pytest.mark.parametrize("module", sorted(MODULES))
def test_layers(module):
    if module == "tinyft":
        assert not imports_of(MODULES[module])
        return
    level = layer_of(module)
    assert level is not None, f"{module} has no layer: give it one above"
    for imported in imports_of(MODULES[module]) - {"tinyft"}:
        assert layer_of(imported) <= level, f"{module} imports {imported}, which is above it"
        own = next((name for name in ONLY if (module + ".").startswith(name + ".")), None)
        if own:
            allowed = ONLY[own]
            assert any((imported + ".").startswith(name + ".") for name in allowed), imported


def run(code: str, cwd: Path, **variables: str) -> str:
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = "torch,transformers,numpy,pydantic,triton,matplotlib,rich,yaml,datasets"


@pytest.mark.parametrize(
    "code",
    [
        "import tinyft; dir(tinyft)",
        "import tinyft.cli",
        "import tinyft.cli\ntry: tinyft.cli.main(['--help'])\nexcept SystemExit: pass",
        "import tinyft.cli; assert tinyft.cli.main(['evla']) == 2",
        "import tinyft.checkpoint, tinyft.memory",
    ],
)
def test_light(code, tmp_path):
    check = f"\nimport sys; print([m for m in {HEAVY!r}.split(',') if m in sys.modules])"
    assert run(code + check, tmp_path, PYTHONPATH=str(ROOT)).endswith("[]")


def test_public_names_resolve():
    import tinyft

    for name in tinyft.__all__:
        assert getattr(tinyft, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        tinyft.nonsense  # noqa: B018


def test_kernels_are_those_of_this_checkout():
    import tinyft.kernels

    assert Path(tinyft.__file__).parent.parent == ROOT
    folders = [Path(folder).resolve() for folder in tinyft.kernels.__path__]
    assert folders == [ROOT / "kernels"]


def test_our_kernels_shadow_nobodys(tmp_path):
    """With the checkout on the path, `kernels` is still Hugging Face's package where installed:
    a regular package wins over a folder without `__init__.py`, wherever it stands."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    theirs = tmp_path / "kernels"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("theirs = True\n")
    code = (
        "import kernels, tinyft.kernels.philox as ours; assert kernels.theirs; print(ours.__file__)"
    )
    found = run(code, tmp_path.parent, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert Path(found).parent == ROOT / "kernels"
