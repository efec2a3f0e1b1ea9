"""Pictures of a net's mistakes: for any data set, or none; a failure never affects the run."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dist_train.atomic_files import read_json
from dist_train.data.sets.image_set import Examples, ImageSet
from dist_train.models.tasks.confusion import Mistake
from dist_train.runs.directory import RunDir
from dist_train.runs.reports import charts
from dist_train.training.final_evaluation import FinalEvaluation
from dist_train.training.pictures import Pictures
from support.ranks import run_on_ranks, train_here, train_on_ranks

SETTINGS: dict[str, Any] = {
    "data": {"name": "support.user_sets:mnist_part"}, "global_batch_size": 96, "train_for": "6 steps", "device": "cpu",
    "final_train_eval": False, "tracking": {"wandb": "disabled"},
}  # fmt: skip


def drawn(examples: Examples | None, run_dir: RunDir) -> dict[str, bytes]:
    counts = torch.tensor([[3, 1], [0, 0]])
    metrics: dict[str, Any] = {"val/accuracy": 0.75}
    final = FinalEvaluation(metrics, "val", examples, ["cat", "dog"], counts, [Mistake(1, 0, 1, 0.9)])
    return pictures_of(final, run_dir)


def pictures_of(final: FinalEvaluation, run_dir: RunDir) -> dict[str, bytes]:
    pictures = Pictures(run_dir)
    pictures.begin()
    return pictures.finish(final)


def grey(count: int) -> ImageSet:
    return ImageSet(torch.arange(count * 4, dtype=torch.uint8).view(count, 1, 2, 2), torch.zeros(count).long(), ("a",))


@pytest.mark.parametrize(
    ("examples", "is_picture"),
    [
        (grey(2), True),
        ([(torch.rand(3, 5, 4) * 9 - 4, 0)] * 2, True),  # the output of a transform, not square
        ([(torch.zeros(1, 3, 3), 0)] * 2, True),  # without any contrast
        ([(torch.rand(7, 3, 3), 0)] * 2, False),
        ([(torch.rand(12), 0)] * 2, False),
        ([("text", 0)] * 2, False),
        ([{"image": torch.zeros(1, 3, 3)}] * 2, False),
        ([(torch.tensor([[[0, 30000], [-30000, 9]]], dtype=torch.int16), 0)] * 2, True),
        ([(torch.tensor([[[True, False]]]), 0)] * 2, True),
        (None, False),
    ],
)
def test_only_images_are_drawn(examples: Any, is_picture: bool, run_dir: RunDir) -> None:
    pictures = drawn(examples, run_dir)
    assert pictures.keys() == {"curves", "confusion"} | ({"mistakes"} if is_picture else set())
    for picture in pictures.values():
        with Image.open(io.BytesIO(picture)) as image:
            assert image.format == "PNG"
            assert min(image.size) > 200


def test_pixels_of_any_dtype_are_scaled_for_display(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(charts, "mistakes", lambda images, *_: shown.extend(images))
    image = torch.tensor([[[-30000, 0, 30000]]], dtype=torch.int16)
    for each in (image, image / 7):
        examples: Any = [(each, 0)] * 2
        drawn(examples, run_dir)
    assert len(shown) == 2
    for pixels in shown:
        assert pixels.tolist() == [[0, pytest.approx(127, abs=1), pytest.approx(255, abs=1)]]


def test_unreadable_example_loses_only_its_picture(run_dir: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            raise OSError("gone")

    assert drawn(Broken(), run_dir).keys() == {"curves", "confusion"}  # type: ignore[arg-type]
    assert caplog.messages == ["no picture of the mistakes: gone"]
    assert {path.name for path in run_dir.pictures.iterdir()} == {"curves.png", "confusion.png"}


def test_non_classifier_draws_only_curves(run_dir: RunDir) -> None:
    assert pictures_of(FinalEvaluation({"val/loss": 1.0}, "val", None, [], None, []), run_dir).keys() == {"curves"}


@pytest.mark.parametrize("classes", [2, 21, 100, 1000])
def test_confusion_matrix_of_many_classes_stays_viewable(classes: int) -> None:
    """With many classes, counts and then names are omitted: the picture keeps a viewable size."""
    counts = torch.eye(classes, dtype=torch.int64).tolist()
    names = [f"$a_long$ name \\frac of ${number}" for number in range(classes)]
    with Image.open(io.BytesIO(charts.confusion_matrix(counts, [1.0] * classes, names, "title"))) as image:
        assert max(image.size) < 2500


def test_figure_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`savefig` draws all of it twice."""
    drawn: list[Figure] = []
    draw = Figure.draw

    def counted_draw(self: Figure, renderer: Any) -> None:
        drawn.append(self)
        draw(self, renderer)

    monkeypatch.setattr(Figure, "draw", counted_draw)
    charts.confusion_matrix([[2, 1], [0, 3]], [2 / 3, 1.0], ["cat", "dog"], "title")
    assert len(drawn) == 1


def test_mistakes_are_shown_whole_and_side_by_side() -> None:
    """In true proportion, one pixel of a small picture as a square; none is covered by another or by text."""
    red = np.full((40, 20, 3), (255, 0, 0), np.uint8)
    wide = np.full((250, 500, 3), (0, 0, 255), np.uint8)
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    shown = [red, wide, grey, *[wide] * 4]
    png = charts.mistakes(shown, [("cat", "dog", 0.9)] * len(shown), "title")
    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image).reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(1).sum() == 206 * 103
    assert (pixels == (0, 0, 255)).all(1).sum() == 5 * 206 * 103
    assert (pixels == (100, 100, 100)).all(1).sum() >= 103 * 103


def test_curves_are_drawn_while_the_final_evaluation_runs(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = threading.Event(), threading.Event()

    def slow(*_: Any) -> bytes:
        began.set()
        assert go_on.wait(30)
        return b"png"

    monkeypatch.setattr(charts, "learning_curves", slow)
    pictures = Pictures(run_dir)
    pictures.begin()
    assert began.wait(30)
    go_on.set()
    assert pictures.finish(FinalEvaluation({"val/loss": 1.0}, "val", None, [], None, [])) == {"curves": b"png"}


def without_matplotlib(run_dir: Path) -> None:
    sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]
    assert train_here(SETTINGS | {"tracking": {"wandb": "disabled", "pictures": True}}, run_dir) == "FINISHED"


def test_run_finishes_without_matplotlib(tmp_path: Path) -> None:
    run_on_ranks(without_matplotlib, tmp_path / "r", world_size=1)
    assert (tmp_path / "r/result.json").exists()
    assert not (tmp_path / "r/pictures").exists()
    log = (tmp_path / "r/logs/rank_00000.log").read_text()
    assert 'no picture of the curves: Pictures need matplotlib: pip install "dist-train[plot]".' in log


def test_pictures_are_equal_for_any_world_size(tmp_path: Path) -> None:
    """In float64, where rounding does not differ visibly between world sizes."""
    settings = SETTINGS | {"dtype": "float64", "tracking": {"wandb": "disabled", "pictures": True}}
    pixels: list[Tensor] = []
    for world_size in (1, 3):
        run_dir = tmp_path / str(world_size) / "r"
        train_on_ranks(settings, run_dir, world_size)
        with Image.open(run_dir / "pictures/mistakes.png") as image:
            pixels.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8))
    assert torch.equal(*pixels)
    results = [read_json(tmp_path / f"{world_size}/r/result.json") for world_size in (1, 3)]
    assert results[0]["test/accuracy_by_class"] == results[1]["test/accuracy_by_class"]
