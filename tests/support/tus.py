"""A client of the page's uploads that can break its line at any byte."""

from __future__ import annotations

import http.client
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

VERSION = {"tus-resumable": "1.0.0"}
PATCH = {**VERSION, "content-type": "application/offset+octet-stream"}


@dataclass
class Tus:
    """Speaks to a server at `port` of this machine with the token in a header, as curl does."""

    port: int
    token: str

    def ask(
        self, method: str, path: str, headers: dict[str, str], body: bytes | Iterable[bytes] | None = None
    ) -> http.client.HTTPResponse:
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        line.request(method, path, body, {"Authorization": f"token {self.token}", **headers}, encode_chunked=False)
        answer = line.getresponse()
        answer.read()
        line.close()
        return answer

    def create(self, length: int) -> str:
        """Return the address of a new upload."""
        answer = self.ask("POST", "/uploads", {**VERSION, "Upload-Length": str(length)})
        assert answer.status == 201, answer.reason
        return f"/{answer.headers['Location']}"

    def offset(self, url: str) -> int:
        answer = self.ask("HEAD", url, VERSION)
        assert answer.status == 200, answer.reason
        return int(answer.headers["Upload-Offset"])

    def append(self, url: str, offset: int, body: bytes | Iterable[bytes], length: int) -> http.client.HTTPResponse:
        return self.ask("PATCH", url, {**PATCH, "Upload-Offset": str(offset), "Content-Length": str(length)}, body)

    @contextmanager
    def begun(self, url: str, body: Iterable[bytes] | bytes, length: int, offset: int = 0) -> Iterator[socket.socket]:
        """Announce `length` bytes, send those of `body`, and yield the line; it is broken at the end."""
        head = {**PATCH, "Upload-Offset": offset, "Content-Length": length, "Authorization": f"token {self.token}"}
        lines = [f"PATCH {url} HTTP/1.1", "Host: 127.0.0.1", *(f"{name}: {value}" for name, value in head.items())]
        with socket.create_connection(("127.0.0.1", self.port)) as line:
            line.sendall("\r\n".join([*lines, "", ""]).encode())
            for part in [body] if isinstance(body, bytes) else body:
                line.sendall(part)
            yield line


def reset_at_close(line: socket.socket) -> None:
    """Let the line end with a reset: what the server has not read is dropped."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
