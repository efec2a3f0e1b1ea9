"""Use of a trained net without its data set and without this package."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor, nn

from dist_train.atomic_files import read_json, write_json
from dist_train.cli import main
from dist_train.config.loading import parse_config
from dist_train.config.paths import default_data_root
from dist_train.data.sets.image_set import ImageSet
from dist_train.data.sets.named_sets import load_named
from dist_train.distributed.world import World
from dist_train.errors import UserCodeError
from dist_train.inference.onnx_file import export_onnx
from dist_train.inference.trained_net import TrainedNet
from dist_train.inference.trained_net import logits_of as logits_in_torch
from dist_train.models.tasks.confusion import Confusion, accuracy_by_class, class_names
from support.processes import DIST_TRAIN
from support.ranks import join_group, run_forked, run_on_ranks
from support.trainings import SETTINGS, trained_once


@pytest.fixture(scope="module")
def test_set() -> ImageSet:
    return load_named("mnist", default_data_root(), None)[1]


@pytest.fixture(scope="module", params=["conv", "speedrun"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with dropout and with BatchNorm, trained until most digits are right."""

    settings = [f"model.name={request.param}", "train_for=60 steps", "optimizer.lr=1e-2", "global_batch_size=128"]
    return trained_once(tmp_path_factory, f"trained {request.param}", [*SETTINGS, *settings])


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@torch.no_grad()
def logits_of(path: Path, images: Tensor) -> Tensor:
    """Compute the logits with the net and the normalisation formula."""
    saved = TrainedNet.open(path, "last")
    normalize = saved.config.data.normalize
    mean, std = (normalize.mean[0], normalize.std[0]) if normalize else (0.0, 1.0)
    return torch.cat([saved.net((part.float() / 255 - mean) / std) for part in images.split(256)])


def test_predict_agrees_with_evaluate(trained: Path, test_set: ImageSet, tmp_path: Path) -> None:
    """They agree on twenty images, and on the accuracy of one digit."""
    for index in range(20):
        Image.fromarray(test_set.images[index, 0].numpy()).save(tmp_path / f"{index:02}.png")
    result = call("predict", trained, *sorted(tmp_path.glob("*.png")), "--json")
    assert result.exit_code == 0, result.output
    found = [json.loads(line)["classes"] for line in result.output.splitlines()]
    expected = logits_of(trained, test_set.images[:20]).softmax(1)
    assert [next(iter(each)) for each in found] == [str(int(row.argmax())) for row in expected]
    for each, row in zip(found, expected, strict=True):
        assert len(each) == 3
        assert [*each.values()] == pytest.approx([float(row[int(name)]) for name in each], abs=1e-6)

    counted = json.loads(run_forked([*DIST_TRAIN, "evaluate", str(trained), "--json"], tmp_path).stdout)
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    predicted = logits_of(trained, test_set.images).argmax(1)
    confusion.index_put_((test_set.labels, predicted), torch.ones(1, dtype=torch.int64), accumulate=True)
    assert counted["confusion"] == confusion.tolist()
    assert counted["accuracy"] == confusion.diagonal().sum() / 10_000
    assert counted["accuracy_by_class"][3] == pytest.approx(float(confusion[3, 3] / confusion[3].sum()))


def test_images_are_converted_to_format_of_net(trained: Path, test_set: ImageSet, tmp_path: Path) -> None:
    """The image is larger, RGB, inverted, a JPEG, and not square."""
    index = next(i for i, row in enumerate(logits_of(trained, test_set.images[:50]).softmax(1)) if row.max() > 0.9)
    small = Image.fromarray(test_set.images[index, 0].numpy())
    small.save(tmp_path / "small.png")
    on_paper = Image.eval(small.resize((280, 280)).convert("RGB"), lambda value: 255 - value)
    wide = Image.new("RGB", (400, 280), "white")
    wide.paste(on_paper, (60, 0))
    wide.save(tmp_path / "wide.jpg", quality=95)
    first, second = (
        call("predict", trained, tmp_path / name, *options).output.split(": ")[1].split()[0]
        for name, options in (("small.png", ()), ("wide.jpg", ("--invert",)))
    )
    assert first == second


