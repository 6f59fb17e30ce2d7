"""Device profiles: complete, with sources, and told apart from what is only assumed."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tinyft import cli
from tinyft.errors import InputError
from tinyft.targets.profiles import DTYPES, RUNTIMES, load_profiles, profile

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "targets" / "profiles.yaml"
PROFILES = load_profiles()
EXPECTED = {
    *("raspberry-pi-5", "jetson-orin-nano", "rtx-3060", "rtx-4090", "apple-m2"),
    *("snapdragon-8-gen-3", "raspberry-pi-3b-plus"),
}


def test_every_expected_device_is_there():
    assert set(PROFILES) >= EXPECTED
    assert all(name == found.name for name, found in PROFILES.items())


@pytest.mark.parametrize("name", PROFILES)
def test_complete_and_sourced(name):
    found = PROFILES[name]
    fields = {"memory_bytes", "usable_memory_bytes", "memory_bandwidth_bytes_per_s", "power_w"}
    fields |= {f"peak_flops_per_s.{dtype}" for dtype in found.peak_flops_per_s}
    measured = found.assumed_utilisation is None
    fields |= {"runtimes", "utilisation" if measured else "assumed_utilisation"}
    assert set(found.evidence) == fields
    for key, evidence in found.evidence.items():
        assert evidence.sources or evidence.basis == "assumed", key
        assert evidence.note or evidence.basis in ("documented", "measured"), key
    # Only what no maker states may be assumed.
    assumed = {key for key, evidence in found.evidence.items() if evidence.basis == "assumed"}
    assert assumed <= {"usable_memory_bytes", "assumed_utilisation"}


@pytest.mark.parametrize("name", PROFILES)
def test_plausible(name):
    found = PROFILES[name]
    assert 0 < found.usable_memory_bytes < found.memory_bytes
    assert found.memory_bytes % 2**30 == 0 and isinstance(found.usable_memory_bytes, int)
    assert (found.utilisation is None) != (found.assumed_utilisation is None)
    assert 0 < (found.utilisation or found.assumed_utilisation) < 1
    assert list(found.peak_flops_per_s) == [d for d in DTYPES if d in found.peak_flops_per_s]
    # Narrower is never slower.
    rates = [found.peak_flops_per_s[d] for d in DTYPES if d in found.peak_flops_per_s]
    assert rates == sorted(rates)
    # Arithmetic outruns memory on every machine of today; a wrong unit would stand out.
    assert 2 < found.peak_flops_per_s["float32"] / found.memory_bandwidth_bytes_per_s < 100
    assert set(found.runtimes) <= set(RUNTIMES)


def test_derived_figures_are_their_formulas():
    """The notes' formulas, computed again."""
    rate = {name: found.peak_flops_per_s for name, found in PROFILES.items()}
    near = {
        rate["raspberry-pi-5"]["float32"]: 4 * 2.4e9 * 2 * 4 * 2,
        rate["raspberry-pi-3b-plus"]["float32"]: 4 * 1.4e9 * 1 * 4 * 2,
        rate["snapdragon-8-gen-3"]["float32"]: (3.3e9 * 4 + (3 * 3.2e9 + 2 * 3.0e9) * 2) * 4 * 2,
        rate["jetson-orin-nano"]["float32"]: 1024 * 1.02e9 * 2,
        rate["rtx-3060"]["float32"]: 3584 * 1.777e9 * 2,
        rate["rtx-3060"]["bfloat16"]: 28 * 4 * 128 * 2 * 1.777e9 / 2,
        rate["rtx-3060"]["int8"]: 28 * 4 * 128 * 2 * 1.777e9 * 2,
        PROFILES["raspberry-pi-5"].memory_bandwidth_bytes_per_s: 4267e6 * 32 / 8,
        PROFILES["raspberry-pi-3b-plus"].memory_bandwidth_bytes_per_s: 900e6 * 32 / 8,
        PROFILES["raspberry-pi-5"].utilisation: 30.249e9 / (4 * 2.4e9 * 2 * 2 * 2),
        PROFILES["apple-m2"].usable_memory_bytes: 8 * 2**30 * 2 / 3,
    }
    for stated, computed in near.items():
        assert stated == pytest.approx(computed, rel=0.01)


def test_profiles_do_not_change():
    found = profile("rtx-4090")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.memory_bytes = 1
    with pytest.raises(TypeError):
        found.peak_flops_per_s["float32"] = 1.0
    load_profiles().clear()
    assert profile("rtx-4090") is found


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("rtx-3061", "rtx-3060"),
        ("RTX 4090", "rtx-4090"),
        ("raspberry pi 5", "raspberry-pi-5"),
        ("jetson", "jetson-orin-nano"),
    ],
)
def test_unknown_name_suggests(asked, meant):
    with pytest.raises(InputError) as caught:
        profile(asked)
    text = str(caught.value)
    assert f"{asked!r} (did you mean {meant}?)" in text
    assert all(name in text for name in PROFILES)


def test_unknown_name_without_a_likeness():
    with pytest.raises(InputError, match=r"Unknown target 'zx81'\. Known: raspberry-pi-5, "):
        profile("zx81")


@pytest.fixture
def broken(tmp_path):
    """`broken(change)` changes one valid profile and returns the error of loading it."""
    valid = yaml.safe_load(FILE.read_text())["rtx-3060"]

    def load(change, name="card"):
        data = copy.deepcopy(valid)
        change(data)
        path = tmp_path / "profiles.yaml"
        path.write_text(yaml.safe_dump({name: data}))
        with pytest.raises(InputError) as caught:
            load_profiles(path)
        return str(caught.value)

    return load


