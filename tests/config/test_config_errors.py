"""Invalid settings: the error messages, and that only ConfigError is raised."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dist_train.config.loading import load_config, parse_config
from dist_train.config.optimizer import OPTIMIZERS
from dist_train.errors import ConfigError
from support.settings import DEFAULT, put, read_back


def refusal(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    return str(caught.value)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"globl_batch_size": 1}, "Unknown setting globl_batch_size. Did you mean global_batch_size? dist-train "),
        ({"lr": 1}, "Unknown setting lr. Did you mean optimizer.lr? dist-train config reference explains all."),
        ({"weight_decay": 1}, "Did you mean optimizer.weight_decay?"),  # not ema_decay
        ({"learning_rate": 1}, "Unknown setting learning_rate. Did you mean optimizer.lr? dist-train config "),
        ({"bundle": {}}, "Unknown setting bundle. dist-train config reference explains all."),  # of several sections
        ({"batch_size": 1}, "Did you mean global_batch_size?"),
        ({"epochs": 1}, 'Did you mean train_for="N epochs"?'),
        ({"max_steps": 1}, 'Did you mean train_for="N steps"?'),
        ({"bf16": True}, "Did you mean mixed_precision?"),
        ({"optimizer": {"zzz": 1}}, "Unknown setting optimizer.zzz. Settings of optimizer: name, lr, "),
        (
            {"optimizer": {"learning_rate": 1}},
            "Unknown setting optimizer.learning_rate. Did you mean optimizer.lr? dist-train config ",
        ),
        ({"ddp": {"find_unused": 1}}, "Did you mean ddp.find_unused_parameters? dist-train config "),
        (
            {"data": {"normalize": {"mean": [0], "std": [1], "sdt": 1}}},
            "Unknown setting data.normalize.sdt. Did you mean data.normalize.std? dist-train config ",
        ),
        ({"early_stop": {"patience": 1, "patiense": 1}}, "Did you mean early_stop.patience?"),
    ],
)  # fmt: skip
def test_unknown_settings_get_suggestion(tree: dict[str, Any], expected: str) -> None:
    assert expected in refusal(tree)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"global_batch_size": 0}, "global_batch_size=0: input should be greater than 0."),
        ({"task": "regression", "data": {"tta": "flip"}}, "data.tta=flip counts correct classes: it needs task=class"),
        ({"ignore_index": 0, "data": {"tta": "flip"}}, "data.tta=flip counts correct classes: it needs every label,"),
        ({"global_batch_size": "many"}, "global_batch_size=many: input should be a valid integer"),
        ({"mixed_precision": "fp8"}, "mixed_precision=fp8: input should be 'no', 'bf16' or 'fp16'."),
        ({"optimizer": {"name": "adan"}}, "optimizer.name=adan: no such optimizer. Did you mean adam? Names: adam, "),
        ({"optimizer": {"betas": [0.9, 1]}}, "optimizer.betas.1=1: input should be less than 1."),
        ({"optimizer": {"lr": ".nan"}}, "optimizer.lr=.nan: "),
        ({"train_for": "3 weeks"}, 'train_for=3 weeks: write a number and a unit: "3 epochs", '),
        ({"eval_every": "30 s"}, "eval_every=30 s: write it in steps or epochs"),
        ({"train_for": "0 steps"}, "train_for=0 steps trains nothing"),
        ({"train_for": 5}, "train_for=5: 5 epochs or 5 steps? Write the unit."),
        ({"train_for": " 2.5 "}, "train_for= 2.5 : 2.5 epochs or 2.5 steps? Write the unit."),
        ({"data": {"normalize": {"mean": [0], "std": [0]}}}, "data.normalize.std.0=0: input should be greater than 0."),
        ({"data": {"normalize": {"mean": [0], "std": [1, 1]}}}, "data.normalize: mean has 1 channels and std 2;"),
        ({"max_grad_norm": True}, "max_grad_norm=True: write a number, not yes or no."),
        ({"early_stop": {"patience": True}}, "early_stop.patience=True: write a number, not yes or no."),
        ({"runs_dir": "a\0b"}, "runs_dir=a\0b: a path must not contain a NUL character."),
        ({"stall_timeout_s": 1e300}, "stall_timeout_s=1e+300: input should be less than 2147483648."),
        ({"data": {"num_workers": 99999}}, "data.num_workers=99999: input should be less than or equal to 1024."),
        ({"model": 5}, "model=5: model is a section. Its settings: model.name, model.bundle, model.weights, ...."),
        ({"optimizer": "adam"}, "optimizer=adam: optimizer is a section. Did you mean optimizer.name=adam?"),
        ({"data": {"augment": True}}, "data.augment=True: data.augment is a section. Its settings: data.augment.sh"),
        ({"early_stop": 5}, "early_stop=5: early_stop is a section. Its settings: early_stop.patience, early_stop.m"),
        ({"optimizer": {"name": "SGD"}}, "optimizer.name=SGD: no such optimizer. Did you mean sgd? Names: adam, "),
        ({"device": "gpu"}, "device=gpu: input should be 'auto', 'cpu', 'cuda' or 'mps'. Did you mean cuda?"),
        ({"mixed_precision": "fp32"}, "Did you mean no?"),
        ({"tracking": {"wandb": False}}, "Did you mean disabled?"),
        ({"tracking": {"wandb": "on"}}, "tracking.wandb=on: input should be 'auto', 'online', "),
    ],
)  # fmt: skip
def test_error_names_setting_value_and_allowed_values(tree: dict[str, Any], expected: str) -> None:
    assert expected in refusal(tree)


def test_settings_nested_too_deeply_to_print() -> None:
    with pytest.raises(ConfigError, match=r"^model\.args\.a\."):
        load_config("smoke", ["model.args." + "a." * 3000 + "b=1"])


@pytest.mark.parametrize("bracket", ["[", "{a: ", "[{a: "])
def test_deeply_nested_brackets_are_refused_where_they_go_too_deep(bracket: str, tmp_path: Path) -> None:
    """PyYAML alone takes seconds for each thousand of them, and a page would wait."""
    (tmp_path / "c.yaml").write_text("seed: 1\nmodel: " + bracket * 1000)
    with pytest.raises(ConfigError, match=r"c\.yaml is not YAML: brackets are nested more than 64 deep"):
        load_config(str(tmp_path / "c.yaml"))
    (tmp_path / "c.yaml").write_text("model: {args: {x: " + "[" * 60 + "]" * 60 + "}}")
    assert load_config(str(tmp_path / "c.yaml"))


def test_all_errors_are_reported_together() -> None:
    text = refusal({"seed": -1, "optimiser": {}, "model": {"nam": 1}})
    assert [line.split(":")[0].split(".")[0] for line in text.splitlines()] == [
        "seed=-1", "Unknown setting model", "Unknown setting optimiser",
    ]  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_settings_of_another_optimizer_are_rejected(name: str) -> None:
    values = {"betas": [0.5, 0.9], "nesterov": True, "amsgrad": True, "centered": True}
    for key in sorted(set().union(*OPTIMIZERS.values())):
        tree = {"optimizer": {"name": name, key: values.get(key, 0.5)}}
        if key in OPTIMIZERS[name]:
            assert set(parse_config(tree).optimizer.arguments()) == {key}
        else:
            assert refusal(tree).startswith(f"optimizer: {name} has no {key}. Its settings: lr, ")


@pytest.mark.parametrize(("rule", "expected"), [("linear", 0.4), ("sqrt", 0.2)])
def test_scaled_learning_rate(rule: str, expected: float) -> None:
    optimizer = parse_config({"optimizer": {"lr": 0.1, "lr_scaling": rule, "lr_base_batch_size": 64}}).optimizer
    assert optimizer.scaled_lr(256) == pytest.approx(expected)
    assert optimizer.scaled_lr(64) == 0.1
    assert parse_config({"optimizer": {"lr": 0.1}}).optimizer.scaled_lr(10_000) == 0.1
    assert "set both or neither" in refusal({"optimizer": {"lr_scaling": rule}})
    assert "set both or neither" in refusal({"optimizer": {"lr_base_batch_size": 64}})


# --- any input gives a Config or a ConfigError -----------------------------------------------------------------------

KEYS = [
    *DEFAULT.flat(),
    *(f"early_stop.{name}" for name in ("patience", "min_delta")),
    "data.normalize.std",
    "tracking",
]
words = st.sampled_from(
    ["no", "1e-3", "12:30:00", "2020-13-45", "0x_", "~", ".nan", "-1", "3 epochs", "[]", "!!bool x", "cosine"]
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), words, st.text(max_size=8), st.dates())
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3), max_leaves=5
)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(KEYS) | st.text(max_size=8), values), min_size=1, max_size=3))
def test_random_tree_is_valid_or_rejected(mutations: list[tuple[str, Any]]) -> None:
    tree: dict[Any, Any] = {}
    for key, value in mutations:
        put(tree, key, value)
    with contextlib.suppress(ConfigError):
        config = parse_config(tree)
        assert read_back(config) == config


@settings(max_examples=200)
@given(st.sampled_from(KEYS), words | st.text(max_size=12) | values.map(str))
@example("seed", "&a [*a]")
@example("model.args", "&a {x: *a}")
def test_random_override_is_valid_or_rejected(key: str, text: str) -> None:
    for override in (f"{key}={text}", text):
        with contextlib.suppress(ConfigError):
            config = load_config("smoke", [override])
            assert read_back(config) == config


def test_alias_in_override_is_refused() -> None:
    """Nested ones stand for gigabytes, in the server of the page too."""
    with pytest.raises(ConfigError, match=r"has an alias \(\*name\)\. Write the value itself\."):
        load_config("mnist", ["model.args={a: &a [1, 2], b: [*a, *a]}"])
    assert load_config("mnist", ["tracking.group='*a'"]).tracking.group == "*a"
