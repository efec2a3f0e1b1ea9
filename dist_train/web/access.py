"""Who may use the page: a token, the sessions that were opened with it, and the file that keeps both."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from hmac import compare_digest
from pathlib import Path
from typing import Any

from dist_train.atomic_files import atomic_write, read_json

SESSION_S = 12 * 3600.0
_TOKEN_BYTES = 32


def state_file(address: str) -> Path:
    """Return the file that belongs to the server at `address`, host:port or the path of a socket."""
    root = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    name = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in address)
    return root / "dist-train" / f"web-{name}.json"


class Access:
    """The token and the sessions of one server. They survive its restart; of a session only the hash is kept.

    The file is read again when it changes, so that `dist-train web --logout` reaches a running server.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._version: tuple[int, int] | None = None
        self._state: dict[str, Any] = {}
        with self._lock:
            self._read()

    @property
    def token(self) -> str:
        with self._lock:
            self._read()
            token: str = self._state["token"]
            return token

    @property
    def cookie(self) -> str:
        """The name of the cookie: unlike host and port, it is never shared with another server."""
        return f"dist_train_{self._state['name']}"

    def is_token(self, text: str) -> bool:
        return compare_digest(text.encode(), self.token.encode())

    def open_session(self) -> str:
        """Return the id of a new session, for the cookie."""
        session = secrets.token_urlsafe(32)
        with self._lock:
            self._read()
            now = time.time()
            open_ones = {key: until for key, until in self._state["sessions"].items() if until > now}
            self._state["sessions"] = open_ones | {_hash(session): now + SESSION_S}
            self._write()
        return session

    def is_session(self, session: str) -> bool:
        with self._lock:
            self._read()
            until: float = self._state["sessions"].get(_hash(session), 0.0)
            return until > time.time()

    def revoke(self) -> None:
        """End all sessions, and replace the token."""
        with self._lock:
            self._reset()

    def _reset(self) -> None:
        self._state = {"name": secrets.token_hex(4), "token": secrets.token_urlsafe(_TOKEN_BYTES), "sessions": {}}
        self._write()

    def _read(self) -> None:
        with suppress(OSError):
            stat = self._path.stat()
            if (version := (stat.st_mtime_ns, stat.st_ino)) != self._version:
                self._state, self._version = read_json(self._path), version
        if not _is_intact(self._state):  # new, or damaged
            self._reset()

    def _write(self) -> None:
        """Write the file, readable by its owner alone. Where that is impossible the state is lost with the server."""
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with atomic_write(self._path) as temporary:
                temporary.touch(mode=0o600, exist_ok=False)
                temporary.write_text(json.dumps(self._state))
            stat = self._path.stat()
            self._version = (stat.st_mtime_ns, stat.st_ino)


def _is_intact(state: Mapping[str, Any]) -> bool:
    name, token, sessions = (state.get(key) for key in ("name", "token", "sessions"))
    return (
        isinstance(name, str)
        and re.fullmatch(r"[0-9a-f]+", name) is not None
        and isinstance(token, str)
        and len(token) >= _TOKEN_BYTES
        and isinstance(sessions, dict)
        and all(isinstance(until, float) for until in sessions.values())
    )


def _hash(session: str) -> str:
    return hashlib.sha256(session.encode()).hexdigest()
