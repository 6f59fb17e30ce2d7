"""The demo on a tiny model: what it shows, and that a second call does not train again."""

from __future__ import annotations

import json

import pytest
import torch

from tinyft import cli, demo


@pytest.fixture
def tiny_demo(tiny_model_dir, tmp_path, monkeypatch):
    rows = [
        {
            "prompt": f"The film was {'great' if i % 2 else 'a bore'}. It was",
            "choices": [" terrible", " great"],
            "answer": i % 2,
        }
        for i in range(12)
    ]
    for name in ("TRAIN", "HELD_OUT"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setattr(demo, name, str(path))
    monkeypatch.setattr(demo, "MODEL", str(tiny_model_dir("llama")))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.parametrize("method", ["lora", "full", "mezo"])
def test_the_demo_shows_what_changed(tiny_demo, capfd, method):
    assert cli.main(["demo", "--method", method, "--steps", "3"]) == 0
    shown = capfd.readouterr().out
    for part in (
        *("accuracy", "before", "after", "the model says", "people said", "peak memory"),
        *("runs/demo/loss.png", "runs/demo/report.json", "tinyft eval --model runs/demo"),
    ):
        assert part in shown
    assert shown.count("The film was") >= 4
    report = (tiny_demo / "runs/demo/report.json").read_bytes()
    assert cli.main(["demo", "--method", method, "--steps", "3", "--json"]) == 0
    events = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["report"]
    assert len(events[0]["predictions"]) == 4
    assert (tiny_demo / "runs/demo/report.json").read_bytes() == report


def test_unknown_method(tiny_demo, capfd):
    assert cli.main(["demo", "--method", "magic"]) == 2
    assert "--method magic is unknown" in capfd.readouterr().err


def test_another_demo_in_the_same_folder_is_refused(tiny_demo, capfd):
    assert cli.main(["demo", "--method", "mezo", "--steps", "1"]) == 0
    assert cli.main(["demo", "--method", "lora", "--steps", "1"]) == 2
    error = capfd.readouterr().err
    assert "holds a finished run" in error and "--resume" not in error
    assert cli.main(["demo", "--method", "lora", "--steps", "2", "--overwrite"]) == 0


def test_only_what_was_tried_has_rates_of_its_own(tiny_demo, monkeypatch):
    rates = {}

    def run(config, reporter):
        rates[config.method] = config.lr
        raise KeyboardInterrupt

    monkeypatch.setattr("tinyft.train.run", run)
    for method in ("lora", "green_trainer", "roste", "roste_mezo"):
        assert cli.main(["demo", "--method", method]) == 130
    assert rates == {"lora": 5e-4, "green_trainer": None, "roste": None, "roste_mezo": None}
