"""The net of a run's checkpoint, without its data set: to predict with, and to take elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.atomic_files import whole
from dist_train.checkpoints.manifest import MODEL
from dist_train.checkpoints.storage import load_weights
from dist_train.config.schema import Config
from dist_train.data.sets.image_folder import decode
from dist_train.data.splits import load_splits
from dist_train.data.transforms import Pixels
from dist_train.errors import DataError, RunDirError, UserCodeError
from dist_train.inference.evaluate_run import find_trained
from dist_train.models.registry import build_model
from dist_train.models.tasks.confusion import class_names
from dist_train.runs.directory import RunDir

_AT_ONCE = 256  # pictures
_CPU = torch.device("cpu")
PROGRAM = "model.pt2"
# What the folder of an export says of itself.
_LOADER = """\
from pathlib import Path

import torch

net = torch.export.load(Path(__file__).with_name("{program}")).module()
images = torch.zeros(1, {channels}, {size}, {size}, dtype=torch.uint8)  # yours, as many as you like
logits = net(images)  # {logits}
classes = {classes}
print([classes[index] for index in logits.argmax(dim=1).tolist()])
"""


@dataclass(frozen=True)
class SavedNet:
    """A net in eval mode on the CPU, and what it wants and gives."""

    config: Config
    folder: Path  # of its checkpoint
    net: nn.Module
    in_channels: int
    image_size: int
    classes: tuple[str, ...] | None

    @classmethod
    def open(cls, path: Path, which: str) -> SavedNet:
        """Of checkpoint `which` (last, best or a step) of a run.

        Raises:
            CheckpointError: no such run or checkpoint.
            DataError: it was not trained on square images of so many pixels.
        """
        config, folder = find_trained(path, which)
        # A run of an older version has not noted it down.
        facts = RunDir(path).read_facts().get("data") or load_splits(config.data, config.seed).facts
        if not facts["pixels"] or facts["in_channels"] not in (1, 3) or not facts["image_size"]:
            raise DataError(
                f"{path} was trained on {config.data.bundle or config.data.name}: inputs of its own making, or no "
                f"square pictures. Only nets for square pictures of 1 or 3 channels can be used without their data."
            )
        net = build_model(config.model, {name: facts[name] for name in ("in_channels", "num_classes", "image_size")}, 0)
        load_weights(net, folder)
        classes = facts["classes"]
        return cls(config, folder, net.eval(), facts["in_channels"], facts["image_size"],
                   tuple(classes) if classes else None)  # fmt: skip

    @property
    def on_pixels(self) -> nn.Module:
        """uint8 [B, C, S, S] -> what the net gives; the normalisation is in it."""
        return _OnPixels(self.net, Pixels(self.config.data.normalize, _CPU)).eval()


@dataclass(frozen=True)
class Prediction:
    image: Path
    classes: list[str]  # the most probable first
    probabilities: list[float]


def predict(saved: SavedNet, images: Sequence[Path], *, invert: bool = False, count: int = 3) -> Iterator[Prediction]:
    """What each picture shows. It is turned to the set's colours and size; `invert`: dark on bright, unlike the set's.

    Raises:
        DataError: a file is no picture.
        UserCodeError: the net gives something else than logits [B, K].
    """
    for start in range(0, len(images), _AT_ONCE):
        paths = images[start : start + _AT_ONCE]
        pixels = torch.stack([decode(path, saved.image_size, saved.in_channels) for path in paths])
        logits = _logits_of(saved, 255 - pixels if invert else pixels)
        names = class_names(saved.classes, logits.shape[1])
        best = logits.softmax(dim=1).topk(min(count, logits.shape[1]))
        for path, indices, values in zip(paths, best.indices, best.values, strict=True):
            yield Prediction(path, [names[index] for index in indices.tolist()], values.tolist())


def export(saved: SavedNet, out: Path) -> list[Path]:
    """Weights, the net as a program of torch.export with the normalisation in it, and how to load that.

    Raises:
        RunDirError: the folder exists already, or cannot be written.
        UserCodeError: the net cannot be exported.
    """
    if out.exists():
        raise RunDirError(f"{out} exists already. Name a folder that is yet to be made.")
    size, channels = saved.image_size, saved.in_channels
    example = torch.zeros(2, channels, size, size, dtype=torch.uint8)
    shape = list(_logits_of(saved, example).shape)
    try:
        program = torch.export.export(
            saved.on_pixels, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
        )
    except Exception as error:  # whatever torch finds to say of a user's net
        reason = str(error).strip().split("\n")[0]
        raise UserCodeError(f"torch.export cannot export {type(saved.net).__name__}: {reason}") from error
    text = _LOADER.format(
        program=PROGRAM, channels=channels, size=size, logits=f"float [B, {shape[1]}]",
        classes=class_names(saved.classes, shape[1]),
    )  # fmt: skip
    try:
        with whole(out) as aside:
            aside.mkdir(parents=True)
            shutil.copyfile(saved.folder / MODEL, aside / MODEL)
            torch.export.save(program, aside / PROGRAM)
            (aside / "load.py").write_text(text)
    except (OSError, RuntimeError) as error:  # the latter by torch's writer
        raise RunDirError(f"{out} cannot be written: {error}.") from None
    return [out / name for name in (MODEL, PROGRAM, "load.py")]


@torch.no_grad()
def _logits_of(saved: SavedNet, pixels: Tensor) -> Tensor:
    output: Any = saved.on_pixels(pixels)
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < 2:
        raise UserCodeError(f"{type(saved.net).__name__} does not give logits [B, K > 1]: it is no classifier.")
    return output


class _OnPixels(nn.Module):
    scale: Tensor
    shift: Tensor

    def __init__(self, net: nn.Module, pixels: Pixels) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("scale", pixels.scale)
        self.register_buffer("shift", pixels.shift)

    def forward(self, images: Tensor) -> Any:
        return self.net(images.to(self.scale.dtype) * self.scale - self.shift)
