"""Uploads in parts: whatever breaks, the file is the beginning of what was sent, and goes on where it ended."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from dist_train.user_code.library import library_root
from dist_train.web import uploads
from support.mounts import needs_mounts
from support.page import SAME_ORIGIN, client_of
from support.patience import wait_until
from support.processes import DIST_TRAIN, ROOT, started
from support.tus import PATCH, VERSION, Tus, reset_at_close

MIB = 2**20
TABLE, COLUMNS = "uploads", ("what", "seconds", "more memory in the server", "bytes sent twice")


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIST_TRAIN_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return client_of(tmp_path / "runs", tmp_path)[0]


def create(client: TestClient, length: int, **headers: str) -> str:
    answer = client.post("/uploads", headers={**SAME_ORIGIN, **VERSION, "upload-length": str(length), **headers})
    assert answer.status_code == 201, answer.text
    return f"/{answer.headers['location']}"


def append(client: TestClient, url: str, offset: int, content: bytes, **headers: str) -> tuple[int, str]:
    answer = client.patch(
        url, content=content, headers={**SAME_ORIGIN, **PATCH, "upload-offset": str(offset), **headers}
    )
    assert answer.headers["tus-resumable"] == "1.0.0"
    return answer.status_code, answer.headers.get("upload-offset", "")


def offset_of(client: TestClient, url: str) -> int:
    answer = client.head(url, headers=VERSION)
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
    return int(answer.headers["upload-offset"])


def part_of(url: str) -> Path:
    return library_root() / ".uploads" / f"{url.rpartition('/')[2]}.part"


# --- the protocol ---


def test_protocol_as_its_clients_use_it(client: TestClient) -> None:
    answer = client.options("/uploads", headers=SAME_ORIGIN)
    assert answer.status_code == 204
    assert answer.headers["tus-extension"] == "creation,termination"
    assert (answer.headers["tus-version"], answer.headers["tus-resumable"]) == ("1.0.0", "1.0.0")
    url = create(client, 5, **{"upload-metadata": "filename YS56aXA="})
    assert append(client, url, 0, b"ab") == (204, "2")
    answer = client.head(url, headers=VERSION)
    assert answer.headers["upload-length"] == "5"
    assert answer.headers["upload-metadata"] == "filename YS56aXA="
    assert append(client, url, 2, b"cde") == (204, "5")
    assert part_of(url).read_bytes() == b"abcde"
    assert client.delete(url, headers={**SAME_ORIGIN, **VERSION}).status_code == 204
    assert client.head(url, headers=VERSION).status_code == 404
    assert list(part_of(url).parent.iterdir()) == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"tus-resumable": "0.2.2"}, 412),
        ({"content-type": "application/octet-stream"}, 415),
        ({"upload-offset": "1"}, 409),
        ({"upload-offset": "-1"}, 409),
        ({"upload-offset": "zero"}, 409),
        ({"upload-offset": "9" * 40}, 409),
    ],
)
def test_wrong_requests_change_nothing(headers: dict[str, str], status: int, client: TestClient) -> None:
    url = create(client, 5)
    assert append(client, url, 0, b"abc", **headers)[0] == status
    assert part_of(url).read_bytes() == b""


def test_no_more_than_announced_is_kept(client: TestClient) -> None:
    url = create(client, 5)
    assert append(client, url, 0, b"abcdef")[0] == 413
    unannounced = client.patch(
        url, content=iter([b"abc", b"def"]), headers={**SAME_ORIGIN, **PATCH, "upload-offset": "0"}
    )
    assert unannounced.status_code == 413
    assert append(client, url, 0, b"abcde") == (204, "5")
    for length in ("", "-1", "1e3", "9" * 40):
        headers = {**SAME_ORIGIN, **VERSION, "upload-length": length}
        assert client.post("/uploads", headers=headers).status_code == 400


@pytest.mark.parametrize("name", ["0" * 32, "x", "A" * 32, "0" * 31 + "%0a"])
def test_upload_of_other_name_is_not_found(name: str, client: TestClient, data: Path) -> None:
    create(client, 1)
    assert client.head(f"/uploads/{name}", headers=VERSION).status_code == 404
    assert append(client, f"/uploads/{name}", 0, b"x") == (404, "")
    assert client.delete(f"/uploads/{name}", headers={**SAME_ORIGIN, **VERSION}).status_code == 404
    assert len(list((data / "library/.uploads").iterdir())) == 2


def test_uploads_need_login_and_same_origin(tmp_path: Path) -> None:
    client, access = client_of(tmp_path / "runs", tmp_path, logged_in=False)
    length = {**VERSION, "upload-length": "3"}
    assert client.post("/uploads", headers={**SAME_ORIGIN, **length}).status_code == 403
    with_token = {"authorization": f"token {access.token}"}
    answer = client.post("/uploads", headers={**with_token, **length})  # as curl does
    assert answer.status_code == 201
    url = f"/{answer.headers['location']}"
    for headers in (SAME_ORIGIN, {}):
        assert client.head(url, headers={**VERSION, **headers}).status_code == 403
    client.cookies.set(access.cookie, access.open_session())
    for method in ("PATCH", "DELETE"):
        for headers in ({"sec-fetch-site": "cross-site"}, {}):
            headers = {**PATCH, "upload-offset": "0", **headers}
            assert client.request(method, url, content=b"abc", headers=headers).status_code == 403
    assert client.head(url, headers=VERSION).headers["upload-offset"] == "0"


CONTENT = random.Random(0).randbytes(60)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.integers(0, 61), st.integers(0, 25)), max_size=12))
def test_any_order_of_requests_gives_the_beginning_of_the_file(
    steps: list[tuple[int, int]], client: TestClient
) -> None:
    """A step: from which offset, or from the right one for 61, so many bytes are sent."""
    url, expected = create(client, len(CONTENT)), 0
    for at, count in steps:
        begin = expected if at == 61 else at
        status, told = append(client, url, begin, CONTENT[begin : begin + count])
        if begin == expected:
            expected += len(CONTENT[begin : begin + count])
            assert (status, told) == (204, str(expected))
        else:
            assert status == 409
        assert part_of(url).read_bytes() == CONTENT[:expected]
        assert offset_of(client, url) == expected


# --- limits ---


def test_upload_is_refused_with_numbers_where_disk_is_short(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    monkeypatch.setattr(uploads, "free_bytes", lambda _folder: 5 * 10**9)
    headers = {**SAME_ORIGIN, **VERSION, "accept": "application/json"}
    answer = client.post("/uploads", headers={**headers, "upload-length": str(2 * 10**9)})
    assert answer.status_code == 507
    assert answer.json()["error"] == (
        f"It needs 5.1 GB: twice its 2.0 GB until it is unpacked, and 1.1 GB to spare. "
        f"5.0 GB are free in {data / 'library'}."
    )
    create(client, 19 * 10**8)


def test_old_uploads_are_removed(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [create(client, 5) for _ in range(2)]
    append(client, urls[0], 0, b"ab")
    now = time.time()
    os.utime(part_of(urls[1]), (now - uploads.KEPT_S - 10, now - uploads.KEPT_S - 10))
    create(client, 1)
    assert offset_of(client, urls[0]) == 2
    assert client.head(urls[1], headers=VERSION).status_code == 404
    assert len(list(part_of(urls[0]).parent.iterdir())) == 4
    monkeypatch.setattr(time, "time", lambda: now + uploads.KEPT_S + 100)
    uploads.Uploads()  # a server that starts
    assert list(part_of(urls[0]).parent.iterdir()) == []


def test_line_over_which_nothing_comes_is_left(
    tmp_path: Path, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or an upload whose line broke silently could not be gone on with: it stays locked."""
    monkeypatch.setattr(uploads, "IDLE_S", 0.2)
    url = create(client, 10)
    messages = [{"type": "http.request", "body": b"abc", "more_body": True}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    headers = {**SAME_ORIGIN, **PATCH, "host": "127.0.0.1", "upload-offset": "0", "cookie": cookie}
    scope = {"type": "http", "method": "PATCH", "path": url, "raw_path": url.encode(), "query_string": b"",
             "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
             "root_path": "", "scheme": "http", "server": ("127.0.0.1", 80)}  # fmt: skip
    asyncio.run(client.app(scope, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 204
    assert append(client, url, 3, b"defghij") == (204, "10")


FULL_DISK = """
import json, sys
from pathlib import Path
from dist_train.user_code.library import Kind, add_zip, entries, library_root
from dist_train.errors import LibraryError
from dist_train.web import uploads
from support.page import SAME_ORIGIN, client_of
from support.tus import PATCH, VERSION
uploads.free_bytes = lambda _folder: None  # a file system that does not say: the disk is full only while it is written
state, archive = map(Path, sys.argv[1:])
client, _ = client_of(state / "runs", state)
headers = {**SAME_ORIGIN, **PATCH, "accept": "application/json"}
url = "/" + client.post("/uploads", headers={**headers, "upload-length": str(5 * 2**20)}).headers["location"]
part = library_root() / ".uploads" / f"{url[9:]}.part"
told = []
def append(offset, count):
    answer = client.patch(url, content=b"x" * count, headers={**headers, "upload-offset": str(offset)})
    told.append((answer.status_code, answer.json()["error"] if answer.content else "", part.stat().st_size))
append(0, 3 * 2**19)
append(3 * 2**19, 3 * 2**19)
append(3 * 2**20, 3 * 2**19)
try:
    add_zip(Kind.MODELS, "big", archive)
except LibraryError as error:
    told.append(str(error))
told.append([*map(str, library_root().rglob("*.writing*")), *entries(Kind.MODELS)])
(library_root() / "filler").unlink()
append(3 * 2**20, 2 * 2**20)
print(json.dumps(told))
"""


@needs_mounts
def test_full_disk_cuts_back_and_goes_on(tmp_path: Path, data: Path) -> None:
    with zipfile.ZipFile(tmp_path / "code.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bks_model.py", bytes(3 * MIB))
    library = data / "library"
    library.mkdir(parents=True)
    mount = f"mount -t tmpfs -o size=7m tmpfs {library}; head -c 3000000 /dev/zero > {library}/filler"
    arguments = [sys.executable, str(tmp_path), str(tmp_path / "code.zip"), FULL_DISK]
    command = ["unshare", "-m", "sh", "-euc", f'{mount}; exec "$0" -c "$3" "$1" "$2"', *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    first, second, third, added, left, last = json.loads(done.stdout)
    assert first == [204, "", 3 * 2**19]
    assert second == [204, "", 3 * 2**20]
    full = f"The disk of {library / '.uploads'} is full. Free some space, then go on."
    assert third == [507, full, 3 * 2**20]
    assert added == f"models/big cannot be kept in {library}/models/big: No space left on device."
    assert left == []
    assert last == [204, "", 5 * 2**20]


# --- broken lines, over a real server ---


@contextmanager
def serving(folder: Path) -> Iterator[tuple[Tus, int]]:
    """Serve the page and yield a client, and the server's process id."""
    own = folder / "server"
    own.mkdir()
    command = [*DIST_TRAIN, "web", "--in", str(folder / "runs"), "--port", "0"]
    with started(command, own, None, XDG_STATE_HOME=str(folder / "state")) as server:
        assert server.stdout is not None
        found = re.search(r":(\d+)/\?token=(\S+)", server.stdout.readline())
        assert found
        yield Tus(int(found[1]), found[2]), server.pid


def peak_mib(pid: int) -> float:
    """Return the most memory that a process has had in RAM."""
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def block(number: int) -> bytes:
    """Return a MiB of a file of which no two are equal."""
    return number.to_bytes(8) + bytes(MIB - 8)


def content(begin: int, end: int) -> Iterator[bytes]:
    while begin < end:
        part = block(begin // MIB)[begin % MIB : begin % MIB + end - begin]
        yield part
        begin += len(part)


@pytest.mark.parametrize(
    ("length", "cuts"),
    [
        (33 * MIB + 5, 8),
        pytest.param(5 * 2**30, 50, marks=pytest.mark.full),
    ],
)
def test_upload_is_cut_and_gone_on_with_in_constant_memory(
    length: int, cuts: int, tmp_path: Path, row: Callable[..., None]
) -> None:
    """The line breaks at random bytes. What the server has is a beginning of the file, and memory does not grow."""
    rng, began = random.Random(cuts), time.monotonic()
    with serving(tmp_path) as (tus, pid):
        url = tus.create(length)
        before, offset, sent = peak_mib(pid), 0, 0
        for number, end in enumerate(sorted(rng.sample(range(length), cuts))):
            if end <= offset:
                continue
            with tus.begun(url, content(offset, end), length - offset, offset) as line:
                if number % 2:
                    wait_until(lambda: not is_free(url), "begin of the request")
                    reset_at_close(line)
            sent += end - offset
            if number % 2 == 0:  # as if the program had ended: all that was sent comes
                wait_until(lambda end=end: tus.offset(url) == end, "last byte")  # type: ignore[misc]
            wait_until(lambda: is_free(url), "end of the request")
            assert offset <= tus.offset(url) <= end
            offset = tus.offset(url)
        assert tus.append(url, offset, content(offset, length), length - offset).status == 204
        more = peak_mib(pid) - before
        assert part_of(url).stat().st_size == length
        with part_of(url).open("rb") as file:
            received = hashlib.file_digest(file, "sha256").digest()
        expected = hashlib.sha256()
        for part in content(0, length):
            expected.update(part)
        assert received == expected.digest()
        assert tus.ask("DELETE", url, VERSION).status == 204
    assert more < 20
    seconds = time.monotonic() - began
    row(
        f"{length / 2**30:.2f} GiB, cut {cuts} times",
        f"{seconds:.0f} s",
        f"{more:.1f} MiB",
        f"{sent - offset} of {length}",
    )


def is_free(url: str) -> bool:
    """Whether no request holds the lock of an upload."""
    with part_of(url).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_two_tabs_send_one_upload(tmp_path: Path) -> None:
    """Each sends the chunk that the server asks for next; one is refused while the other's is on its way."""
    length, chunk = 24 * MIB, MIB
    statuses: set[int] = set()

    def send(tus: Tus, url: str) -> None:
        while (offset := tus.offset(url)) < length:
            end = min(offset + chunk, length)
            with suppress(OSError):  # refused before all was sent
                statuses.add(tus.append(url, offset, content(offset, end), end - offset).status)

    with serving(tmp_path) as (tus, _):
        url = tus.create(length)
        tabs = [threading.Thread(target=send, args=(tus, url)) for _ in range(4)]
        for tab in tabs:
            tab.start()
        for tab in tabs:
            tab.join()
        assert part_of(url).read_bytes() == b"".join(content(0, length))
    assert statuses <= {204, 409, 423}
    assert len(statuses) > 1


def test_one_line_writes_and_sixteen_are_received_at_once(tmp_path: Path) -> None:
    with serving(tmp_path) as (tus, _):
        urls = [tus.create(4) for _ in range(uploads.AT_ONCE + 1)]
        with ExitStack() as lines:
            for url in urls[:-1]:
                lines.enter_context(tus.begun(url, b"ab", 4))
            for url in urls[:-1]:
                wait_until(lambda url=url: not is_free(url), "begin of the request")  # type: ignore[misc]
            refused = tus.append(urls[-1], 0, b"abcd", 4)
            assert refused.status == 503
        wait_until(lambda: all(map(is_free, urls)), "end of the lines")
        assert [tus.offset(url) for url in urls] == [2] * uploads.AT_ONCE + [0]
        with tus.begun(urls[0], b"c", 2, 2):
            wait_until(lambda: not is_free(urls[0]), "begin of the request")
            assert tus.append(urls[0], 2, b"cd", 2).status == 423
            assert tus.ask("DELETE", urls[0], VERSION).status == 423
        assert tus.append(urls[-1], 0, b"abcd", 4).status == 204


def test_killed_server_loses_nothing_that_came(tmp_path: Path) -> None:
    length = 3 * MIB
    with serving(tmp_path) as (tus, pid):
        url = tus.create(length)
        tus.append(url, 0, content(0, MIB), MIB)
        with tus.begun(url, block(1), 2 * MIB, MIB):
            wait_until(lambda: part_of(url).stat().st_size == 2 * MIB, "second block")
            os.kill(pid, signal.SIGKILL)
    (tmp_path / "server").rmdir()
    with serving(tmp_path) as (tus, _):
        assert tus.offset(url) == 2 * MIB
        assert tus.append(url, 2 * MIB, block(2), MIB).status == 204
        assert part_of(url).read_bytes() == b"".join(content(0, length))
