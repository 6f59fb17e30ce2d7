"""The configuration: conversion, defaults, and every mistake named at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import yaml
from transformers import GPT2Config

from tinyft.budget import Budget
from tinyft.config import GROUPS, TrainConfig, as_flag, flags, read_yaml
from tinyft.errors import InputError
from tinyft.optim import METHODS
from tinyft.optim.base import Optimizer

GIVEN = {"model": "m", "data": "d.jsonl"}


def build(**values):
    return TrainConfig.build({**GIVEN, **values}, spell=as_flag)


def wide(channels):
    return GPT2Config(n_embd=channels)


def problems(**values):
    with pytest.raises(InputError) as caught:
        build(**values)
    return str(caught.value)


def test_strings_are_converted():
    config = build(
        method="mezo",
        steps="20",
        lr="1e-6",
        eps="1e-2",
        exact="true",
        base_bits="8",
        trainable="lora",
    )
    assert (config.steps, config.lr, config.base_bits) == (20, 1e-6, 8)
    assert (config.options.eps, config.options.exact) == (1e-2, True)
    assert isinstance(config.options, METHODS["mezo"].Options)


@pytest.mark.parametrize("method", ["mezo", "lora", "full"])
def test_defaults_are_the_methods_own(method):
    config, cls = build(method=method), METHODS[method]
    assert config.lr is None and config.with_lr(wide(4096)).lr == cls.default_lr[config.trainable]
    assert config.schedule == "cosine"
    assert config.epochs == 1.0 and config.steps is None
    assert build(method=method, steps=3).epochs is None


def test_gradients_take_larger_rates_on_narrower_models():
    for width, factor in ((8192, 0.5), (2048, 2), (512, 8), (256, 16), (32, 16)):
        assert build(method="full").with_lr(wide(width)).lr == pytest.approx(2e-5 * factor)
        rate = 2e-4 * factor**0.5
        assert build(method="lora").with_lr(wide(width)).lr == pytest.approx(rate, rel=0.02)
    assert build(method="lora", lr=1e-3).with_lr(wide(32)).lr == 1e-3


def test_mezo_s_rate_falls_with_the_width_and_the_steps():
    """Published ones for 5,120 channels (FZOO in 20,000 steps; MeZO's 1e-7 to 1e-6), within
    twice."""
    for estimator, published in (("centred", 5e-5), ("one-sided", 5e-5), ("two-sided", 3e-7)):
        mezo = build(method="mezo", estimator=estimator)
        rate = mezo.with_lr(wide(5120), 20_000).lr
        assert 0.5 < rate / published < 2
        has_units = estimator != "two-sided"
        factor = 2 if has_units else 4
        narrower = mezo.with_lr(wide(2560), 20_000).lr
        assert narrower == pytest.approx(factor * rate, rel=0.05)  # two digits
        fewer, few = mezo.with_lr(wide(5120), 5_000).lr, mezo.with_lr(wide(5120), 10).lr
        assert fewer == pytest.approx((2 if has_units else 1) * rate, rel=0.05)
        assert few == mezo.with_lr(wide(5120), 80).lr == mezo.with_lr(wide(5120)).lr
        adapters = build(method="mezo", estimator=estimator, trainable="lora")
        assert adapters.with_lr(wide(64)).lr == adapters.with_lr(wide(5120), 200).lr
    assert build(method="mezo", steps=320).with_lr(wide(4096)).lr == pytest.approx(3.6e-4)
    assert build(method="mezo", steps=320).with_lr(wide(4096), 80).lr == pytest.approx(7.2e-4)


def test_mezo_has_probes_by_its_estimator():
    def chosen(**options):
        found = build(method="mezo", **options).options
        return found.estimator, found.probes

    assert chosen() == ("centred", 5) and chosen(probes=8) == ("centred", 8)
    assert chosen(estimator="one-sided") == ("one-sided", 4)
    assert chosen(estimator="two-sided") == chosen(exact=True) == ("two-sided", 1)
    assert "one probe" in problems(method="mezo", exact=True, probes=2)


def test_a_name_of_two_meanings_is_one_flag_that_says_both():
    (flag,) = (flag for flag in flags() if flag.name == "estimator")
    assert {"two-sided", "one-sided", "centred", "sample", "svd"} == set(flag.choices)
    assert flag.methods == ("mezo", "roste_mezo", "sparse_lora")
    for text in ("mezo and roste_mezo: gradient estimator", "sparse_lora: channels"):
        assert text in flag.help
    names = [flag.name for flag in flags()]
    assert len(names) == len(set(names))


def test_mezo_s_perturbation_is_that_published_for_what_is_trained():
    def eps(**options):
        return build(**{"method": "mezo", **options}).options.eps

    assert (eps(), eps(trainable="lora"), eps(trainable="prefix")) == (1e-3, 1e-2, 1e-1)
    assert eps(method="roste_mezo") == 1e-2 and eps(trainable="lora", eps=1e-4) == 1e-4


def test_none_is_a_word_where_it_is_a_choice():
    """And where a value may be missing, it says so."""
    config = build(method="roste", rotations="none", clip="none", checkpointing="none", lr="none")
    assert (config.options.rotations, config.options.clip) == ("none", None)
    assert (config.checkpointing, config.lr) == ("none", None)


def test_a_zero_learning_rate_is_kept():
    assert build(method="mezo", lr=0).lr == 0.0


def test_mezo_on_lora_uses_the_rate_for_lora():
    config = build(method="mezo", trainable="lora", rank=4).with_lr(wide(64))
    assert config.lr == METHODS["mezo"].default_lr["lora"] and config.rank == 4


def test_targets_by_name():
    assert build(method="lora", lora_targets="q_proj,v_proj").lora_targets == ("q_proj", "v_proj")
    assert build(method="lora", lora_targets=["q_proj"]).lora_targets == ("q_proj",)
    assert build(method="lora").lora_targets == "all-linear"


def test_all_problems_at_once():
    found = problems(
        method="mezo", steps="many", lrr=1, eps=-1, batch_size=0, rank=3, base_bits=3, grad_clip=1
    )
    for part in (
        "--steps many: must be a valid integer",
        "--lrr is not known (did you mean --lr?)",
        "--eps must be positive",
        "--batch-size 0: must be greater than or equal to 1",
        "--rank needs adapters (--trainable lora)",
        "--base-bits 3: must be 16, 8 or 4",
        "--grad-clip needs gradients",
    ):
        assert part in found, found


def test_what_is_missing():
    with pytest.raises(InputError) as caught:
        TrainConfig.build({}, require=("output",), spell=as_flag)
    for name in ("model", "data", "method", "output"):
        assert f"--{name} is missing" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"method": "mezzo"}, "--method mezzo is unknown: choose from .*did you mean mezo"),
        ({"method": "lora", "eps": 1e-3}, "--eps belongs to mezo and roste_mezo, not to lora"),
        ({"method": "lora", "steps": 1, "epochs": 1}, "--steps and --epochs exclude each other"),
        ({"method": "lora", "trainable": "all"}, "lora trains lora"),
        ({"method": "lora", "objective": "f1"}, "--objective f1 has no gradient"),
        ({"method": "full", "base_bits": 4}, "--base-bits 4 keeps the base frozen"),
        ({"method": "mezo", "base_bits": 8}, "--base-bits 8 keeps the base frozen"),
        ({"method": "full", "resume": True, "overwrite": True}, "exclude each other"),
        ({"method": "mezo", "trainable": "lora", "dropout": 0.1}, "--dropout is for methods with"),
        ({"method": "lora", "eval_every": 5}, "--eval-every needs --eval-data"),
        ({"method": "full", "lr": "fast"}, "--lr fast: must be a valid number"),
        ({"method": "full", "schedule": "linear"}, "--schedule linear: must be 'constant' or"),
    ],
)
def test_conflicts(values, expected):
    with pytest.raises(InputError, match=expected):
        build(**values)


def test_defaults_are_no_conflicts():
    assert build(method="mezo", trainable="lora", dropout=0.0).dropout == 0.0
    assert build(method="lora", dropout=0.1, eval_every=5, eval_data="e.jsonl").eval_every == 5


def test_none_means_not_given_except_where_it_is_a_value():
    config = build(method="full", grad_clip="none", threads="null", checkpointing="none")
    assert (config.grad_clip, config.threads, config.checkpointing) == (
        None,
        None,
        "none",
    )  # and not the default, "selective"


@pytest.mark.parametrize("method", ["mezo", "lora", "full"])
def test_saved_and_read_again_it_is_the_same(method, tmp_path):
    config = build(method=method, steps=5, output=str(tmp_path), lr=3e-7)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.flat()))
    assert TrainConfig.build(read_yaml(tmp_path / "run.yaml")) == config


def test_flat_holds_what_the_run_depends_on_and_no_more():
    flat = build(method="mezo").flat()
    assert flat["eps"] == 1e-3
    assert not {"options", "resume", "overwrite", "rank", "grad_clip"} & flat.keys()


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        build(method="mezo").lr = 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a: [", "is not YAML"), ("- a", "must hold"), ("a: {b: 1}", "without sections")],
)
def test_bad_yaml(tmp_path, text, expected):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match=expected):
        read_yaml(tmp_path / "run.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")


def test_yaml_may_spell_names_as_flags(tmp_path):
    (tmp_path / "run.yaml").write_text("batch-size: 4\nlr: 1e-5\n")
    assert read_yaml(tmp_path / "run.yaml") == {"batch_size": 4, "lr": "1e-5"}
    assert build(method="mezo", lr="1e-5").lr == 1e-5


def test_every_field_has_its_place_in_the_help_and_a_description():
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(TrainConfig.model_fields.keys() - {"options"})
    assert all(flag.help for flag in flags())


def test_a_new_method_is_a_new_choice_with_its_own_flags(monkeypatch):
    @dataclass(frozen=True)
    class Options:
        sharpness: float = field(default=0.5, metadata={"help": "how sharp"})

    class Sharp(Optimizer):
        name = "sharp"

    Sharp.Options = Options
    monkeypatch.setitem(METHODS, "sharp", Sharp)
    by_name = {flag.name: flag for flag in flags()}
    assert by_name["sharpness"].methods == ("sharp",)
    assert "sharp" in by_name["method"].choices
    assert build(method="sharp", sharpness="0.25").options.sharpness == 0.25
    assert "--sharpness belongs to sharp, not to mezo" in problems(method="mezo", sharpness=1)
    assert "did you mean --sharpness?" in problems(method="sharp", sharpnes=1)
    assert "--sharpness very: must be a valid number" in problems(method="sharp", sharpness="very")


def test_the_budget():
    config = build(method="lora", memory="1.5GiB", flops=2e15, time="1h30min", energy="5Wh")
    assert config.budget == Budget(3 << 29, 2e15, 5400.0, 18_000.0)
    assert build(method="lora").budget == Budget()
    assert build(method="lora", memory=1 << 30, flops="none").budget == Budget(1 << 30)
    assert TrainConfig.build(config.flat()) == config and config.flat()["time"] == "1h30min"


def test_bad_limits_are_named_with_all_else_that_is_wrong():
    found = problems(method="mezo", memory="12 parsecs", time=90, energy="", flops="-1", steps=0)
    for part in (
        "--memory 12 parsecs: parsecs is no unit of memory",
        "--flops -1: must be above 0",
        "--time 90: needs a unit",
        "--energy (empty): give a number and a unit",
        "--steps 0: must be greater",
    ):
        assert found.count(part) == 1, found
