"""The index of a folder of runs. A scan reads only the files that have changed since the last one."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from uuid import uuid4

from dist_train.runs import start_lock
from dist_train.runs.summary import Summary, is_run, summarise
from dist_train.web.outputs import is_shown

SCAN_S = 0.9  # between two scans, whoever asks; less than between two polls, or a tab would wait for the one after

_Signature = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A run of the folder."""

    summary: Summary
    started: float  # time.time() of its newest start
    signature: _Signature

    @property
    def name(self) -> str:
        return self.summary.name

    @property
    def row_id(self) -> str:
        """An id for HTML; names may hold letters that a CSS selector may not."""
        return "run-" + sha1(self.name.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Listing:
    """The runs at one moment. `version` differs from that of any other listing, also of an earlier server."""

    entries: dict[str, Entry]  # by name
    version: str
    error: str | None  # why the folder could not be read; the entries are then those of the last scan


class RunIndex:
    """Keeps the summaries of all runs in a folder. Safe to use from several threads; never writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._boot = uuid4().hex[:8]
        self._number = 0
        self._lock = threading.Lock()
        self._scanned = -SCAN_S
        self._entries: dict[str, Entry] = {}
        self._error: str | None = None

    def listing(self) -> Listing:
        """Return the runs, at most SCAN_S old."""
        with self._lock:
            if time.monotonic() - self._scanned >= SCAN_S:
                self._scan()
                self._scanned = time.monotonic()
            return Listing(self._entries, f"{self._boot}.{self._number}", self._error)

    def find(self, name: str) -> Entry | None:
        """Return the run of that name. A name is looked up, never joined to a path."""
        return self.listing().entries.get(name)

    def forget_scan(self) -> None:
        """Let the next listing scan again, after a change made here."""
        with self._lock:
            self._scanned = -SCAN_S

    def _scan(self) -> None:
        try:
            with os.scandir(self.folder) as folder:
                found = sorted((each for each in folder if _may_be_run(each)), key=lambda each: each.name)
        except FileNotFoundError:
            found = []  # no run yet
        except OSError as error:
            self._set(self._entries, f"{self.folder} cannot be read: {error.strerror}.")
            return
        entries: dict[str, Entry] = {}
        for each in found:
            with suppress(OSError):  # removed meanwhile
                if (entry := self._read(each)) is not None:
                    entries[each.name] = entry
        self._set(entries, None)

    def _read(self, found: os.DirEntry[str]) -> Entry | None:
        signature, before = _signature(found), self._entries.get(found.name)
        if before is not None and before.signature == signature and not before.summary.may_be_running:
            return before
        path = Path(found.path)
        if before is not None and before.signature == signature:
            summary = summarise(path)  # whether a process is alive depends on the moment
            return before if summary.state == before.summary.state else Entry(summary, before.started, signature)
        if not is_run(path):
            return None
        return Entry(summarise(path), _started(path), signature)

    def _set(self, entries: dict[str, Entry], error: str | None) -> None:
        changed = error != self._error or entries.keys() != self._entries.keys()
        if changed or any(entries[name] is not self._entries[name] for name in entries):
            self._number += 1
        self._entries, self._error = entries, error


def _may_be_run(entry: os.DirEntry[str]) -> bool:
    try:
        return is_shown(entry.name) and entry.is_dir()
    except OSError:  # a link to nowhere
        return False


def _signature(entry: os.DirEntry[str]) -> _Signature:
    """Return what changes whenever a file of the run is replaced, its status is written or a start is noted."""
    found = entry.stat()
    signature: _Signature = (found.st_ino, found.st_mtime_ns)
    for name in ("status.json", start_lock.NAME):
        with suppress(OSError):
            file = os.stat(f"{entry.path}/{name}")  # noqa: PTH116 - a Path would take as long as the rest of a scan
            signature += (file.st_ino, file.st_mtime_ns)
    return signature


def _started(path: Path) -> float:
    for name in ("config.yaml", "slurm.json", "status.json"):
        with suppress(OSError):
            return (path / name).stat().st_mtime
    return 0.0
