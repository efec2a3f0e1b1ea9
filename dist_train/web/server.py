"""Serve the page on a local port or a socket of its own, to those who have the token."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import uvicorn

from dist_train.errors import ConfigError, LaunchError
from dist_train.web.access import Access, state_file
from dist_train.web.app import make_app

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_BACKLOG = 128
_ANSWER_S = 5.0


def address_of(host: str, port: int, path: Path | None) -> str:
    """Return what names a server: host:port, or the path of its socket."""
    return str(path.absolute()) if path is not None else f"{host}:{port}"


def serve(
    folder: Path, *, host: str, port: int, path: Path | None, hosts: frozenset[str], say: Callable[[str], object]
) -> None:
    """Serve the runs in `folder` until the process is asked to end. `path`: of a Unix socket, instead of a port.

    Raises:
        ConfigError: the host is not a local one.
        LaunchError: the port or the socket is in use.
    """
    if path is None and host not in _LOOPBACK:
        raise ConfigError(
            f"--host={host} would show the page to the whole network, unencrypted. Leave it out, and connect from "
            f"elsewhere with: ssh -L {port}:127.0.0.1:{port} {socket.gethostname()}"
        )
    listener = _socket(path) if path is not None else _port(host, port)
    if path is None:
        port = listener.getsockname()[1]
    access = Access(state_file(address_of(host, port, path)))
    config = uvicorn.Config(
        make_app(folder, access, hosts), log_level="warning", access_log=False, proxy_headers=False,
        server_header=False, ws="none", loop="asyncio", http="h11", lifespan="off", timeout_graceful_shutdown=2,
    )  # fmt: skip
    for line in greeting(access, host, port, path):
        say(line)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        listener.close()
        if path is not None:
            path.unlink(missing_ok=True)


def greeting(access: Access, host: str, port: int, path: Path | None) -> list[str]:
    """Return the lines that say how to open the page."""
    machine = socket.gethostname()
    if path is None:
        return [
            f"http://{host if ':' not in host else f'[{host}]'}:{port}/?token={access.token}",
            f"From another machine: ssh -L {port}:127.0.0.1:{port} {machine}, then open the same address.",
        ]
    return [
        f"From another machine: ssh -L 8080:{path.absolute()} {machine}, then open",
        f"http://127.0.0.1:8080/?token={access.token}",
    ]


def is_running(host: str, port: int, path: Path | None) -> bool:
    """Whether a server of this kind answers there."""
    connection = HTTPConnection(host, port, timeout=_ANSWER_S)
    try:
        if path is not None:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(_ANSWER_S)
            connection.sock.connect(str(path))
        connection.request("GET", "/login", headers={"host": "127.0.0.1"})
        return connection.getresponse().getheader("x-dist-train") is not None
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _port(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise LaunchError(f"{host}:{port} cannot be used: {error.strerror}. Choose another with --port.") from None
    listener.listen(_BACKLOG)
    return listener


def _socket(path: Path) -> socket.socket:
    """Bind a socket that its owner alone can use. uvicorn itself would make one that everybody can."""
    listener = socket.socket(socket.AF_UNIX)
    if path.is_socket() and not _answers(path):
        path.unlink()  # left by a server that was killed
    old_mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        raise LaunchError(f"--socket={path} cannot be used: {error.strerror or error}. Choose another path.") from None
    finally:
        os.umask(old_mask)
    listener.listen(_BACKLOG)
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0
