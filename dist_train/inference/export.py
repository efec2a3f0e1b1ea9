"""Export of a trained net: its weights and a torch.export program that includes the normalisation."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from dist_train.atomic_files import atomic_write
from dist_train.checkpoints.contents import MODEL
from dist_train.checkpoints.saved_net import SavedNet
from dist_train.checkpoints.weights import read_weights
from dist_train.errors import RunDirError, UserCodeError
from dist_train.inference.trained_net import TrainedNet, logits_of
from dist_train.models.tasks.confusion import class_names

PROGRAM = "model.pt2"
DYNAMIC_BATCH = {"images": {0: Dim("batch")}}  # any number of images

# The load.py of an exported folder.
_LOADER = """\
from pathlib import Path

import torch

net = torch.export.load(Path(__file__).with_name("{program}")).module()
images = torch.zeros(1, {channels}, {size}, {size}, dtype=torch.uint8)  # your images, any number
logits = net(images)  # {logits}
"""
_ANSWER = {
    "classification": """classes = {classes}
print([classes[index] for index in logits.argmax(dim=1).tolist()])
""",
    "multi_label": """labels = {classes}
print([[label for label, logit in zip(labels, row) if logit > 0] for row in logits.tolist()])
""",
    "regression": """print(logits.tolist())  # the numbers
""",
}


def export_weights(run: Path, which: str, out: Path) -> Path:
    """Write the weights of checkpoint `which` as `torch.save` does: a state dict. The net itself is not built.

    Raises:
        CheckpointError: the run or checkpoint does not exist.
        RunDirError: `out` exists already or cannot be written.
    """
    if out.exists():
        raise RunDirError(f"{out} exists already. Choose another name.")
    folder = SavedNet.find(run, which).folder
    try:
        with atomic_write(out) as aside:
            torch.save(read_weights(folder / MODEL), aside)
    except (OSError, RuntimeError) as error:  # RuntimeError is from torch's writer
        raise RunDirError(f"{out} cannot be written: {error}.") from None
    return out


def export(saved: TrainedNet, out: Path) -> list[Path]:
    """Write the weights, a torch.export program that includes the normalisation, and a script that loads it.

    Raises:
        RunDirError: `out` exists already or cannot be written.
        UserCodeError: the net cannot be exported.
    """
    if out.exists():
        raise RunDirError(f"{out} exists already. Give the path of a new folder.")
    program, num_classes = program_of(saved)
    text = (_LOADER + _ANSWER[saved.config.task]).format(
        program=PROGRAM, channels=saved.in_channels, size=saved.image_size, logits=f"float [B, {num_classes}]",
        classes=class_names(saved.classes, num_classes),
    )  # fmt: skip
    try:
        with atomic_write(out) as aside:
            aside.mkdir(parents=True)
            shutil.copyfile(saved.folder / MODEL, aside / MODEL)
            torch.export.save(program, aside / PROGRAM)
            (aside / "load.py").write_text(text)
    except (OSError, RuntimeError) as error:  # RuntimeError is from torch's writer
        raise RunDirError(f"{out} cannot be written: {error}.") from None
    return [out / name for name in (MODEL, PROGRAM, "load.py")]


def program_of(saved: TrainedNet) -> tuple[ExportedProgram, int]:
    """Return the net with its normalisation as a program, uint8 `images` [B, C, S, S] to logits [B, K], and K.

    Raises:
        UserCodeError: the net is no classifier, or cannot be exported.
    """
    example = torch.zeros(2, saved.in_channels, saved.image_size, saved.image_size, dtype=torch.uint8)
    num_classes = logits_of(saved, example).shape[1]
    try:
        program = torch.export.export(saved.on_pixels, (example,), dynamic_shapes=DYNAMIC_BATCH)
    except Exception as error:  # torch may raise any exception for a user's net
        reason = str(error).strip().split("\n")[0]
        raise UserCodeError(f"torch.export cannot export {type(saved.net).__name__}: {reason}") from error
    return program, num_classes
