"""Uploads in parts that survive broken lines: the core of the tus 1.0 protocol, with creation and termination.

The state of an upload is its part file: as many bytes as it has were received. Beside it is what was announced.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import anyio
from anyio.to_thread import run_sync
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from dist_train.atomic_files import read_json, write_json
from dist_train.user_code.library import library_root
from dist_train.web import format
from dist_train.web.site import whole_number
from dist_train.web.this_machine import free_bytes

KEPT_S = 3 * 86_400.0  # since the last byte
AT_ONCE = 16
IDLE_S = 30.0  # a line over which nothing comes for so long is taken to be broken
_BLOCK = 1 << 20  # bytes in memory, and in one write
_DRAINED = 16 << 20  # bytes of a refused request that are read: a browser shows no answer before it has sent all
_SPARE = 1 << 30  # bytes that stay free
_ID = re.compile(r"[0-9a-f]{32}")
_VERSION = {"tus-resumable": "1.0.0"}
_OFFERED = {"tus-version": "1.0.0", "tus-extension": "creation,termination"}


class Uploads:
    """Handlers of the addresses below /uploads."""

    def __init__(self) -> None:
        self._active = 0  # requests that send bytes
        self._remove_old()

    def path_of(self, name: str) -> Path:
        """Return the file of a complete upload.

        Raises:
            HTTPException: there is none of that name, or bytes are missing.
        """
        path, length, _ = self._find(name)
        size = path.stat().st_size
        if size != length:
            raise _refused(409, f"The upload has {size} of {length} bytes only. Finish it first.")
        return path

    def remove(self, path: Path) -> None:
        """Remove an upload: first what announces it, so that none is found without its bytes."""
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def options(self, _request: Request) -> Response:
        return Response(status_code=204, headers=_OFFERED | _VERSION)

    def create(self, request: Request) -> Response:
        _check_version(request)
        length = whole_number(request.headers.get("upload-length", ""))
        if length is None:
            raise _refused(400, "Upload-Length must be the number of bytes.")
        self._remove_old()
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        free, needed = free_bytes(folder), 2 * length + _SPARE
        if free is not None and free < needed:
            raise _refused(
                507,
                f"It needs {format.size(needed)}: twice its {format.size(length)} until it is unpacked, and "
                f"{format.size(_SPARE)} to spare. {format.size(free)} are free in {folder.parent}.",
            )
        name = uuid4().hex
        (folder / f"{name}.part").touch(exist_ok=False)
        announced = {"length": length, "metadata": request.headers.get("upload-metadata", "")}
        write_json(folder / f"{name}.json", announced, durable=False)
        return Response(status_code=201, headers=_VERSION | {"location": f"uploads/{name}", "upload-offset": "0"})

    def look(self, request: Request) -> Response:
        _check_version(request)
        path, length, metadata = self._find(request.path_params["upload"])
        headers = {"upload-offset": str(path.stat().st_size), "upload-length": str(length)}
        return Response(headers=_VERSION | headers | ({"upload-metadata": metadata} if metadata else {}))

    def terminate(self, request: Request) -> Response:
        _check_version(request)
        path, _, _ = self._find(request.path_params["upload"])
        with _locked(path):
            self.remove(path)
        return Response(status_code=204, headers=_VERSION)

    async def append(self, request: Request) -> Response:
        """Append the bytes of a request, as far as they come."""
        body = _Body(request)
        if self._active >= AT_ONCE:
            raise _refused(503, f"{AT_ONCE} uploads are being received already. Try again in a moment.")
        self._active += 1
        try:
            offset = await self._append(request, body)
        except HTTPException:
            await body.drain()
            raise
        finally:
            self._active -= 1
        return Response(status_code=204, headers=_VERSION | {"upload-offset": str(offset)})

    async def _append(self, request: Request, body: _Body) -> int:
        _check_version(request)
        if request.headers.get("content-type") != "application/offset+octet-stream":
            raise _refused(415, "The content type must be application/offset+octet-stream.")
        path, length, _ = self._find(request.path_params["upload"])
        with _locked(path) as descriptor:
            size = os.fstat(descriptor).st_size
            if whole_number(request.headers.get("upload-offset", "")) != size:
                raise _refused(409, f"The upload goes on at byte {size}.")
            announced = whole_number(request.headers.get("content-length", "")) or 0
            while not body.ended:
                if size + max(announced, len(block := await body.read())) > length:
                    raise _refused(413, f"The upload was announced with {length} bytes.")
                announced = 0
                try:
                    await run_sync(_write, descriptor, block, size)
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    raise _refused(507, f"The disk of {path.parent} is full. Free some space, then go on.") from None
                size += len(block)
        return size

    def _find(self, name: str) -> tuple[Path, int, str]:
        """Return the part file of an upload, its announced length and its metadata."""
        path = _folder() / f"{name}.part"
        announced = read_json(path.with_suffix(".json")) if _ID.fullmatch(name) else {}
        if not isinstance(announced.get("length"), int) or not path.is_file():
            raise _refused(404, "There is no such upload, or not any more. Begin it again.")
        return path, announced["length"], str(announced.get("metadata", ""))

    def _remove_old(self) -> None:
        with suppress(OSError):
            for path in _folder().iterdir():
                if path.suffix != ".json" and time.time() - path.stat().st_mtime > KEPT_S:
                    self.remove(path)


class _Body:
    """The body of a request, read in blocks. A line that breaks, or over which nothing comes, is its end."""

    def __init__(self, request: Request) -> None:
        self._receive = request.receive
        self.ended = False

    async def read(self) -> bytes:
        """Return the next bytes: a block, or as many as came before the end."""
        block = bytearray()
        while len(block) < _BLOCK and not self.ended:
            block += await self._next()
        return bytes(block)

    async def drain(self) -> None:
        """Read on without keeping anything, so that a browser comes to read the answer."""
        drained = 0
        while not self.ended and drained < _DRAINED:
            drained += len(await self._next())

    async def _next(self) -> bytes:
        message: Message = {"type": "http.disconnect"}
        with anyio.move_on_after(IDLE_S):
            message = await self._receive()
        self.ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
        content: bytes = message.get("body", b"")
        return content


def _folder() -> Path:
    return library_root() / ".uploads"


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold the lock of a part file, and yield its descriptor."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise _refused(404, "The upload is gone. Begin it again.") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refused(423, "Another tab or program is sending this upload.") from None
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, block: bytes, offset: int) -> None:
    """Write a block whole, or leave the file as it was."""
    written = 0
    try:
        while written < len(block):
            written += os.pwrite(descriptor, block[written:], offset + written)
    except OSError:
        os.ftruncate(descriptor, offset)
        raise


def _check_version(request: Request) -> None:
    if request.headers.get("tus-resumable") != _VERSION["tus-resumable"]:
        raise _refused(412, "The header Tus-Resumable must be 1.0.0.")


def _refused(status: int, message: str) -> HTTPException:
    return HTTPException(status, message, _VERSION | ({"tus-version": "1.0.0"} if status == 412 else {}))
