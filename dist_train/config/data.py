"""The settings of the data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dist_train.config.augment import AugmentConfig, NamedTransform
from dist_train.config.section import Section
from dist_train.config.values import FilePath, MayChange, Options

Decoder = Literal["pil", "simplejpeg"]


class Normalize(Section):
    """Normalisation of pixels x (0 to 255): (x / 255 - mean) / std."""

    mean: list[float]  # one number per channel, on the scale 0 to 1
    std: list[PositiveFloat]  # one number per channel

    @model_validator(mode="after")
    def _same_channels(self) -> Normalize:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std {len(self.std)}; give both the same number")
        return self


class DataConfig(Section):
    # A data set listed by `dist-train data ls`, `image_folder`, or your own class as `package.module:Name`.
    name: str = "mnist"
    bundle: FilePath | None = None  # BK.Synapse user code, used instead of `name`: folder or zip with bks_dataset.py
    # Folder of the data. None: $DIST_TRAIN_DATA_DIR, else the folder dist_train in the user's cache folder.
    root: Annotated[FilePath | None, MayChange] = None
    # A validation set of its own: the loader's val split, else its test split, else its training split, read from
    # this folder instead of `root`. The training set's own val split is not used; its test split stays the test split.
    val_root: Annotated[FilePath | None, MayChange] = None
    # Another loader for the validation set, as `bundle`: its UserValDataset, else its UserDataset, which reads
    # `val_root`, else `root`.
    val_bundle: FilePath | None = None
    split: str | None = None  # for emnist only: balanced, byclass, bymerge, digits, letters or mnist
    image_size: PositiveInt | None = None  # for image_folder only: pixels per side of the resized square images
    # What reads the images of image_folder. simplejpeg: JPEGs in less time, and all others by PIL. Pixels differ by at
    # most one level. It needs the extra `jpeg`.
    decoder: Decoder = "pil"
    # Training examples held out for validation; not with a validation set of its own. 0: validate on `val_root` or
    # `val_bundle`, else on the set's own val split, else on its test split.
    val_examples: NonNegativeInt = 0
    # How an epoch chooses its examples. shuffled: each at most once. balanced: drawn with replacement, every class
    # equally likely.
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    # Draw with replacement in proportion to these weights: a .npy file or a text file with one number >= 0 per example
    # of the training set, in its order, those held out for validation included.
    sample_weights: FilePath | None = None
    normalize: Normalize | None = None  # None: pixels / 255 only
    augment: AugmentConfig | None = None  # random changes of training images; None: no changes
    # torchvision's transforms of each training image as it is loaded, before `augment`: names, or names with arguments,
    # such as [RandomResizedCrop, {RandAugment: {magnitude: 5}}].
    transforms: list[NamedTransform] = []
    # Also evaluate the mean output over views of each image, as accuracy_tta. flip: it and its mirror image. shift: it
    # also moved by a pixel along the diagonal, each way. flip_shift: both. None: accuracy alone.
    tta: Annotated[Literal["flip", "shift", "flip_shift"] | None, MayChange] = None
    # Worker processes per rank that load a streamed data set. 0: the training process loads it.
    num_workers: Annotated[int, Field(ge=0, le=1024), MayChange] = 0
    # Keep the whole data set in device memory instead of streaming it. None: if that is possible and it fits. For a
    # data set of your own None is false; true makes each example twice before training, and both must be equal.
    resident: Annotated[bool | None, MayChange] = None
    args: Options = {}  # keyword arguments of your own class: data.args.KEY=VALUE
