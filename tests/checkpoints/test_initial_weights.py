"""Initial weights from a file: which files are read, what must fit, and that only the first start needs the file."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dist_train.checkpoints.contents import MODEL, Snapshot, TrainerState
from dist_train.checkpoints.initial_weights import load_initial_weights
from dist_train.checkpoints.manifest import folder_of
from dist_train.checkpoints.saved_net import SavedNet
from dist_train.checkpoints.storage import write
from dist_train.cli import main
from dist_train.config.loading import parse_config, to_yaml
from dist_train.errors import CheckpointError, ConfigError
from dist_train.launch.jobs import check_job
from dist_train.launch.python_api import train
from dist_train.launch.slurm.batch_script import BatchScript
from dist_train.models.nets import Mlp
from dist_train.models.registry import build_model
from dist_train.runs.directory import RunDir
from dist_train.runs.start_options import StartOptions, check_initial_weights
from dist_train.tools.doctor import examine
from dist_train.tools.verify.rank import run as verify_on_rank
from dist_train.tools.verify.trial import Trial
from support.ranks import run_on_ranks, train_here, train_on_ranks
from support.run_files import assert_bit_identical, assert_equal, train_losses, weights


def new_net(seed: int, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, classes))
    net(torch.randn(5, 1, 4, 4))  # running statistics and their counter
    return net


def wrapped(net: nn.Module, *attributes: str) -> nn.Module:
    """Return a net in wrappers that add these prefixes to all names: `module` as DDP, `_orig_mod` as torch.compile."""
    for attribute in reversed(attributes):
        wrapper = nn.Module()
        setattr(wrapper, attribute, net)
        net = wrapper
    return net


def in_run(net: nn.Module, folder: Path) -> Path:
    run_dir = RunDir(folder / "run")
    write(Snapshot(TrainerState(step=1), net.state_dict(), {}), folder_of(run_dir, 1), attempt=1)
    return folder_of(run_dir, 1) / MODEL


def saved(content: Any, folder: Path, name: str = "start.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def as_safetensors(net: nn.Module, folder: Path) -> Path:
    save_file(net.state_dict(), folder / "start.safetensors")
    return folder / "start.safetensors"


FORMS: dict[str, Callable[[nn.Module, Path], Path]] = {
    "pth": lambda net, folder: saved(net.state_dict(), folder),
    "another suffix": lambda net, folder: saved(net.state_dict(), folder, "start.bin"),
    "safetensors": as_safetensors,
    "a checkpoint of a run": in_run,
    "a dict without versions": lambda net, folder: saved(dict(net.state_dict()), folder),
    "state_dict": lambda net, folder: saved({"epoch": 3, "state_dict": net.state_dict(), "optimizer": {}}, folder),
    "model": lambda net, folder: saved({"model": net.state_dict(), "lr": [0.1]}, folder),
    "model_state_dict": lambda net, folder: saved({"model_state_dict": net.state_dict()}, folder),
    "DDP": lambda net, folder: saved(wrapped(net, "module").state_dict(), folder),
    "compile": lambda net, folder: saved(wrapped(net, "_orig_mod").state_dict(), folder),
    "DDP of compile": lambda net, folder: saved(wrapped(net, "module", "_orig_mod").state_dict(), folder),
    "compile of DDP": lambda net, folder: saved({"model": wrapped(net, "_orig_mod", "module").state_dict()}, folder),
    "AveragedModel": lambda net, folder: saved(AveragedModel(net).state_dict(), folder),
    "AveragedModel of DDP": lambda net, folder: saved(AveragedModel(wrapped(net, "module")).state_dict(), folder),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_file_gives_the_same_weights(form: str, tmp_path: Path) -> None:
    net, other = new_net(1), new_net(2)
    path = FORMS[form](other, tmp_path)
    record = load_initial_weights(net, path)
    assert_equal(dict(net.state_dict()), dict(other.state_dict()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert record == {"path": str(path), "sha256": digest, "left_out": []}


@pytest.mark.parametrize("wrappers", [[], ["module"], ["_orig_mod"]], ids=str)
def test_net_with_a_prefix_of_its_own(wrappers: list[str], tmp_path: Path) -> None:
    net, other = (wrapped(new_net(seed), "module") for seed in (1, 2))
    load_initial_weights(net, saved(wrapped(other, *wrappers).state_dict(), tmp_path))
    assert_equal(dict(net.state_dict()), dict(other.state_dict()))


class OldNorm(nn.BatchNorm2d):
    _version = 1  # which had no counter


def test_versions_of_modules_are_read_through_the_wrapper(tmp_path: Path) -> None:
    """torch adds the counter that the file lacks, since the file says that its BatchNorm is old."""
    net, old = nn.Sequential(nn.BatchNorm2d(2)), nn.Sequential(OldNorm(2))
    old(torch.randn(3, 2, 4, 4))
    weights = wrapped(old, "module").state_dict()
    del weights["module.0.num_batches_tracked"]
    load_initial_weights(net, saved(weights, tmp_path))
    assert torch.equal(net.state_dict()["0.running_mean"], weights["module.0.running_mean"])


# --- what does not fit ---------------------------------------------------------------------------------------------


def test_last_layer_of_another_shape_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net, other = new_net(1), new_net(2, classes=5)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        record = load_initial_weights(net, saved(wrapped(other, "module").state_dict(), tmp_path))
    assert record["left_out"] == ["3.weight", "3.bias"]
    assert "3.weight is [5, 8] in the file and [3, 8] in the net, 3.bias is [5] in the file" in caplog.text
    for name, value in net.state_dict().items():
        assert torch.equal(value, (before if name in record["left_out"] else other.state_dict())[name])


def without(name: str) -> OrderedDict[str, torch.Tensor]:
    weights = OrderedDict(new_net(2).state_dict())
    del weights[name]
    return weights


@pytest.mark.parametrize(
    ("weights", "net", "message"),
    [
        ({"0.weight": torch.zeros(4, 1, 3, 3)}, None, r"0\.weight is \[4, 1, 3, 3\] in the file and \[2, 1, 3, 3\] in"),
        (without("0.bias"), None, r"does not fit Sequential: the file lacks 0\.bias\. Set model\.name and model\.args"),
        (without("3.bias"), None, r"the file lacks 3\.bias\."),
        ({**new_net(2).state_dict(), "4.weight": torch.ones(1)}, None, r"the net has no 4\.weight\."),
        (Mlp(1, 28, 10).state_dict(), None, r"the file lacks 0\.weight, 0\.bias, 1\.weight and 6 more; the net has no"),
        (nn.Linear(8, 5).state_dict(), nn.Linear(8, 3), r"weight is \[5, 8\] in .*, bias is \[5\]"),  # nothing is left
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(weights: Any, net: nn.Module | None, message: str, tmp_path: Path) -> None:
    if len(weights) == 1:
        weights = new_net(2).state_dict() | weights
    path = saved(weights, tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        load_initial_weights(net or new_net(1), path)
    assert str(caught.value).startswith(f"model.weights={path} does not fit ")
    assert "\n" not in str(caught.value)


class Trap:
    def __reduce__(self) -> Any:
        return os.system, ("touch it_ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"it is damaged, or of another format"), (b"hello", r"it is damaged, or of another format"),
        (b"PK\3\4", r"it is damaged, or of another format"), (new_net(1), r"reading the \S*Sequential in it would run"),
        ({"model": {}, "trap": Trap()}, r"reading the \S*system in it would run code"),
        ([torch.ones(1)], r"holds a list, and no state dict"), ({}, r"holds nothing, and no state dict"),
        ({"optimizer": {"state": {}}, "epoch": 3}, r"holds optimizer, epoch, and no state dict"),
        ({"model": {"weight": [1.0]}}, r"holds weight, and no state dict"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_other_files_are_refused_and_run_no_code(
    content: Any, message: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"start.{suffix}"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    expected = message if suffix == "pth" else "it is damaged, or of another format"
    with pytest.raises(ConfigError, match=rf"^model\.weights=.*{expected}.*\. Give a \.safetensors file") as caught:
        load_initial_weights(new_net(1), path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "it_ran").exists()


# --- before processes start ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["config", "validate"], ["train", "--dry-run"], ["train", "--dry-run", "--nproc=2"], ["launch", "--nproc=2"],
        ["launch", "--nproc=2", "--run-name=r"], ["slurm", "submit"], ["slurm", "submit", "--run-name=r"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_missing_file_is_refused_before_processes_start(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(main, [*command, "-c", "smoke", "model.weights=gone.pth"])
    assert isinstance(found.exception, ConfigError) or found.exit_code == 2
    assert "model.weights=gone.pth: no such file." in f"{found.output}{found.exception}"
    assert list(tmp_path.rglob("*")) == []


def test_missing_file_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_config({"model": {"weights": "gone.pth"}})
    with pytest.raises(ConfigError, match="no such file"):
        train(config)
    with pytest.raises(ConfigError, match="no such file"):
        train(config, nproc=2)
    with pytest.raises(ConfigError, match="no such file"):
        check_job(BatchScript(), config, StartOptions(config_name="x"))
    assert list(tmp_path.rglob("*")) == []


def test_two_sources_of_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    command = ["train", "-c", "smoke", "--dry-run", f"--init-from={tmp_path}/other", "model.weights=start.pth"]
    found = CliRunner().invoke(main, command)
    assert "and model.weights=start.pth both give the initial weights." in f"{found.output}{found.exception}"


def test_doctor_loads_the_file(tmp_path: Path) -> None:
    path = saved(new_net(1).state_dict(), tmp_path)
    config = parse_config(SETTINGS | {"model": {"weights": str(path)}, "tracking": {"wandb": "disabled"}})
    found = {each.name: each for each in examine(config, tmp_path / "runs")}
    assert "does not fit Mlp: the file lacks" in found["data and net"].fix


# --- of another run --------------------------------------------------------------------------------------------------


def checkpoint(run_dir: RunDir, step: int, accuracy: float | None = None) -> nn.Module:
    """Write a checkpoint of a net of its own, and return that."""
    net, state = new_net(step), TrainerState(step=step)
    if accuracy is not None:
        state.record_evaluation({"val/loss": 1.0, "val/accuracy": accuracy}, min_delta=0.0)
    write(Snapshot(state, net.state_dict(), {}), folder_of(run_dir, step), attempt=1, run_id=run_dir.run_id)
    return net


def test_run_gives_its_best_checkpoint_else_its_last(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_TRAIN_RUNS_DIR", str(run_dir.path.parent))
    best, _last = checkpoint(run_dir, 1, accuracy=0.9), checkpoint(run_dir, 3, accuracy=0.5)
    for path in (run_dir.path, Path(run_dir.path.name)):  # a folder, and a name
        net = new_net(7)
        record = load_initial_weights(net, path)
        assert_equal(dict(net.state_dict()), dict(best.state_dict()))
        file = folder_of(run_dir, 1) / MODEL
        assert record == {
            "path": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "left_out": [],
        }  # fmt: skip
    shutil.rmtree(folder_of(run_dir, 1))
    last = checkpoint(run_dir, 3)
    load_initial_weights(net, run_dir.path)
    assert_equal(dict(net.state_dict()), dict(last.state_dict()))


def test_run_without_checkpoint_is_refused(run_dir: RunDir) -> None:
    config = parse_config({"model": {"weights": str(run_dir.path)}})
    with pytest.raises(ConfigError, match=rf"model.weights={run_dir.path}: the run .* has no checkpoint yet. Wait"):
        check_initial_weights(config)
    net = checkpoint(run_dir, 1)
    check_initial_weights(config)
    (folder_of(run_dir, 1) / MODEL).write_bytes(b"")
    with pytest.raises(CheckpointError, match="No good checkpoint last in"):
        load_initial_weights(net, run_dir.path)


# --- published by torchvision ----------------------------------------------------------------------------------------

PUBLISHED = Path("SqueezeNet1_1_Weights.IMAGENET1K_V1")


def test_published_weights_come_from_the_cache_of_torch_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = parse_config({"model": {"weights": str(PUBLISHED)}})
    file = tmp_path / "hub/checkpoints/squeezenet1_1-b8a52dc0.pth"
    expected = rf"model.weights={PUBLISHED}: there is no {file}. Download https://\S+/{file.name} where there is a"
    with pytest.raises(ConfigError, match=expected):
        check_initial_weights(config)
    with pytest.raises(ConfigError, match=expected):
        load_initial_weights(new_net(1), PUBLISHED)
    file.parent.mkdir(parents=True)
    torch.save(new_net(7).state_dict(), file)
    check_initial_weights(config)
    net = new_net(1)
    assert load_initial_weights(net, PUBLISHED)["path"] == str(file)
    assert_equal(dict(net.state_dict()), dict(new_net(7).state_dict()))


def test_unknown_published_weights_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no such weights. Did you mean ResNet18_Weights.IMAGENET1K_V1\? See"):
        check_initial_weights(parse_config({"model": {"weights": "Resnet18_Weights.IMAGENET1K_V1"}}))


# --- in a run ------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "data": {"name": "support.user_sets:Jittered"}, "model": {"name": "mlp"},
    "global_batch_size": 12, "train_for": "4 steps", "log_every": 1, "eval_every": 0, "ema_decay": 0.9,
}  # fmt: skip


def net_of(seed: int) -> nn.Module:
    return build_model(parse_config(SETTINGS).model, {"in_channels": 1, "num_classes": 3, "image_size": 8}, seed)


def train_beside_other_files(settings: dict[str, Any], run_dir: Path, folders: list[Path]) -> None:
    """Each rank has its own current folder, as on machines with disks of their own."""
    os.chdir(folders[int(os.environ["RANK"])])
    assert train_here(settings, run_dir) == "FINISHED"


def test_all_ranks_start_from_the_file_of_rank_zero(tmp_path: Path) -> None:
    """To the bit on any number of processes: a step of 1e-30 changes no weight."""
    folders = [tmp_path / name for name in ("zero", "one", "two")]
    for folder in folders:
        folder.mkdir()
    saved(net_of(7).state_dict(), folders[0])
    saved(net_of(8).state_dict(), folders[1])  # and the third rank has no file
    settings = SETTINGS | {
        "model": SETTINGS["model"] | {"weights": "start.pth"}, "optimizer": {"name": "sgd", "lr": 1e-30},
        "ema_decay": None,
    }  # fmt: skip
    for world_size in (1, 3):
        run = tmp_path / f"on_{world_size}"
        run_on_ranks(train_beside_other_files, settings, run, folders, world_size=world_size)
        assert_equal(dict(weights(run)), dict(net_of(7).state_dict()))
    assert train_losses(tmp_path / "on_3") == pytest.approx(train_losses(tmp_path / "on_1"), rel=1e-5)


def test_resume_and_readers_do_not_need_the_file(tmp_path: Path) -> None:
    path = saved(net_of(7).state_dict(), tmp_path)
    settings = SETTINGS | {"model": SETTINGS["model"] | {"weights": str(path)}}
    train_on_ranks(settings, tmp_path / "whole", world_size=2)
    train_on_ranks(settings, tmp_path / "stopped", world_size=2, stop_after=2)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.unlink()
    train_on_ranks(settings, tmp_path / "stopped", world_size=2)
    assert_bit_identical(tmp_path / "stopped", tmp_path / "whole")
    recorded = RunDir(tmp_path / "stopped").read_provenance()["initial_weights"]
    assert recorded == {"path": str(path), "sha256": digest, "left_out": []}
    assert_equal(dict(SavedNet.find(tmp_path / "stopped", "last").build().state_dict()), weights(tmp_path / "stopped"))
    (tmp_path / "config.yaml").write_text(to_yaml(parse_config(settings)))
    run_on_ranks(verify_here, str(tmp_path / "config.yaml"), world_size=1)


def verify_here(config: str) -> None:
    assert len(verify_on_rank(Trial(config=config, steps=1)).losses) == 1


def test_run_starts_from_another_run(tmp_path: Path) -> None:
    """On all ranks; a resume does not need the other run."""
    other = SETTINGS | {"eval_every": "2 steps", "save_every": "2 steps"}
    train_on_ranks(other, tmp_path / "other")
    settings = SETTINGS | {"model": SETTINGS["model"] | {"weights": str(tmp_path / "other")}}
    train_on_ranks(settings, tmp_path / "whole", world_size=2)
    train_on_ranks(settings, tmp_path / "stopped", world_size=2, stop_after=2)
    recorded = RunDir(tmp_path / "stopped").read_provenance()["initial_weights"]
    assert recorded["sha256"] == hashlib.sha256(Path(recorded["path"]).read_bytes()).hexdigest()
    shutil.rmtree(tmp_path / "other")
    train_on_ranks(settings, tmp_path / "stopped", world_size=2)
    assert_bit_identical(tmp_path / "stopped", tmp_path / "whole")
    assert RunDir(tmp_path / "stopped").read_provenance()["initial_weights"] == recorded
