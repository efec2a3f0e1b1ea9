"""Views of an image over which evaluation takes the mean of a net's outputs: test-time augmentation."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def other_views(images: Tensor, kind: str) -> list[tuple[float, Tensor]]:
    """Return views of [B, C, H, W] besides the images themselves, with their weights in the mean.

    flip: mirrored left and right. shift: moved by a pixel up and left, and down and right, where the edge is repeated;
    what is not moved has half of the weight. flip_shift: all of them mirrored too.
    """
    views = [(1.0, images)]
    if kind != "flip":
        height, width = images.shape[2:]
        padded = pad(images, [1] * 4, "replicate")
        moved = [padded[:, :, start : start + height, start : start + width] for start in (2, 0)]
        views = [(0.5, images), *((0.25, each) for each in moved)]
    if kind != "shift":
        views = [(weight / 2, view) for weight, each in views for view in (each, each.flip(-1))]
    return views[1:]
