"""user_code.archives: what is refused before anything is written, with limits as they are for data."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_train.errors import UserCodeError
from dist_train.user_code.archives import unpack
from dist_train.user_code.contents import Limits
from support.processes import DIST_TRAIN, ROOT

TABLE, COLUMNS = "archives", ("what", "result", "seconds", "most memory")
SMALL = Limits(2**20, 50, "Pack less.")


def packed(archive: Path, *names: str, content: str = "x") -> Path:
    with zipfile.ZipFile(archive, "w") as file:
        for name in names:
            file.writestr(name, content)
    return archive


def refusal(archive: Path, limits: Limits = SMALL) -> str:
    folder = archive.with_name("out")
    with pytest.raises(UserCodeError) as caught:
        unpack(archive, folder, "The zip", limits)
    assert not folder.exists()  # nothing was written
    return str(caught.value)


@pytest.mark.parametrize("name", ["con", "CON.txt", "a/aux.py/b", "a/nul", "COM1", "lpt9.tar.gz"])
def test_names_of_devices_are_refused(name: str, tmp_path: Path) -> None:
    assert "has the name of a device on Windows" in refusal(packed(tmp_path / "b.zip", "fine", name))


@pytest.mark.parametrize("name", ["contents", "auxiliary.py", "nullable/x", "com10", "a.con"])
def test_names_that_only_look_like_devices_are_not(name: str, tmp_path: Path) -> None:
    assert unpack(packed(tmp_path / "b.zip", name), tmp_path / "out", "The zip", SMALL).files == 1


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("a.py", "A.py"), "two entries for 'a.py', beside 'A.py'"),
        (("Straße", "STRASSE"), "two entries for 'Straße', beside 'STRASSE'"),
        (("data/x", "Data/y"), "two entries for 'data', beside 'Data'"),
        (("a/B/x", "a/b/y"), "two entries for 'a/b', beside 'a/B'"),
        (("a", "A/b"), "two entries for 'a', beside 'A'"),
        (("a/", "A"), "two entries for 'a/', beside 'A'"),
        (("a//b", "a/b"), "two entries for 'a/b', beside 'a//b'"),
        (("./a", "a"), "two entries for 'a', beside './a'"),
        (("a", "a"), "two entries for 'a'."),
        (("a", "a/b"), "two entries for 'a/b'."),
        (("a", "a/"), "two entries for 'a/'."),
    ],
)
def test_entries_that_are_one_file_elsewhere_are_refused(names: tuple[str, ...], told: str, tmp_path: Path) -> None:
    assert f"The zip has {told}" in refusal(packed(tmp_path / "b.zip", *names))


def test_folders_of_one_name_in_one_spelling_are_fine(tmp_path: Path) -> None:
    archive = packed(tmp_path / "b.zip", "a/", "a/b/", "a/b/c", "a/b/d", "e/b/c", "A.py", "aa/b")
    assert unpack(archive, tmp_path / "out", "The zip", SMALL).files == 5


def test_folders_count_as_entries(tmp_path: Path) -> None:
    """Each of a few names may make hundreds of folders."""
    archive = packed(tmp_path / "b.zip", *(f"{number}/" + "d/" * 40 + "x" for number in range(5)))
    assert re.search(r"has \d+ entries, more than 50\. Pack less\.", refusal(archive))


def test_sum_of_sizes_is_refused_before_unpacking(tmp_path: Path) -> None:
    archive = packed(tmp_path / "b.zip", "a", "b", content="x" * (600 * 2**10))
    assert refusal(archive) == "The zip holds more than 1 MiB. Pack less."


def with_end(archive: Path, *, count: int | None = None, directory: int | None = None, zip64: bool = False) -> Path:
    """Change what the end of an archive says of its directory: the number of entries, the bytes."""
    content = archive.read_bytes()
    at = content.rindex(b"PK\x05\x06")
    true_count, true_directory, offset = struct.unpack_from("<HLL", content, at + 10)
    count, directory = count or true_count, directory or true_directory
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, directory, offset, 0)
    if zip64:
        record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, directory, offset)
        locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, at, 1)
        end = record + locator + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *[2**16 - 1] * 2, *[2**32 - 1] * 2, 0)
    archive.write_bytes(content[:at] + end)
    return archive


def no_zip(*_arguments: object) -> None:
    raise AssertionError("opened")


@pytest.mark.parametrize("zip64", [False, True])
@pytest.mark.parametrize("count", [None, 1])  # the true one, a false one
def test_directory_with_too_much_is_not_read_by_zipfile(
    zip64: bool, count: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = with_end(packed(tmp_path / "1.zip", *map(str, range(51))), count=count, zip64=zip64)
    large = with_end(packed(tmp_path / "2.zip", "a"), directory=2**20 + 1, zip64=zip64)
    monkeypatch.setattr(zipfile, "ZipFile", no_zip)
    assert refusal(many) == "The zip has 51 entries, more than 50. Pack less."
    assert refusal(large) == "The zip has a directory of 1 MiB, more than 1 MiB. Pack less."


def test_small_archive_in_the_form_of_large_ones(tmp_path: Path) -> None:
    """With Zip64 the old fields hold the largest numbers, which count for nothing."""
    archive = with_end(packed(tmp_path / "b.zip", "a", "b"), zip64=True)
    assert unpack(archive, tmp_path / "out", "The zip", SMALL).files == 2


def test_archive_with_comment_and_with_something_before_it(tmp_path: Path) -> None:
    archive = packed(tmp_path / "b.zip", "a", "b")
    with zipfile.ZipFile(archive, "a") as file:
        file.comment = b"x" * 60_000
    archive.write_bytes(b"#!/bin/sh\n" + archive.read_bytes())
    assert unpack(archive, tmp_path / "out", "The zip", SMALL).files == 2


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def test_damage_is_told_whatever_the_compression(method: int, tmp_path: Path) -> None:
    archive = tmp_path / "b.zip"
    with zipfile.ZipFile(archive, "w", method) as file:
        file.writestr("a", "text " * 1000)
    content = bytearray(archive.read_bytes())
    content[40:60] = b"\xff" * 20
    archive.write_bytes(content)
    with pytest.raises(UserCodeError, match="is not a readable zip"):
        unpack(archive, tmp_path / "out", "The zip", SMALL)


def test_progress_reaches_the_sum(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    archive = packed(tmp_path / "b.zip", "a", "b", content="x" * 1000)
    unpack(archive, tmp_path / "out", "The zip", SMALL, lambda *seen: told.append(seen))
    assert told == [(1000, 2000), (2000, 2000)]


# --- in a child process with a memory limit ---


def added(archive: Path, data: Path, row: Callable[..., None], what: str) -> tuple[int, str]:
    """Add an archive as a data set, as the page does. Returns the exit code and the last line."""
    command = [*DIST_TRAIN, "library", "add", "datasets", "many", str(archive), "--progress"]
    script = (
        "import os, resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024, code)"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "DIST_TRAIN_DATA_DIR": str(data)},
    )  # fmt: skip
    *lines, last = done.stdout.splitlines()
    memory, code = map(int, last.split())
    text = (done.stderr.splitlines() or lines)[-1]
    row(what, text[:120], f"{time.monotonic() - began:.0f} s", f"{memory} MiB")
    return code, text


def test_want_of_memory_ends_the_child_alone(tmp_path: Path, row: Callable[..., None]) -> None:
    archive = tmp_path / "b.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_LZMA) as file:
        file.writestr("a", "text " * 1000)
    content = bytearray(archive.read_bytes())
    at = content.index(b"\x05\0\x5d") + 3  # the size of LZMA's dictionary follows its other properties
    content[at : at + 4] = struct.pack("<L", 15 * 2**28)
    archive.write_bytes(content)
    code, text = added(archive, tmp_path / "data", row, "a file that needs 3.75 GiB to be unpacked")
    assert (code, text) == (
        1, "error: The zip of many needs more memory than unpacking may take. Pack it again with fewer files."
    )  # fmt: skip
    assert list((tmp_path / "data/library/datasets").glob("[!.]*")) == []


@pytest.mark.full
@pytest.mark.parametrize("count", [1_000_000, 2_000_001])
def test_million_entries(count: int, tmp_path: Path, row: Callable[..., None]) -> None:
    archive = tmp_path / "b.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for number in range(count):
            file.writestr(zipfile.ZipInfo(f"{number // 1000:04d}/image_{number:07d}.jpg"), b"")
    code, text = added(archive, tmp_path / "data", row, f"{count:,} files")
    if count > 2_000_000:
        assert (code, "has 2000001 entries, more than 2000000" in text) == (1, True)
    else:
        assert code == 0
        assert sum(1 for _ in Path(text).rglob("*.jpg")) == count
    shutil.rmtree(tmp_path)  # pytest would keep a million files for three sessions
    tmp_path.mkdir()