def test_all_problems_at_once(broken):
    def change(data):
        data["kind"] = "tpu"
        data["colour"] = "green"
        del data["power_w"]
        data["memory_bytes"]["sources"] = []
        data["usable_memory_bytes"]["note"] = ""
        data["peak_flops_per_s"]["float32"]["value"] = "1e12"
        data["peak_flops_per_s"]["float8"] = data["peak_flops_per_s"]["int8"]
        data["memory_bandwidth_bytes_per_s"]["basis"] = "guessed"
        data["runtimes"]["value"] = ["tensorflow"]

    text = broken(change, name="Card_1")
    for problem in (
        "has 10 problems",
        "Card_1: the name must be lower-case words joined by hyphens",
        "Card_1: unknown key 'colour'",
        "Card_1: kind must be cpu or gpu, not 'tpu'",
        "Card_1: power_w must have a value, its basis and its sources",
        "Card_1: memory_bytes needs a source",
        "Card_1: usable_memory_bytes is assumed: its note must say how",
        "Card_1: peak_flops_per_s.float32.value must be a number above 0, not '1e12'",
        "Card_1: peak_flops_per_s.float8 is none of float32, bfloat16, float16, int8",
        "Card_1: memory_bandwidth_bytes_per_s.basis must be one of documented, measured, ",
        "Card_1: runtimes.value must be a list of pytorch, onnxruntime, onnxruntime-training",
    ):
        assert problem in text


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d["usable_memory_bytes"].update(value=2**40), "is above memory_bytes"),
        (lambda d: d["memory_bytes"].update(value=1.5e10), "memory_bytes must be a whole number"),
        (lambda d: d["memory_bytes"].update(value=True), "must be a number above 0, not True"),
        (lambda d: d["power_w"].update(value=0), "must be a number above 0, not 0"),
        (lambda d: d["power_w"].update(value=float("nan")), "must be a number above 0, not nan"),
        (lambda d: d["power_w"].update(sources="https://x"), "must be a list of addresses"),
        (lambda d: d["power_w"].update(sources=["a book"]), "must be a list of addresses"),
        (lambda d: d["power_w"].update(source="https://x"), "the unknown key 'source'"),
        (lambda d: d["assumed_utilisation"].update(value=40), "must be at most 1"),
        (lambda d: d.pop("assumed_utilisation"), "needs exactly one of utilisation and assumed"),
        (
            lambda d: d.update(utilisation=d.pop("assumed_utilisation")),
            "utilisation cannot be assumed",
        ),
        (lambda d: d["peak_flops_per_s"].pop("float32"), "must hold float32"),
    ],
)
def test_problems(broken, change, problem):
    text = broken(change)
    assert "has 1 problem:" in text and problem in text


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read"), ("a: [", "is not YAML"), ("[]", "must hold device profiles")],
)
def test_unreadable_file(tmp_path, content, problem):
    path = tmp_path / "profiles.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=problem):
        load_profiles(path)


def test_entry_that_is_no_mapping(tmp_path):
    path = tmp_path / "profiles.yaml"
    path.write_text("card: fast\n")
    with pytest.raises(InputError, match="card: must be a mapping"):
        load_profiles(path)


# the command


def test_command_prints_a_table(capsys):
    assert cli.main(["targets"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert all(name in text for name in PROFILES)
    for cell in ("12.0 GiB", "700 MiB? usable", "bfloat16 165 T", "360 GB/s", "6.27 W", "…"):
        assert (cell in text) == (cell != "…")
    assert "https://" not in text


def test_command_prints_sources(capsys):
    assert cli.main(["targets", "raspberry-pi-5", "--sources"]) == 0
    text = capsys.readouterr().out
    assert "rtx-3060" not in text
    found = PROFILES["raspberry-pi-5"]
    assert f"memory_bytes {found.memory_bytes:,}, documented" in text
    assert "power_w 11, measured: the whole board at the wall" in text
    for evidence in found.evidence.values():
        assert evidence.note in text
        assert all(f"    {source}\n" in text for source in evidence.sources)


def test_command_prints_json(capsys):
    assert cli.main(["targets", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == list(PROFILES)
    card = found["rtx-4090"]
    assert card["memory_bytes"] == 24 * 2**30
    assert card["peak_flops_per_s"]["float32"] == 82.58e12
    assert card["utilisation"] is None and card["assumed_utilisation"] == 0.4
    assert card["evidence"]["power_w"]["basis"] == "documented"
    assert all(
        entry["evidence"]["power_w"]["sources"][0].startswith("http") for entry in found.values()
    )


def test_command_refuses_an_unknown_name(capsys):
    assert cli.main(["targets", "rtx-3060", "rtx-4091"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "did you mean rtx-4090?" in captured.err


# installation


def test_profiles_load_light(tmp_path):
    code = (
        "import sys; from tinyft.targets.profiles import profile; profile('rtx-3060');"
        "from tinyft import cli; cli.main(['targets', '--json']);"
        "print([m for m in ('torch', 'numpy', 'rich', 'transformers') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[]\n")


def test_wheel_holds_the_profiles(tmp_path):
    """Built from a copy, so that the checkout stays clean, and used from elsewhere."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    for name in ("tinyft", "kernels", "targets"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {f"tinyft/targets/{n}" for n in ("profiles.yaml", "profiles.py", "listing.py")} <= names
    assert {"tinyft/kernels/philox.py", "tinyft/kernels/gpu/philox.py"} <= names
    assert not any(name.startswith(("targets/", "kernels/")) for name in names)
    code = "from tinyft.targets import profiles as p; print(p.__file__, len(p.load_profiles()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(tmp_path / "site" / "tinyft" / "targets" / "profiles.py"),
        str(len(PROFILES)),
    ]
