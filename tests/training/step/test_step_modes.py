"""The modes of an update: equal within rounding, no trace after a trial, never silently wrong."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.loading import parse_config
from dist_train.config.profiled_steps import ProfiledSteps
from dist_train.config.schema import StepMode
from dist_train.data.batches import training_batches
from dist_train.data.class_weights import class_weights
from dist_train.data.sampler import ShardSampler
from dist_train.distributed.world import World
from dist_train.errors import UserCodeError
from dist_train.models.freezing import Frozen
from dist_train.models.nets import MODELS, Mlp
from dist_train.models.tasks.losses import loss_of
from dist_train.runs.directory import RunDir
from dist_train.training.step import chosen_update, mode_selection
from dist_train.training.step.lr_schedule import LearningRate
from dist_train.training.step.mode_selection import MAX_DISTANCE, modes_to_try, try_update
from dist_train.training.step.train_step import Step
from dist_train.training.step_trace import StepTrace
from support.processes import DIST_TRAIN
from support.ranks import run_forked
from support.run_files import assert_equal, train_losses
from support.user_nets import Drawing
from support.user_sets import mnist_part

BATCH, STEPS = 32, 20


def new_step(world: World, net: nn.Module, **settings: Any) -> Step:
    """A step on real MNIST with one_cycle, so that a constant lr would be noticed."""
    config = parse_config({"global_batch_size": BATCH, "device": "cpu", **settings})
    train = mnist_part(train=True)
    plan = BatchPlan.of(config, 1)
    batches = training_batches(train, ShardSampler(len(train), plan, 0, 0), config.data, world.device, 0)
    weights = class_weights(config, train, 10, world.device)
    rate = LearningRate(config.optimizer.lr, STEPS, "one_cycle")
    return Step(config, world, net, batches, plan, rate, loss=loss_of(net, config, weights))


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    """Remove compiled code after each test."""
    yield
    torch.compiler.reset()


def net_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def trained(step: Step, mode: Any, steps: int = STEPS) -> tuple[list[float], Tensor]:
    """Return the loss of each step, and all final weights."""
    step.warm_up(0, mode)
    assert step.mode == mode
    losses = []
    for number in range(steps):
        step.take(number)
        losses.append(step.pop_window()["loss"] / BATCH)
    return losses, torch.cat([parameter.detach().flatten() for parameter in step.evaluated_net.parameters()])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mlp", {"optimizer": {"lr": 1e-2, "weight_decay": 0.01}, "max_grad_norm": 0.5, "ema_decay": 0.9,
                 "data": {"augment": {"shift": 2, "flip": True}}}),
        ("bks", {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True}}),  # dropout
        (
            "guide",
            {
                "optimizer": {"name": "adamw", "amsgrad": True},
                "label_smoothing": 0.1,
                "class_weights": [float(number % 4) for number in range(10)],
                "ignore_index": 3,
            },
        ),
        (
            "mlp",
            {
                "optimizer": {
                    "name": "sgd",
                    "lr": 0.02,
                    "layer_decay": 0.3,
                    "groups": [{"match": "fc2.bias", "lr_factor": 9}],
                }
            },
        ),
        ("guide", {"optimizer": {"name": "rmsprop", "momentum": 0.5, "centered": True}}),
        ("guide", {"optimizer": {"name": "adadelta", "lr": 1.0}, "label_smoothing": 0.1, "data": {"augment": {
            "scale": [0.3, 1], "flip": "alternate", "brightness": 0.4, "contrast": 0.4, "cutout": 9, "mixup_alpha": 0.4,
            "cutmix_alpha": 1,
        }}}),
    ],
    ids=["mlp-adam", "bks-sgd", "guide-adamw-weighted", "mlp-groups", "guide-rmsprop", "guide-adadelta-augmented"],
)  # fmt: skip
def test_compiled_equals_eager(world: World, name: str, settings: dict[str, Any]) -> None:
    """Losses within 1e-5, with equal dropout masks; the gradient norm is that of the same step."""
    steps = [new_step(world, net_of(name), **settings) for _ in range(2)]
    (losses, weights), (fast_losses, fast_weights) = trained(steps[0], "eager"), trained(steps[1], "compile")
    assert losses == pytest.approx(fast_losses, rel=1e-5)
    assert losses[-1] < losses[0]
    assert (weights - fast_weights).norm() / weights.norm() < 1e-4
    assert steps[0].grad_norm() == pytest.approx(steps[1].grad_norm(), rel=1e-3)


def losses_with_traces(step: Step, mode: StepMode, folder: Path, *traced: str) -> list[list[float]]:
    """Return the losses of eight steps, done again for each of `traced`, the steps to trace in `folder`."""
    step.warm_up(0, mode)
    assert step.mode == mode
    step.take(0)  # creates the optimizer's state
    losses: list[list[float]] = []
    for steps in traced:
        trace = StepTrace(ProfiledSteps.parse(steps), RunDir(folder), rank=0)
        step.pop_window()
        losses.append([])
        with mode_selection.unchanged(step.eager.state()):
            for number in range(8):
                if trace.turns_at(number):
                    trace.end(number)
                    trace.begin(number)
                step.take(number)
                losses[-1].append(step.pop_window()["loss"])
    return losses


@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_trace_changes_no_loss(mode: StepMode, world: World, tmp_path: Path) -> None:
    step = new_step(
        world, net_of("mlp"), optimizer={"lr": 1e-2, "weight_decay": 0.01}, max_grad_norm=0.5, ema_decay=0.9
    )
    traced, plain = losses_with_traces(step, mode, tmp_path, "3 steps from 2", "1 steps from 99")
    assert traced == plain
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "rank_00000_steps_3-5.json.gz"
    assert ("Torch-Compiled Region" in gzip.decompress(trace.read_bytes()).decode()) == (mode == "compile")


def freezing_step(world: World) -> Step:
    """A step whose first layer is frozen until step 4."""
    step = new_step(
        world, net_of("mlp"), optimizer={"name": "adamw", "lr": 1e-2, "weight_decay": 0.1}, max_grad_norm=0.5
    )
    step.frozen = Frozen(step.net, ["fc1"], until=4)
    return step


def take_eight(step: Step, mode: StepMode) -> dict[str, Any]:
    """Take 8 steps; check that the first layer moves from the fifth on. Return the state before that."""
    fc1: Any = step.net.fc1
    before, kept = fc1.weight.detach().clone(), {}
    step.warm_up(0, mode)
    for number in range(8):
        if number == step.unfreezes_at:
            assert torch.equal(fc1.weight, before)
            kept = deepcopy(step.state_dict())
            step.warm_up(number, step.chosen_mode)
        step.take(number)
    assert step.mode == mode
    assert not torch.equal(fc1.weight, before)
    return kept


def distance(one: Step, other: Step) -> float:
    """Return the distance of the weights, relative to their size."""
    weights, others = (torch.cat([each.detach().flatten() for each in step.net.parameters()]) for step in (one, other))
    return float((weights - others).norm() / weights.norm())


def test_compiled_equals_eager_before_and_after_unfreezing(world: World) -> None:
    """The update is compiled again, in the mode that was chosen; weight decay moves no frozen weight."""
    eager, compiled, resumed = (freezing_step(world) for _ in range(3))
    take_eight(eager, "eager")
    kept = take_eight(compiled, "compile")
    assert distance(eager, compiled) < 1e-4
    resumed.load_state_dict(kept)
    resumed.warm_up(4, "compile")
    for number in range(4, 8):
        resumed.take(number)
    assert equal(snapshot(resumed), snapshot(compiled))


def test_mode_that_fails_after_unfreezing_is_left(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    step = new_step(world, net_of("mlp"))
    step.frozen = Frozen(step.net, ["fc1"], until=1)
    monkeypatch.setattr(chosen_update, "prepare", lambda eager, _mode, _step: lambda number: eager(number))
    step.warm_up(0, "compile")
    assert step.mode == "compile"
    monkeypatch.setattr(chosen_update, "unsupported_reason", lambda *_given: "a reason")
    step.warm_up(1, step.chosen_mode)
    assert (step.mode, step.chosen_mode) == ("eager", "compile")


def test_trying_mode_leaves_no_trace(world: World) -> None:
    """Neither a mode that is used nor one that is not; a resumed optimizer keeps its state."""
    fresh = new_step(world, net_of("mlp"))
    before = snapshot(fresh)
    fresh.warm_up(0, "compile")
    assert fresh.mode == "compile"
    assert equal(snapshot(fresh) | {"optimizer": None}, before | {"optimizer": None})
    for number in range(3):
        fresh.take(number)

    resumed = new_step(world, net_of("mlp"))
    resumed.load_state_dict(deepcopy(fresh.state_dict()))
    before = snapshot(resumed)
    resumed.warm_up(3, "compile")
    assert resumed.mode == "compile"
    assert equal(snapshot(resumed), before)
    for step in (fresh, resumed):
        step.take(3)
    assert equal(snapshot(fresh), snapshot(resumed))

    refused = new_step(world, Waiting())
    before = snapshot(refused)
    refused.warm_up(0, "compile")
    assert refused.mode == "eager"
    assert equal(snapshot(refused), before)
    groups, plain = (each.state_dict()["optimizer"]["param_groups"] for each in (refused, new_step(world, Waiting())))
    assert groups == [plain[0] | {"lr": groups[0]["lr"]}]


def snapshot(step: Step) -> dict[str, Any]:
    state = step.state_dict()
    optimizer = {k: {n: v.clone() for n, v in s.items()} for k, s in state["optimizer"]["state"].items()}
    return {
        "net": {k: v.clone() for k, v in state["net"].items()},
        "window": state["window"].clone(),
        "optimizer": optimizer,
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


class Waiting(Mlp):
    """Reads a value: the host waits for the device."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images * 0.5 if images.mean().item() > 1e6 else images)


