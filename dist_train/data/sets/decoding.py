"""From an image file to a square of pixels: decoded as a viewer shows it, resized, and center-cropped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.nn.functional import interpolate

from dist_train.config.data import Decoder
from dist_train.errors import DataError

_UPRIGHT = 1  # the EXIF orientation
_TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEEP_MODES = ("I", "F")  # more than 8 bits per pixel: PIL would clip the values, not scale them


def decode(
    path: Path,
    image_size: int,
    decoder: Decoder,
    channels: int = 3,
    transforms: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Decode an image to uint8 [C, S, S] with 3 channels (RGB) or 1 (greyscale).

    `transforms` change the picture, uint8 [C, H, W], before it is resized. Pixels of the decoders differ by at most one
    level.

    Raises:
        DataError: the image cannot be read, or would lose information.
    """
    pixels = _read_jpeg(path) if decoder == "simplejpeg" and channels == 3 else None
    if pixels is None:
        pixels = _read_image(path, "RGB" if channels == 3 else "L")
    return _square(pixels if transforms is None else transforms(pixels), image_size)


def _read_image(path: Path, mode: str) -> Tensor:
    try:
        with Image.open(path) as image:
            if image.mode.split(";")[0] in _DEEP_MODES:
                raise DataError(f"{path} has more than 8 bits per pixel (mode {image.mode}). Convert it to 8 bits.")
            shown = _as_shown(image)
            return _to_pixels(np.array(shown if shown.mode == mode else shown.convert(mode)))
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"There is no image {path}.") from None
    except Exception as error:  # PIL raises many types, depending on the format
        raise DataError(f"{path} is not a valid image: {error}. Repair or remove it.") from None


def _read_jpeg(path: Path) -> Tensor | None:
    """Return the pixels of an upright JPEG, uint8 [3, H, W]; None for all other files, which PIL reads or refuses."""
    from simplejpeg import decode_jpeg

    with suppress(Exception), Image.open(path) as header:  # PIL reads the pixels later, if at all
        if header.format == "JPEG" and header.mode in ("RGB", "L") and _orientation(header) == _UPRIGHT:
            return _to_pixels(decode_jpeg(path.read_bytes()))
    return None


def _to_pixels(array: npt.NDArray[np.uint8]) -> Tensor:
    """Return [H, W, C] or [H, W] as a view [C, H, W]: torch resizes pixels in this order in the least time."""
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def _square(pixels: Tensor, image_size: int) -> Tensor:
    """Resize and center-crop as torchvision does. On a CPU with AVX2 torch takes half of PIL's time."""
    height, width = (image_size * side // min(pixels.shape[1:]) for side in pixels.shape[1:])
    top, left = round((height - image_size) / 2), round((width - image_size) / 2)
    resized = interpolate(pixels[None], (height, width), mode="bilinear", antialias=True)[0]
    kept = resized[:, top : top + image_size, left : left + image_size]
    return torch.from_numpy(np.ascontiguousarray(kept.numpy()))  # numpy copies in half of torch's time


def _as_shown(image: Image.Image) -> Image.Image:
    """Return the image as a viewer shows it: upright, on a white background."""
    image.load()
    transpose = _TRANSPOSE_BY_ORIENTATION.get(_orientation(image))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image if transpose is None else image.transpose(transpose)


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # viewers also show images with broken EXIF data
        return int(image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT))
    return _UPRIGHT
