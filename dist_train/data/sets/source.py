"""Where examples come from: a set known by name or a user's loader, and the folder that it reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dist_train.config.data import DataConfig
from dist_train.config.paths import default_data_root
from dist_train.data.sets.bundle import load_dataset_bundle
from dist_train.data.sets.folder_splits import load_image_folder, split_folders
from dist_train.data.sets.image_set import Examples
from dist_train.data.sets.named_sets import load_named
from dist_train.data.sets.split_choice import Choice, all_but_val, every_split, one_to_validate
from dist_train.data.sets.user_sets import check_takes_root, load_user_sets
from dist_train.user_code.bundles import check_bundle
from dist_train.user_code.importing import check_object


@dataclass(frozen=True)
class Source:
    config: DataConfig  # its bundle and root are those of the source
    choose: Choice
    own: tuple[str, ...] = ()  # of a validation set of its own: which of "bundle" and "root" training does not share

    @classmethod
    def of_training(cls, config: DataConfig) -> Source:
        return cls(config, every_split if cls.of_validation(config) is None else all_but_val)

    @classmethod
    def of_validation(cls, config: DataConfig) -> Source | None:
        """Return the source of the validation set that data.val_bundle and data.val_root name; None without them."""
        paths = {"bundle": config.val_bundle, "root": config.val_root}
        own = {name: path for name, path in paths.items() if path is not None}
        return cls(config.model_copy(update=own), one_to_validate, tuple(own)) if own else None

    @property
    def root(self) -> Path:
        return (self.config.root or default_data_root()).expanduser().absolute()

    @property
    def place(self) -> tuple[Path, Path | None]:
        """The folder and the loader: the same for each way to write their paths."""
        bundle = self.config.bundle
        return self.root.resolve(), bundle.expanduser().resolve() if bundle is not None else None

    def __str__(self) -> str:
        """The settings of a validation set of its own, as a user writes them."""
        return " ".join(f"{self._setting(name)}={getattr(self.config, name)}" for name in self.own)

    def _setting(self, name: str) -> str:
        return f"data.val_{name}" if name in self.own else f"data.{name}"

    def check(self) -> None:
        """Check that the source exists, as far as possible without reading it; user code as in `check_object`.

        Raises:
            ConfigError, DataError, UserCodeError: see `load_splits`.
        """
        config = self.config
        if config.bundle is not None:
            names = ("UserValDataset", "UserDataset") if self.own else ("UserDataset",)
            check_bundle(config.bundle, "bks_dataset.py", self._setting("bundle"), *names)
        elif ":" in config.name:
            check_object(config.name)
        elif config.image_size is not None:
            split_folders(self.root, self.choose, self._setting("root"))

    def load(self, ranks_per_node: int) -> dict[str, Examples]:
        """Return the chosen splits.

        Raises:
            ConfigError, DataError, UserCodeError: see `load_splits`.
        """
        config, root = self.config, self.root
        if config.bundle is not None:
            return load_dataset_bundle(config.bundle, root, self.choose, self._setting("bundle"), self._setting("root"))
        if ":" in config.name:
            if self.own:
                check_takes_root(config.name, config.args, str(self))
            return load_user_sets(config.name, root, config.args, self.choose)
        if config.image_size is not None:
            folders = split_folders(root, self.choose, self._setting("root"))
            resident = False if config.transforms else config.resident
            return load_image_folder(folders, config.image_size, config.decoder, resident, ranks_per_node)
        train_set, test_set = load_named(config.name, root, config.split)
        halves = {"train": train_set, "test": test_set}
        return {split: halves[split] for split in self.choose(halves)}

    def name_of(self, split: str) -> str:
        """Return the name of a split for messages."""
        if self.config.bundle is not None:
            return "UserValDataset" if split == "val" else "UserDataset"
        if self.config.image_size is not None:
            return f"{split}/"
        return f"{self.config.name}(split='val')" if split == "val" else f"the {split} split"
