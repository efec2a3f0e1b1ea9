"""Export of a trained net to an ONNX file that includes the normalisation."""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

from dist_train.atomic_files import write_atomically
from dist_train.errors import DistTrainError, RunDirError, UserCodeError
from dist_train.inference.export import DYNAMIC_BATCH, program_of
from dist_train.inference.trained_net import TrainedNet, logits_of
from dist_train.models.tasks.confusion import class_names

_TOLERANCE = 1e-4  # of a logit, relative to the largest one if that is above 1
_BATCH_SIZES = (1, 2, 17)  # that are compared


def export_onnx(saved: TrainedNet, out: Path) -> float | None:
    """Write an ONNX file: uint8 `images` [B, C, S, S] to `logits` [B, K], for any B.

    Its metadata holds the names of the K `classes` as a JSON list. Returns the largest difference between a logit in
    onnxruntime and one in torch, None without onnxruntime.

    Raises:
        DistTrainError: onnx is not installed.
        RunDirError: `out` exists already or cannot be written.
        UserCodeError: the net cannot be exported, or has other logits in onnxruntime.
    """
    if any(find_spec(name) is None for name in ("onnx", "onnxscript")):
        raise DistTrainError('--format onnx needs onnx: pip install "dist-train[onnx]".')
    if out.exists():
        raise RunDirError(f"{out} exists already. Choose another name.")
    program, num_classes = program_of(saved)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's exporter warns of itself
            exported = torch.onnx.export(
                program, input_names=["images"], output_names=["logits"],
                dynamic_shapes=DYNAMIC_BATCH, verbose=False,
            )  # fmt: skip
        assert exported is not None
        exported.model.metadata_props["classes"] = json.dumps(class_names(saved.classes, num_classes))
        content = exported.model_proto.SerializeToString()
    except Exception as error:  # torch may raise any exception for a user's net
        raise UserCodeError(f"ONNX cannot hold {type(saved.net).__name__}: {_reason(error)}") from error
    difference = _largest_difference(saved, content) if find_spec("onnxruntime") else None
    try:
        write_atomically(out, content)
    except OSError as error:
        raise RunDirError(f"{out} cannot be written: {error}.") from None
    return difference


def _reason(error: BaseException) -> str:
    """Return the first line of the error that all others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0]


def _largest_difference(saved: TrainedNet, content: bytes) -> float:
    import onnxruntime

    name = type(saved.net).__name__
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch_size in _BATCH_SIZES:
        shape = (batch_size, saved.in_channels, saved.image_size, saved.image_size)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        expected = logits_of(saved, images)
        try:
            session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
            (found,) = session.run(["logits"], {"images": images.numpy()})
        except Exception as error:  # its errors have no class of their own
            raise UserCodeError(f"onnxruntime cannot run {name} on {batch_size} images: {_reason(error)}") from error
        difference = float((torch.from_numpy(found) - expected).abs().max())
        if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
            raise UserCodeError(
                f"{name} has other logits in onnxruntime: for {batch_size} random images they differ from torch's by "
                f"{difference:.2g}, more than {_TOLERANCE:g}. Nothing was written; --format torch can hold it."
            )
        largest = max(largest, difference)
    return largest
