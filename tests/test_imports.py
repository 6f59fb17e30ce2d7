"""Who may import whom, and that importing the package loads nothing heavy."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "tinyft": ROOT / "tinyft",
    "tinyft.kernels": ROOT / "kernels",
    "tinyft.targets": ROOT / "targets",
}
# The layers, lowest first: a module imports from its own and from those below. Imports inside
# functions count too; only what is under TYPE_CHECKING does not.
LAYERS = [
    [
        *("tinyft.errors", "tinyft.selection", "tinyft.plots", "tinyft.budget", "tinyft.parallel"),
        "tinyft.depth",
    ],
    [
        *("tinyft.kernels", "tinyft.cost", "tinyft.memory", "tinyft.interrupt"),
        *("tinyft.targets.profiles", "tinyft.planner", "tinyft.evidence", "tinyft.guard"),
    ],
    [
        *(
            "tinyft.checkpoint",
            "tinyft.heap",
            "tinyft.packing",
            "tinyft.modules",
            "tinyft.rounding",
        ),
        *("tinyft.activations", "tinyft.updates", "tinyft.backward_cost", "tinyft.dry_run"),
        *("tinyft.importance", "tinyft.rounding"),
    ],
    ["tinyft.sources", "tinyft.examples", "tinyft.chat"],
    ["tinyft.encoding", "tinyft.batches", "tinyft.data", "tinyft.losses"],
    [
        *("tinyft.assets", "tinyft.references", "tinyft.adapters", "tinyft.models"),
        "tinyft.prefix",
        *("tinyft.zeroth", "tinyft.sparse", "tinyft.rotated", "tinyft.optim"),
    ],
    ["tinyft.config", "tinyft.schedule", "tinyft.evaluate", "tinyft.trainer"],
    [
        *("tinyft.progress", "tinyft.output", "tinyft.inputs", "tinyft.report"),
        *("tinyft.targets.listing", "tinyft.pricing", "tinyft.machine"),
        *("tinyft.targets.graphs", "tinyft.targets.zeroth_graph", "tinyft.targets.gate"),
        *("tinyft.targets.device", "tinyft.targets.export", "tinyft.targets.inference"),
        *("tinyft.targets.artefacts", "tinyft.targets.ort_training", "tinyft.targets.packed_base"),
        *("tinyft.targets.packed_inference", "tinyft.targets.rotated_graph"),
    ],
    ["tinyft.planning", "tinyft.plan_view"],
    ["tinyft.train", "tinyft.library", "tinyft.demo", "tinyft.benchmark"],
    ["tinyft.cli"],
]
# Stricter than the layers.
ONLY = {
    "tinyft.kernels": {"tinyft.kernels"},
    "tinyft.cost": {"tinyft.errors"},
    "tinyft.memory": set(),
    "tinyft.checkpoint": {"tinyft.errors"},
    "tinyft.rounding": {"tinyft.kernels"},
    "tinyft.plots": set(),
    "tinyft.targets.profiles": {"tinyft.errors"},
    "tinyft.selection": set(),
    "tinyft.depth": set(),
    "tinyft.budget": {"tinyft.errors"},
    "tinyft.guard": {"tinyft.budget", "tinyft.errors"},
    "tinyft.planner": {"tinyft.budget", "tinyft.memory", "tinyft.errors"},
    "tinyft.backward_cost": {"tinyft.cost"},
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


def run(code: str, cwd: Path, arguments: Sequence[str] = (), **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
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
        "import tinyft.targets.profiles, tinyft.targets.listing",
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


def test_kernels_and_targets_are_those_of_this_checkout():
    import tinyft.kernels
    import tinyft.targets

    assert Path(tinyft.__file__).parent.parent == ROOT
    for package, folder in ((tinyft.kernels, "kernels"), (tinyft.targets, "targets")):
        assert [Path(found).resolve() for found in package.__path__] == [ROOT / folder]
        assert not (ROOT / folder / "__init__.py").exists()


THEIRS = """
def get_kernel(name, **options): return f"theirs: {name}"
def register_kernel_mapping(*args, **options): pass
def use_kernel_forward_from_hub(*names): return lambda thing: thing
kernelize = use_kernelized_func = use_kernel_mapping = use_kernel_forward_from_hub
replace_kernel_forward_from_hub = register_kernel_mapping
class Anything:
    def __init__(self, *args, **options): pass
CUDAProperties = Device = KernelizeFallback = LayerRepository = Anything
LocalLayerRepository = Mode = ROCMProperties = Anything
"""
# What libraries do that look for Hugging Face's `kernels`, and ours at work beside it.
LOOK = """
import torch, tinyft
from tinyft.kernels import philox
from transformers.utils.import_utils import is_kernels_available
assert philox.philox(torch.zeros(4, 1, dtype=torch.int64), 0)[0, 0].item() == 0x6627E8D5
try:
    from kernels import get_kernel
    import transformers.integrations.hub_kernels as hub
    assert hub.get_kernel_hub is get_kernel
    found = get_kernel("rotary")
except ModuleNotFoundError as error:
    found = str(error)
print(philox.__file__, is_kernels_available(), found, sep="|")
"""


@pytest.fixture
def theirs(tmp_path):
    """A folder with a distribution as Hugging Face's `kernels`, of a version transformers takes."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION as version

    folder = tmp_path / "theirs"
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels/__init__.py").write_text(THEIRS)
    info = folder / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    return folder


def look(cwd: Path, *path: Path) -> list[str]:
    found = run(LOOK, cwd, PYTHONPATH=os.pathsep.join(map(str, path)))
    return found.splitlines()[-1].split("|")


def test_a_checkout_leaves_the_name_kernels_to_hugging_face(theirs):
    """Its root being the working directory and first on the path, with their package and without.

    Without it the name must not be found at all: a folder of that name would pass for it.
    """
    ours = str(ROOT / "kernels/philox.py")
    assert look(ROOT, ROOT, theirs) == [ours, "True", "theirs: rotary"]
    assert look(ROOT, ROOT) == [ours, "False", "No module named 'kernels'"]


def test_a_wheel_beside_hugging_faces_kernels(theirs, tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("tinyft", "kernels", "targets"):
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[-1]))"
    wheel = run(build, source, arguments=[str(tmp_path)]).splitlines()[-1]
    with zipfile.ZipFile(tmp_path / wheel) as archive:
        archive.extractall(site)
    assert {path.name for path in site.iterdir()} == {"tinyft", wheel[:12] + ".dist-info"}
    ours = {path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels").rglob("*.py")}
    wheels = site / "tinyft/kernels"
    assert {path.relative_to(wheels) for path in wheels.rglob("*.py")} == ours
    assert look(tmp_path, site, theirs) == [str(wheels / "philox.py"), "True", "theirs: rotary"]


def test_every_package_is_in_the_wheel():
    said = (ROOT / "setup.py").read_text()
    for name in {module.rpartition(".")[0] or module for module in modules()}:
        assert f'"{name}"' in said, f"setup.py does not pack {name}"