class Counting(Mlp):
    """Computes something different at each call, depending on Python state only."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(images) * (1 + 0.1 * (self.calls % 2))


class Broken(Mlp):
    """Correct in eager mode; compiled it is a different net, as with a compiler bug."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (2.0 if torch.compiler.is_compiling() else 1.0)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Waiting, "data-dependent"),
        (Drawing, "Unsupported"),
        (Counting, "Recompile"),
        (Broken, "differ from the eager ones"),
    ],
    ids=["Waiting", "Drawing", "Counting", "Broken"],
)
def test_net_that_cannot_be_compiled_stays_eager(
    world: World, net: Callable[[], nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It logs a line, and has the numbers of a run without a trial."""
    torch.manual_seed(0)
    tried, plain = new_step(world, net()), None
    torch.manual_seed(0)
    plain = new_step(world, net())
    with caplog.at_level(logging.INFO, logger="dist_train"):
        tried.warm_up(0, "compile")
    assert tried.mode == "eager"
    assert "step_mode=compile: keeps the eager update: " in caplog.text
    assert reason in caplog.text
    plain.warm_up(0, "eager")
    if net is not Counting:  # the calls in the trial count
        for step in (tried, plain):
            for number in range(5):
                step.take(number)
        assert equal(snapshot(tried), snapshot(plain))


def test_wrong_update_is_rejected() -> None:
    """Each fault that a faster form could have, in a trial of gradient descent with momentum."""
    weights, momentum, sums = torch.ones(4), torch.zeros(4), torch.zeros(1)
    state = [weights, momentum, sums]

    def descend(step: int, lr: float = 0.1, decay: float = 0.9, count: int = 1, rounding: float = 0.0) -> None:
        momentum.mul_(decay).add_(weights * (1 + rounding))
        weights.sub_(momentum, alpha=lr / (step + 1))
        sums.add_(count)

    def tried(fast: Callable[..., None], rounding: float = 1e-7, **fault: float) -> float:
        perturbed = partial(descend, rounding=rounding)
        _, result = try_update(descend, perturbed, lambda: partial(fast, **fault), state, 5, lambda: None)
        assert torch.equal(weights, torch.ones(4))
        assert not momentum.any()
        assert not sums.any()
        assert bool(result.rejection_reason(must_be_faster=False)) == (not result.distance <= result.allowed)
        assert result.allowed == MAX_DISTANCE or rounding > 1e-3
        return result.distance / result.allowed

    assert tried(descend) == 0
    assert tried(descend, lr=0.1 + 1e-6) < 0.01
    assert tried(descend, lr=0.101) > 1  # a fault of 1 %
    assert tried(descend, decay=0.85) > 1  # visible from the second step on
    assert tried(lambda step: None) == pytest.approx(1 / MAX_DISTANCE)
    assert tried(lambda step: descend(5)) > 1  # the first learning rate forever
    assert tried(descend, count=0) > 1
    assert tried(descend, lr=float("nan")) == float("inf")
    # If rounding alone has a larger effect, twice that effect is accepted, three times is not.
    assert tried(partial(descend, rounding=0.019), rounding=0.01) < 1
    assert tried(partial(descend, rounding=0.03), rounding=0.01) > 1


def test_auto_tries_only_modes_that_can_pay_off() -> None:
    assert modes_to_try("cpu", 1_000, 0.5e-3) == []
    assert modes_to_try("cpu", 500_000, 0.5e-3) == ["compile"]
    assert modes_to_try("cuda", 10_000, 0.5e-3) == []
    assert modes_to_try("cuda", 100_000, 0.5e-3) == ["graph"]
    assert modes_to_try("cuda", 10**7, 0.5e-3) == ["compile", "graph"]
    assert modes_to_try("mps", 10**9, 1.0) == []


def test_auto_measures_and_logs_times(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured seconds are faked: on a busy machine either mode may be the faster one."""
    measured = iter([2e-3, 1e-3])
    monkeypatch.setattr(mode_selection, "median_time", lambda *_: next(measured))
    step = new_step(world, net_of("guide"))
    step.eager.learning_rate = LearningRate(1e-3, 10**6)
    with caplog.at_level(logging.INFO, logger="dist_train"):
        step.warm_up(0, "auto")
    assert step.mode == "compile"
    assert "1.000 ms per step, eager 2.000 ms" in caplog.text
    assert "s to prepare" in caplog.text


@pytest.mark.parametrize(
    ("settings", "world_size", "reason"),
    [
        (["step_mode=graph"], 1, "a CUDA graph needs a CUDA device, this is cpu"),
        (["data.resident=false"], 1, "the data is streamed"),
        (["optimizer.momentum=0.9", "optimizer.name=sgd", "optimizer.dampening=0.1"], 1, "dampening"),
        (["ddp.find_unused_parameters=true"], 2, "some parameters may have no gradient"),
        (["model.name=speedrun"], 2, "each forward changes "),
    ],
)
def test_unsupported_mode_falls_back_to_eager_with_reason(
    settings: list[str], world_size: int, reason: str, tmp_path: Path
) -> None:
    short = ["step_mode=compile", "train_for=3 steps", "eval_every=0", "final_train_eval=false"]
    done = run_forked([*DIST_TRAIN, "train", "-c", "smoke", "--run-name", "r", *short, *settings], tmp_path, world_size)
    assert done.returncode == 0, done.stderr
    assert reason in done.stdout + done.stderr
    assert json.loads((tmp_path / "runs/r/run.json").read_text())["step_mode"] == "eager"


def test_missing_compiler_falls_back_to_eager(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    step = new_step(world, net_of("mlp"))
    step.warm_up(0, "compile")
    assert step.mode == "eager"
    assert "there is no C++ compiler" in caplog.text


def test_resumed_run_keeps_its_mode(tmp_path: Path) -> None:
    """With auto too; a stopped and resumed run has the numbers of the uninterrupted run."""
    settings = ["train_for=40 steps", "log_every=1", "eval_every=0", "final_train_eval=false", "save_every=20 steps"]
    command = [*DIST_TRAIN, "train", "-c", "smoke", *settings]
    whole = run_forked([*command, "--run-name", "whole", "step_mode=compile"], tmp_path)
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(tmp_path / "runs/whole", tmp_path / "runs/cut", symlinks=True)
    shutil.rmtree(tmp_path / "runs/cut/checkpoints/step_00000040")
    (tmp_path / "runs/cut/result.json").unlink()
    (tmp_path / "runs/cut/status.json").write_text(json.dumps({"state": "INTERRUPT", "attempt": 1}))
    resumed = run_forked([*command, "--run-name", "cut", "-v"], tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 20" in resumed.stdout
    assert "step_mode=compile:" in resumed.stdout
    assert json.loads((tmp_path / "runs/cut/run.json").read_text())["step_mode"] == "compile"
    assert "not bit-identical" not in resumed.stdout + resumed.stderr
    assert train_losses(tmp_path / "runs/cut") == train_losses(tmp_path / "runs/whole")


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_step_of_its_own_stays_eager_and_keeps_its_first_state(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A trial of another mode would set it to zero, or take steps from it."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(chosen_update, "modes_to_try", lambda *_: ["compile"])
    name = "support.user_optimizers:Anchored"
    step = new_step(world, net_of("mlp"), optimizer={"name": name, "lr": 0.1})
    optimizer = step.eager.optimizer
    before = deepcopy(optimizer.state_dict())
    step.warm_up(0, "auto")
    assert_equal(optimizer.state_dict(), before)
    assert [line for line in caplog.messages if "step_mode" in line] == [
        f"step_mode=auto: eager, since optimizer.name={name} takes its own step"
    ]
    for number in range(2):
        step.take(number)
    assert optimizer.param_groups[0]["taken"] == 2
    assert {int(state["count"]) for state in optimizer.state.values()} == {2}


def test_step_of_its_own_that_fails_is_named(world: World) -> None:
    """Here a frozen weight, which has no gradient."""
    net = net_of("mlp")
    assert isinstance(net, Mlp)
    net.fc1.requires_grad_(False)
    step = new_step(world, net, optimizer={"name": "support.user_optimizers:Undecayed"})
    step.warm_up(4)
    why = r"optimizer\.name=support.user_optimizers:Undecayed fails at step 5: .*user_optimizers\.py:\d+: TypeError"
    with pytest.raises(UserCodeError, match=why):
        step.take(4)


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("mode", ["graph", "compile"])
def test_each_mode_equals_eager_on_gpu(mode: str, precision: str, process_state: None) -> None:
    world = World.join(parse_config({"device": "cuda", "mixed_precision": precision}))
    for name in ("mlp", "bks", "conv") if mode == "graph" else ("mlp",):
        steps = [new_step(world, net_of(name), max_grad_norm=1.0, ema_decay=0.9) for _ in range(2)]
        (losses, weights), (fast_losses, fast_weights) = trained(steps[0], "eager"), trained(steps[1], mode)
        assert losses == pytest.approx(fast_losses, rel=1e-4 if precision == "no" else 0.05)
        assert (weights - fast_weights).norm() / weights.norm() < (1e-2 if precision == "no" else 0.1)


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "graph", "compile"])
def test_trace_shows_kernels_on_gpu(mode: StepMode, process_state: None, tmp_path: Path) -> None:
    """Also a second trace of a process, after the first one has ended."""
    step = new_step(World.join(parse_config({"device": "cuda"})), net_of("mlp"), ema_decay=0.9)
    windows = ("3 steps from 2", "2 steps from 4", "1 steps from 99")
    first, second, plain = losses_with_traces(step, mode, tmp_path, *windows)
    assert first == pytest.approx(plain, rel=1e-4)
    assert second == pytest.approx(plain, rel=1e-4)
    traces = [gzip.decompress(path.read_bytes()).decode() for path in (tmp_path / "profile").iterdir()]
    assert ['"cat": "kernel"' in trace for trace in traces] == [True, True]


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["graph", "compile"])
def test_each_mode_equals_eager_after_unfreezing_on_gpu(mode: StepMode, process_state: None) -> None:
    world = World.join(parse_config({"device": "cuda"}))
    eager, fast = freezing_step(world), freezing_step(world)
    take_eight(eager, "eager")
    take_eight(fast, mode)
    assert distance(eager, fast) < 1e-2


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("net", "reason"),
    [(Waiting, "which waits for the device"), (Counting, "changes calls"), (Drawing, "random numbers on the host")],
    ids=["Waiting", "Counting", "Drawing"],
)
def test_net_that_cannot_be_captured_stays_eager_on_gpu(
    net: Callable[[], nn.Module], reason: str, process_state: None, caplog: pytest.LogCaptureFixture
) -> None:
    step = new_step(World.join(parse_config({"device": "cuda"})), net())
    step.warm_up(0, "graph")
    assert step.mode == "eager"
    assert reason in caplog.text
    step.take(0)
    assert step.is_finite()
