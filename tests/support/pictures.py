"""Image files with random pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

_NUMBERS = np.random.default_rng(0)


def picture(path: Path, size: tuple[int, int] = (9, 7), mode: str = "RGB") -> Path:
    """Write an image of `size` (width, height); the suffix of `path` decides the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": (3,), "RGBA": (4,), "CMYK": (4,), "L": ()}[mode]
    pixels = _NUMBERS.integers(0, 256, (*reversed(size), *channels), dtype=np.uint8)
    Image.fromarray(pixels, mode if mode == "CMYK" else None).save(path)
    return path
