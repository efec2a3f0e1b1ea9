"""Damages to the files of a checkpoint. Each changes at least one file and returns the names of those it touched."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from dist_train.checkpoints.contents import MANIFEST, MODEL, STATE, TRAINING

FILES = [MODEL, TRAINING, STATE, MANIFEST]

Damage = Callable[[Path, list[Path], random.Random], set[str]]  # (checkpoint, other checkpoints, random generator)


def flip_bits(folder: Path, _: list[Path], rng: random.Random) -> set[str]:
    path = folder / rng.choice(FILES)
    content = bytearray(path.read_bytes())
    for place in rng.sample(range(8 * len(content)), rng.choice([1, 1, 1, 2, 8])):
        content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    return {path.name}


def truncate(folder: Path, _: list[Path], rng: random.Random) -> set[str]:
    path = folder / rng.choice(FILES)
    content = path.read_bytes()
    path.write_bytes(
        content[: rng.randrange(len(content) - 1)]
    )  # at least two bytes: a manifest's final "\n" carries nothing
    return {path.name}


def append(folder: Path, _: list[Path], rng: random.Random) -> set[str]:
    path = folder / rng.choice(FILES)
    with path.open("ab") as file:
        file.write(bytes([rng.choice([0, 0x30, 0x7D, rng.randrange(33, 256)])]))  # not a blank, which changes nothing
    return {path.name}


def delete(folder: Path, _: list[Path], rng: random.Random) -> set[str]:
    gone = rng.sample(FILES, rng.choice([1, 1, 2, 4]))
    for name in gone:
        (folder / name).unlink()
    return set(gone)


def empty(folder: Path, _: list[Path], rng: random.Random) -> set[str]:
    emptied = rng.sample(FILES, rng.choice([1, 1, 2, 4]))
    for name in emptied:
        (folder / name).write_bytes(b"")
    return set(emptied)


def zero_a_block(folder: Path, _: list[Path], rng: random.Random) -> set[str]:
    """Zero a block, as after a power cut: the length is right, but a part was never written."""
    path = folder / rng.choice(FILES)
    content = path.read_bytes()
    start = rng.choice([0, rng.randrange(len(content))])
    size = rng.choice([512, 4096, len(content)])
    zeroed = content[:start] + bytes(len(content[start : start + size])) + content[start + size :]
    path.write_bytes(zeroed if zeroed != content else bytes(len(content)))
    return {path.name}


def exchange_two_files(folder: Path, _: list[Path], rng: random.Random) -> set[str]:
    one, other = rng.sample(FILES, 2)
    (folder / one).rename(folder / "between")
    (folder / other).rename(folder / one)
    (folder / "between").rename(folder / other)
    return {one, other}


def file_of_another(folder: Path, others: list[Path], rng: random.Random) -> set[str]:
    name = rng.choice([MODEL, TRAINING, STATE])
    shutil.copy(rng.choice(others) / name, folder / name)
    return {name}


def manifest_of_another(folder: Path, others: list[Path], rng: random.Random) -> set[str]:
    shutil.copy(rng.choice(others) / MANIFEST, folder / MANIFEST)
    return {MANIFEST}


def all_of_another(folder: Path, others: list[Path], rng: random.Random) -> set[str]:
    """Copy a complete valid checkpoint under the name of another step."""
    other = rng.choice(others)
    for name in FILES:
        shutil.copy(other / name, folder / name)
    return {MANIFEST}


DAMAGES: dict[str, tuple[Damage, int]] = {
    "1 to 8 bits flipped, anywhere in a file": (flip_bits, 160),
    "a file cut off": (truncate, 60),
    "a byte appended": (append, 40),
    "1 to 4 files deleted": (delete, 40),
    "1 to 4 files of zero bytes": (empty, 40),
    "a block of zeros, or nothing but zeros": (zero_a_block, 40),
    "two files of a checkpoint exchanged": (exchange_two_files, 40),
    "a file of another checkpoint": (file_of_another, 40),
    "the manifest of another checkpoint": (manifest_of_another, 40),
    "all files of another checkpoint": (all_of_another, 20),
}
