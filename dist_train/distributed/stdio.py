"""Output of this process: it survives a closed terminal or pipe, and can be redirected to a file."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO


class _TolerantStream:
    """A stream that discards its output once the reader is gone (a closed terminal, `| head`)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._redirect_to_devnull()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._redirect_to_devnull()

    def _redirect_to_devnull(self) -> None:
        """Redirect the descriptor itself, so that buffered text and output of C libraries go there too."""
        with suppress(OSError, ValueError):
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self._stream.fileno())
            os.close(devnull)


def tolerate_closed_stdio() -> None:
    """Make all later prints of this process succeed, also those of libraries and user code."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for characters that the terminal's encoding lacks
        if stream is None:  # the process was started with a closed descriptor
            stream = Path(os.devnull).open("w")  # noqa: SIM115 (open until the process ends)
        setattr(sys, name, _TolerantStream(stream))


def redirect_output(path: Path) -> TextIO:
    """Append all later output of this process, also that of C code, to `path`.

    Returns a stream to the former stderr.
    """
    before = os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1, errors="replace")
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    os.close(file)
    return before
