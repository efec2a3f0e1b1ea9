"""The table of layers, and the graph for TensorBoard: of any net, and without any effect on the training."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_train.models.nets import Mlp
from dist_train.runs.directory import RunDir
from dist_train.training.step.layer_table import record_layers
from dist_train.training.tensorboard_graph import write_graph
from support.processes import DIST_TRAIN
from support.ranks import run_forked
from support.run_files import last_checkpoint, metrics_without_times
from support.trainings import SETTINGS
from support.user_nets import ForOdd


class Changing(nn.Module):
    """Calls one layer twice, removes another one in its first pass, and has one without a shape yet."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once, self.unused = nn.Linear(4, 4), nn.Linear(4, 3), nn.LazyLinear(5)
        self.same = self.twice
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        inputs = self.scripted(self.same(self.twice(inputs))) * self.scale
        once = self.once(inputs)
        del self.once
        return {"sum": once.sum(), "inputs": inputs}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_table_of_any_net() -> None:
    with record_layers(net := Changing()) as layers:
        net(torch.zeros(2, 4))
    assert {layer.name: (layer.type, layer.output, layer.parameters) for layer in layers} == {
        "twice": ("Linear", "4", 20), "once": ("Linear", "3", 15), "": ("Changing", "", 1),
        "unused": ("LazyLinear", "", 0), "scripted.0": ("RecursiveScriptModule", "", 20),
    }  # fmt: skip
    assert [layer.name for layer in layers[:3]] == ["twice", "once", ""]  # as called


def test_a_pass_that_fails_leaves_no_hook() -> None:
    with pytest.raises(RuntimeError), record_layers(net := Mlp()):
        net(torch.zeros(2, 3))
    assert not nn.modules.module._global_forward_hooks


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_a_graph_of_inputs_of_any_kind(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image, mask = torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8)
    inputs = {"tensor": image, "tuple": (image, mask), "dict": {"image": image, "mask": mask}}[kind]
    write_graph(tmp_path, lambda: ForOdd(in_place=False), inputs)
    assert caplog.text == ""
    [file] = tmp_path.iterdir()
    assert b"aten::linear" in file.read_bytes()


class Refusing(nn.Module):
    def __init__(self, *, made: bool = True) -> None:
        super().__init__()
        if not made:
            raise ValueError("only one")

    def forward(self, inputs: Tensor) -> Tensor:
        raise ValueError("not traced")


@pytest.mark.parametrize(("made", "reason"), [(True, "not traced"), (False, "only one")])
def test_a_net_without_a_graph_is_a_warning(
    made: bool, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        write_graph(tmp_path, lambda: Refusing(made=made), torch.zeros(2))
    assert f"no graph for TensorBoard: {reason}" in caplog.text


def test_a_recorded_pass_draws_and_returns_the_same() -> None:
    outputs = []
    for recorded in (True, False):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
        with record_layers(net) if recorded else nullcontext():
            outputs.append((net(torch.ones(8, 4)), torch.rand(3)))
    assert all(torch.equal(*each) for each in zip(*outputs, strict=True))


def test_training_is_the_same_to_the_bit_with_and_without_a_graph(tmp_path: Path) -> None:
    """With a net that draws from all generators, also while it is traced."""
    settings = [*SETTINGS, "-omodel.name=support.user_nets:Drawing", "-otrain_for=6 steps", "-osave_every=3 steps"]
    found = []
    for graph in ("true", "false"):
        command = [*DIST_TRAIN, "train", *settings, f"-otracking.tensorboard={graph}", f"--run-name={graph}"]
        done = run_forked(command, tmp_path, 1)
        assert done.returncode == 0, done.stderr
        run = tmp_path / "runs" / graph
        found.append((metrics_without_times(run), (last_checkpoint(run) / "model.safetensors").read_bytes()))
        assert any(b"aten::" in path.read_bytes() for path in run.glob("tensorboard/*")) is (graph == "true")
        assert RunDir(run).read_layers()
    assert found[0] == found[1]
