"""Loading settings from YAML and overrides, default folders, and which settings can change the result."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dist_train.cli import main
from dist_train.config.durations import Duration
from dist_train.config.loading import bundled_configs, differences, find_config, load_config, parse_config, to_yaml
from dist_train.config.paths import default_data_root, user_cache
from dist_train.errors import ConfigError
from support.settings import DEFAULT, load, put

# --- YAML and overrides ------------------------------------------------------------------------------------------


def test_numbers_and_booleans_in_yaml(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as text, a bare no as False and 12:30:00 as 45000."""
    text = "optimizer: {lr: 1e-3}\nmixed_precision: no\nmodel: {args: {dropout: 1e-3, name: '1e-3', at: '12:30:00'}}"
    config = load(text, "model.args.slope=2.5E+2", "optimizer.eps=1e-6", folder=tmp_path)
    assert (config.optimizer.lr, config.optimizer.eps, config.mixed_precision) == (1e-3, 1e-6, "no")
    assert config.model.args == {"dropout": 1e-3, "name": "1e-3", "at": "12:30:00", "slope": 250.0}
    assert load(to_yaml(config), folder=tmp_path) == config


@pytest.mark.parametrize("setting", ["train_for", "save_every", "global_batch_size", "seed"])
def test_time_of_day_is_not_parsed_as_number(setting: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{setting}=12:30:00: "):
        load(f"{setting}: 12:30:00", folder=tmp_path)
    with pytest.raises(ConfigError, match=f"{setting}=0:30: "):
        load("", f"{setting}=0:30", folder=tmp_path)


def test_later_overrides_win(tmp_path: Path) -> None:
    config = load(
        "optimizer: {name: sgd, lr: 0.1}\nseed: 1",
        "optimizer.lr=3e-4", "seed=2", "seed=3", "tracking.tags=[a, b]", "early_stop.patience=2", "runs_dir=",
        folder=tmp_path,
    )  # fmt: skip
    assert (config.optimizer.name, config.optimizer.lr, config.seed) == ("sgd", 3e-4, 3)
    assert config.tracking.tags == ["a", "b"]
    assert config.early_stop is not None
    assert (config.early_stop.patience, config.runs_dir) == (2, None)


@pytest.mark.parametrize(
    "override",
    ["lr", "=3", "optimizer..lr=3", ".lr=3", "seed=[", "seed=2020-13-45", "seed=!!bool x", "model.args={a: 1, a: 2}"],
)
def test_error_quotes_invalid_override(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load("", override, folder=tmp_path)
    assert override in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["- 1", "just words", "a: [", "\0", "seed: 2020-13-45", "[" * 3000, "seed: !!int ''", "seed: 0x" + 4000 * "f"],
)
def test_error_names_file_that_is_not_config(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml "):
        load(text, folder=tmp_path)


@pytest.mark.parametrize("text", ["seed: 1\nmodel: {}\nseed: 1", "optimizer:\n  lr: 1\n  lr: 1"])
def test_duplicate_key_is_rejected(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml is not YAML: duplicate key (seed|lr) in .* line [13], "):
        load(text, folder=tmp_path)
    merged = "data: {args: {a: &a {x: 1, y: 1}, b: &b {<<: *a, x: 2}, c: {<<: [*b, *a], y: 3}}}"
    assert load(merged, folder=tmp_path).data.args["c"] == {"x": 2, "y": 3}


def test_bare_numbers_are_steps() -> None:
    assert parse_config({"log_every": 30}).log_every == Duration(30, "steps")


# --- files -------------------------------------------------------------------------------------------------------


def test_bundled_configs_load_from_any_folder_and_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the `config.yaml` of a run gives the same settings."""
    monkeypatch.chdir(tmp_path)
    assert "smoke" in bundled_configs()
    for name, path in bundled_configs().items():
        assert find_config(name) == find_config(f"configs/{name}.yaml") == path
        config = load_config(name)
        assert load(to_yaml(config), folder=tmp_path) == config
        assert load(to_yaml(config), folder=tmp_path).flat() == config.flat()
    (tmp_path / "smoke").write_text("seed: 7")  # a file takes precedence over a bundled config
    assert load_config("smoke").seed == 7


def test_unknown_config_gets_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"No config file smok\. Did you mean smoke\? dist-train config ls lists"):
        load_config("smok")
    with pytest.raises(ConfigError, match="No config file elsewhere/smoke"):
        load_config("elsewhere/smoke.yaml")
    with pytest.raises(ConfigError, match=r"No config file x{77}\.\.\.: File name too long\."):
        load_config("x" * 300)


@pytest.mark.parametrize("command", ["train", "launch --nproc=2", "sweep", "verify", "config show", "slurm render"])
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("mnist lr=3", "mnist"),
        ("lr=3 configs/mnist.yaml", "configs/mnist.yaml"),
        ("mnst", "mnist"),
        ("", None),
        ("lr=3", None),
    ],
)
def test_config_without_option_is_suggested(command: str, given: str, meant: str | None) -> None:
    refused = CliRunner().invoke(main, [*command.split(), *given.split()])
    fix = f"Did you mean -c {meant}?" if meant else "Name one, for example -c mnist."
    assert (refused.exit_code, refused.output) == (
        2, f"error: No config. {fix} dist-train config ls lists the bundled ones.\n"
    )  # fmt: skip


def test_second_config_without_option_is_suggested() -> None:
    with pytest.raises(ConfigError, match=r'^"mnist_mlp" is not a setting\. Did you mean -c mnist_mlp\?$'):
        load_config("mnist", ["mnist_mlp"])


@pytest.mark.parametrize(
    ("env", "expected"),
    [({"DIST_TRAIN_DATA_DIR": "/d", "XDG_CACHE_HOME": "/c"}, "/d"), ({"XDG_CACHE_HOME": "/c"}, "/c/dist_train")],
)
def test_default_data_root(env: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIST_TRAIN_DATA_DIR")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert default_data_root() == Path(expected)


def test_unwritable_home_uses_temporary_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Caches are then temporary, with one warning, unless XDG_CACHE_HOME is set; existing data are still read."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    for name in ("DIST_TRAIN_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert (user_cache(), default_data_root()) == (tmp_path / "home/.cache/dist_train",) * 2
    (tmp_path / "home").write_text("no folder")
    folders = {user_cache(), default_data_root()}
    assert [path.parent for path in folders] == [tmp_path / "tmp"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{tmp_path / 'home/.cache/dist_train'} is not writable: caches go to {tmp_path / 'tmp'}/")
    (tmp_path / "home").unlink()
    (tmp_path / "home/.cache/dist_train").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root can write everywhere
    assert user_cache().parent == tmp_path / "tmp"
    assert default_data_root() == tmp_path / "home/.cache/dist_train"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "chosen"))
    assert user_cache() == tmp_path / "chosen/dist_train"


def test_temporary_cache_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is predictable, so a link that another user has placed there is not followed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME")
    (tmp_path / "home").write_text("no folder")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"dist_train-{os.getuid()}").symlink_to(tmp_path / "theirs")
    cache = user_cache()
    assert cache.resolve().parent == tmp_path
    assert cache.stat().st_mode & 0o077 == 0


# --- which settings can change the result --------------------------------------------------------------------------

FREE = {
    "per_device_batch_size": 7, "device": "cpu", "log_every": 7, "save_every": "30 s", "keep_last": 9, "keep_best": 9,
    "keep_every": 9, "stall_timeout_s": 9, "runs_dir": "x", "data.root": "x", "data.val_root": "x",
    "data.num_workers": 2, "data.resident": False, "data.tta": "flip", "tracking.wandb": "disabled",
    "tracking.tags": ["a"], "metrics": ["f1"],
}  # fmt: skip
BOUND = {
    "seed": 7, "train_for": "7 steps", "global_batch_size": 7, "mixed_precision": "bf16", "dtype": "float64",
    "max_grad_norm": 1.0, "task": "regression", "class_weights": "balanced", "ignore_index": -1, "best_by": "val/loss",
    "label_smoothing": 0.1, "ema_decay": 0.9, "early_stop.patience": 3, "eval_every": 7,
    "data.name": "x", "data.val_bundle": "x", "data.val_examples": 7, "data.normalize": {"mean": [0.5], "std": [0.5]},
    "data.args": {"a": 1}, "data.sampling": "balanced", "data.sample_weights": "x", "data.augment.mixup_alpha": 0.2,
    "data.transforms": ["RandAugment"],
    "model.name": "x", "model.weights": "x", "model.args": {"a": 1}, "optimizer.lr": 7, "optimizer.betas": [0.5, 0.5],
    "schedule.name": "cosine", "schedule.warmup": 7, "ddp.sync_batchnorm": True, "final_train_eval": False,
}  # fmt: skip


@pytest.mark.parametrize("key", [*FREE, *BOUND])
def test_result_settings_can_change_result(key: str) -> None:
    tree: dict[Any, Any] = {}
    put(tree, key, (FREE | BOUND)[key])
    other = parse_config(tree)
    diff = differences(DEFAULT.result_settings(), other.result_settings())
    assert other != DEFAULT
    assert (diff == {}) == (key in FREE)
    assert {name.split(".")[0] for name in diff} <= {key.split(".")[0]}
    back = differences(other.result_settings(), DEFAULT.result_settings())
    assert diff == {name: (old, new) for name, (new, old) in back.items()}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("ema_decay=null", "ema_decay: 0.99 | null"),
        ("data.normalize=null", "data.normalize.std: [0.3081] | not set"),
        ("tracking.pictures=false", "tracking.pictures: true | false"),
        ("data.root='1'", "data.root: null | '1'"),
        ("tracking.tags=[a, '1']", "tracking.tags: [] | [a, '1']"),
        ("model.args={b: {c: no}, a: 1e-3}", "model.args: {} | {b: {c: false}, a: 0.001}"),
    ],
)
def test_config_diff_shows_values_as_yaml(override: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(to_yaml(load_config("mnist", [override])))
    shown = CliRunner().invoke(main, ["config", "diff", "mnist", str(tmp_path / "other.yaml")])
    assert shown.exit_code == 0
    assert line in shown.output.splitlines()
    assert {each.split(":")[0].split(".")[0] for each in shown.output.splitlines()} == {
        line.split(":")[0].split(".")[0]
    }
