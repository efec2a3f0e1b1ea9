"""Data sets: the bundled MNIST, torchvision's by name, folders of pictures, the user's own."""

from dist_train.data.catalog import available_sets
from dist_train.data.download import fetch
from dist_train.data.image_set import Examples, ImageSet, num_examples, part_of
from dist_train.data.settings import check_settings
from dist_train.data.splits import Splits, check_there, load_splits

__all__ = [
    "Examples",
    "ImageSet",
    "Splits",
    "available_sets",
    "check_settings",
    "check_there",
    "fetch",
    "load_splits",
    "num_examples",
    "part_of",
]
