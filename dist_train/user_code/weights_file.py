"""A file of weights beside a model: .pth, .safetensors, or a zip with `model.pth`. It is never unpickled here."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from dist_train.atomic_files import remove
from dist_train.errors import UserCodeError
from dist_train.user_code.archives import unpack
from dist_train.user_code.contents import Limits

_SUFFIXES = (".pth", ".pt", ".safetensors")


@dataclass(frozen=True)
class KeptWeights:
    name: str
    digest: str  # sha256, in hex


def keep_weights(source: Path, folder: Path) -> KeptWeights:
    """Copy weights to `folder` as weights.pth or weights.safetensors, whichever they are by their first bytes.

    Raises:
        UserCodeError: they are neither, nor a zip with one such file.
        OSError: they cannot be read or not be written.
    """
    suffix = _suffix(source)
    if suffix is None:
        unpacked = folder / "unpacked"
        limits = Limits(shutil.disk_usage(folder).free, 100, "Pack model.pth alone.")
        try:
            unpack(source, unpacked, "The zip of weights", limits)
            found = [path for path in unpacked.rglob("*") if path.suffix in _SUFFIXES and "__MACOSX" not in path.parts]
            suffix = _suffix(found[0]) if len(found) == 1 else None
            if suffix is None:
                raise UserCodeError("The zip of weights must hold one file, model.pth, as torch.save wrote it.")
            found[0].replace(folder / f"weights{suffix}")
        finally:
            remove(unpacked)
    else:
        shutil.copyfile(source, folder / f"weights{suffix}")
    with (folder / f"weights{suffix}").open("rb") as file:
        return KeptWeights(f"weights{suffix}", hashlib.file_digest(file, "sha256").hexdigest())


def _suffix(path: Path) -> str | None:
    """Return what a file is by its first bytes; None for a zip that is not torch's.

    Raises:
        UserCodeError: it is none of these.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
        return ".pth" if name.endswith(b"data.pkl") else None  # torch writes this entry first
    if head[:1] == b"\x80":  # a pickle, as torch.save wrote before version 1.6
        return ".pth"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return ".safetensors"
    raise UserCodeError("The weights are neither a .pth file of torch.save, nor .safetensors, nor a zip of one.")
