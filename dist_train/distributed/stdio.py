"""What a process prints: it outlives the terminal or pipe it prints to, and may go to a file of its own."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO


class _TolerantStream:
    """A stream whose other end may go away (a closed terminal, `| head`): from then on it leads nowhere."""

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
        """The descriptor itself, so that what is still buffered, and what libraries print from C, goes there too."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def tolerate_closed_stdio() -> None:
    """From now on no print of this process fails, of whatever library or user code."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the terminal's encoding lacks
        if stream is None:  # started with the descriptor closed
            stream = Path(os.devnull).open("w")  # noqa: SIM115 (open as long as the process is)
        setattr(sys, name, _TolerantStream(stream))


def redirect_output(path: Path) -> TextIO:
    """From now on what this process prints, from C too, goes to the end of `path`.

    Returns a stream to where its errors went before.
    """
    before = os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1, errors="replace")
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    os.close(file)
    return before