def test_invalid_images_are_named(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no")
    for name in ("x.png", "missing.png"):
        result = call("predict", trained, tmp_path / name)
        assert result.exit_code == 1
        assert name in result.output
    assert "There is no image" in result.output


USE = """
import sys, torch
sys.modules["dist_train"] = None
text = open("load.py").read()
__file__ = "load.py"
for count in sys.argv[1:]:
    read = f"images = torch.load('images_{count}.pt')"
    exec("\\n".join(read if line.startswith("images = ") else line for line in text.splitlines()))
    torch.save(logits, f"logits_{count}.pt")
    assert classes == list("0123456789")
"""


def test_export_needs_only_torch(trained: Path, test_set: ImageSet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call("export", trained, out)
    assert result.exit_code == 0, result.output
    counts = (1, 7, 64)  # any batch size works
    for count in counts:
        torch.save(test_set.images[:count], out / f"images_{count}.pt")
    subprocess.run([sys.executable, "-I", "-c", USE, *map(str, counts)], cwd=out, check=True)
    for count in counts:
        logits = torch.load(out / f"logits_{count}.pt")
        torch.testing.assert_close(logits, logits_of(trained, test_set.images[:count]), atol=1e-5, rtol=1e-5)
    unchanged = subprocess.run([sys.executable, out / "load.py"], capture_output=True, text=True, check=True).stdout
    assert unchanged.strip()[1:-1].strip("'") in set("0123456789")
    assert (out / "model.safetensors").read_bytes() == (trained / "checkpoints/last/model.safetensors").read_bytes()
    again = call("export", trained, out)
    assert again.exit_code == 1
    assert "exists already" in again.output


def test_export_to_onnx(trained: Path, test_set: ImageSet, tmp_path: Path) -> None:
    """The file alone has the net's logits for uint8 images, any number of them, and the names of its classes."""
    out = tmp_path / "net.onnx"
    result = call("export", trained, out)
    assert result.exit_code == 0, result.output
    assert f"written: {out} (logits as torch's to" in result.output
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    for count in (1, 2, 17):
        images = test_set.images[:count]
        (logits,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), logits_of(trained, images), atol=1e-4, rtol=0)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list("0123456789")
    assert [*tmp_path.iterdir()] == [out]
    again = call("export", trained, out, "--format", "onnx")
    assert again.exit_code == 1
    assert "exists already" in again.output


class _Bessel(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = torch.special.bessel_j0(images.flatten(1)[:, :10])
        return logits


def test_onnx_file_that_is_not_the_net_is_not_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reason is one line: no such operation, other logits, no onnx. Without onnxruntime nothing is compared."""
    saved, out = TrainedNet.open(trained, "last"), tmp_path / "net.onnx"
    with pytest.raises(UserCodeError, match=r"^ONNX cannot hold _Bessel: No ONNX function found .*bessel_j0.*$"):
        export_onnx(replace(saved, net=_Bessel()), out)
    with monkeypatch.context() as patch:
        patch.setattr(
            "dist_train.inference.onnx_file.logits_of", lambda net, images: logits_in_torch(net, images) + 0.01
        )
        with pytest.raises(
            UserCodeError, match=r"^\w+ has other logits in onnxruntime: for 1 random images .* 0\.01.*$"
        ):
            export_onnx(saved, out)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        assert 'pip install "dist-train[onnx]"' in call("export", trained, out).output
    assert not out.exists()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export_onnx(saved, out) is None
    assert out.exists()


def test_run_is_found_by_name(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is the one that `runs ls` prints."""
    monkeypatch.setenv("DIST_TRAIN_RUNS_DIR", str(trained.parent))
    for command in (("runs", "show"), ("runs", "tail"), ("runs", "compare"), ("evaluate",), ("train", "--resume")):
        result = run_forked([*DIST_TRAIN, *command, trained.name], tmp_path, DIST_TRAIN_RUNS_DIR=str(trained.parent))
        assert result.returncode == 0, (command, result.stderr)
    assert "is not running: FINISHED" in call("runs", "stop", trained.name).output
    missing = call("runs", "stop", "no-such-run")
    assert "no-such-run is not a run" in missing.output


def test_data_set_is_not_needed(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with only the run suffices; a run of an older version needs its data set."""
    saved = TrainedNet.open(trained, "last")
    assert (saved.in_channels, saved.image_size, saved.classes) == (1, 28, tuple("0123456789"))
    facts = read_json(trained / "run.json")
    write_json(trained / "run.json", {name: value for name, value in facts.items() if name != "data"})
    try:
        assert TrainedNet.open(trained, "last").classes == saved.classes
        monkeypatch.setattr("dist_train.checkpoints.saved_net.load_splits", None)
        with pytest.raises(TypeError):
            TrainedNet.open(trained, "last")
    finally:
        write_json(trained / "run.json", facts)
    assert TrainedNet.open(trained, "last").classes == saved.classes


# --- confusion matrix --------------------------------------------------------------------------------------------


def confusion_on_ranks() -> None:
    join_group("confusion")
    world = World.join(parse_config({"device": "cpu"}))
    confusion = Confusion(most_mistakes=3)
    sure = torch.tensor([1.0, 1.0, 2.0, 1.0, 3.0, 1.0])
    logits, labels = torch.eye(3)[[0, 1, 2, 2, 0, 1]] * sure[:, None], torch.tensor([0, 1, 1, 2, 2, 0])
    if world.rank < 2:  # one rank has no examples
        mine = torch.arange(world.rank, 6, 2)
        for rows in (mine[:1], mine[1:]):
            confusion.add(logits[rows], labels[rows], rows)
    total = confusion.total(world)
    assert total is not None
    assert total.tolist() == [[1, 1, 0], [0, 1, 1], [1, 0, 1]]
    assert Confusion().total(world) is None
    mistakes = confusion.mistakes(world)
    assert [(each.index, each.label, each.prediction) for each in mistakes] == [(4, 2, 0), (2, 1, 2), (5, 0, 1)]
    assert mistakes[0].probability == pytest.approx(math.exp(3) / (math.exp(3) + 2))


def test_confusion_is_summed_over_ranks() -> None:
    run_on_ranks(confusion_on_ranks, world_size=3)


def test_labels_outside_classes_are_ignored(world: World) -> None:
    """Such labels occur with a net's own loss; labels of narrow integer types do not overflow."""
    confusion = Confusion(most_mistakes=9)
    logits = torch.eye(20)[[19, 18, 0, 0]]
    confusion.add(logits, torch.tensor([19, 19, 200, 0], dtype=torch.uint8), torch.arange(4))
    confusion.add(logits[:1], torch.tensor([-100]), torch.tensor([4]))
    total = confusion.total(world)
    assert total is not None
    assert int(total.sum()) == 3
    assert total[19, 19] == total[19, 18] == total[0, 0] == 1
    assert [each.index for each in confusion.mistakes(world)] == [1]


def test_outputs_without_single_prediction_are_not_mistakes(world: World) -> None:
    """NaN outputs and several per example are counted, but not shown as mistakes."""
    confusion = Confusion(most_mistakes=1)
    confusion.add(torch.tensor([[float("nan")] * 2, [0.0, 1.0]]), torch.tensor([1, 0]), torch.arange(2))
    confusion.add(torch.eye(2), torch.tensor([1, 0]), torch.arange(1))
    assert [each.index for each in confusion.mistakes(world)] == [1]


def test_class_names_are_used_only_if_their_number_matches() -> None:
    assert class_names(("a", "b"), 2) == ["a", "b"]
    assert class_names(("a", "b"), 3) == class_names(None, 3) == class_names(("a", "b", "a"), 3) == ["0", "1", "2"]


def test_accuracy_by_class() -> None:
    assert accuracy_by_class(torch.tensor([[3, 1], [0, 0]])) == [0.75, None]
