"""From an image file to a square of pixels: decoded as a viewer shows it, resized, and center-cropped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
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

    `transforms` change the picture, uint8 [C, H, W], before it is resized. The decoders differ by at most one level of
    a pixel: each rounds in its own way.

    Raises:
        DataError: the image cannot be read, or would lose information.
    """
    pixels = _read_jpeg(path) if decoder == "simplejpeg" and channels == 3 else None
    picture = _read_image(path, "RGB" if channels == 3 else "L") if pixels is None else pixels
    if transforms is not None:
        picture = transforms(_to_pixels(picture))
    resize = _resize_by_pil if decoder == "pil" else _resize_by_torch
    return resize(picture, image_size)


def _read_image(path: Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            if image.mode.split(";")[0] in _DEEP_MODES:
                raise DataError(f"{path} has more than 8 bits per pixel (mode {image.mode}). Convert it to 8 bits.")
            shown = _as_shown(image)
            return shown if shown.mode == mode else shown.convert(mode)
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
            return torch.from_numpy(decode_jpeg(path.read_bytes())).permute(2, 0, 1)
    return None


def _resize_by_pil(picture: Image.Image | Tensor, image_size: int) -> Tensor:
    """Resize only the square that is kept."""
    image = picture if isinstance(picture, Image.Image) else _to_image(picture)
    width, height, left, top = _geometry(*image.size, image_size)
    across, down = image.width / width, image.height / height  # pixels of the picture per pixel of the square
    box = (left * across, top * down, (left + image_size) * across, (top + image_size) * down)
    # PIL antialiases when it downscales.
    return _contiguous(_to_pixels(image.resize((image_size, image_size), Image.Resampling.BILINEAR, box)))


def _resize_by_torch(picture: Image.Image | Tensor, image_size: int) -> Tensor:
    """Resize the whole picture, as torch takes no box, and crop it."""
    pixels = _to_pixels(picture)
    width, height, left, top = _geometry(pixels.shape[2], pixels.shape[1], image_size)
    resized = interpolate(pixels[None], (height, width), mode="bilinear", antialias=True)[0]
    return _contiguous(resized[:, top : top + image_size, left : left + image_size])


def _geometry(width: int, height: int, image_size: int) -> tuple[int, int, int, int]:
    """Return width and height of the resized picture, and left and top of the square in it, as torchvision does."""
    short = min(width, height)
    width, height = image_size * width // short, image_size * height // short
    return width, height, round((width - image_size) / 2), round((height - image_size) / 2)


def _to_pixels(picture: Image.Image | Tensor) -> Tensor:
    """Return a picture as uint8 [C, H, W], of an image in channels-last order: torch resizes that fastest."""
    if isinstance(picture, Tensor):
        return picture
    return torch.from_numpy(np.array(picture)).view(picture.height, picture.width, -1).permute(2, 0, 1)


def _contiguous(pixels: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.numpy()))  # numpy reorders pixels in half of torch's time


def _to_image(pixels: Tensor) -> Image.Image:
    """Return uint8 [C, H, W] as an RGB or greyscale image."""
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array if len(pixels) == 3 else array[:, :, 0])


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
