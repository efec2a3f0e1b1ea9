"""A disk that is full or read-only for a while does not end a training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_train.errors import RunDirError

_log = logging.getLogger(__name__)


class DiskErrors:
    """Reports each file that cannot be written once, until it can be written again."""

    def __init__(self) -> None:
        self._unwritable: set[Path] = set()

    @contextmanager
    def tolerated(self, path: Path, *, required: bool = False) -> Iterator[None]:
        """Log an OSError of the block, which writes `path`. The next write tries again.

        Raises:
            RunDirError: the file cannot be written and is `required`.
        """
        try:
            yield
        except OSError as error:
            if required:
                raise RunDirError(f"{path} cannot be written: {error.strerror}. Make room, then start again.") from None
            if path not in self._unwritable:
                _log.warning(
                    "%s cannot be written: %s. Training continues; the next write tries again.", path, error.strerror
                )
            self._unwritable.add(path)
        else:
            self._unwritable.discard(path)
