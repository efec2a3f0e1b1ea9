"""After a failure: which rank was first and what it said last, the newest good checkpoint, and how to go on from it."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from itertools import islice, takewhile
from pathlib import Path

from dist_train.errors import PeerLost
from dist_train.runs.directory import RunDir
from dist_train.runs.error_report import describe_error

_LINES = 12  # of a log or of a stack
# Where a rank waits for the others; DDP exchanges gradients in the backward pass.
_WAITING = re.compile(r"torch/(distributed|autograd)/")
# In torchrun's summary.
_SUMMARY = re.compile(r"^[EW]\d{4} .* torch/distributed/elastic/", re.MULTILINE)  # where it begins
_ENDED = re.compile(r"rank\s*: (\d+) \(local_rank: \d+\)\s+exitcode\s*: (-?\d+)")


def log_sizes(run_dir: RunDir) -> dict[Path, int]:
    """How much each log holds now: what comes after it belongs to the next start."""
    return {path: path.stat().st_size for path in run_dir.logs.glob("*.log")}


def diagnose_failure(run_dir: RunDir, before: Mapping[Path, int]) -> str:
    """Which rank failed first, why, and its last lines. `before`: log_sizes at the start; they are all on this machine.

    A rank that hangs or is killed leaves no error of its own; the others say that they miss one.
    """
    said = {path: _after(path, before.get(path, 0)) for path in log_sizes(run_dir)}
    of_rank = {int(path.stem.partition("_")[2]): path for path in said if path.stem.startswith("rank_")}
    launcher = said.get(run_dir.launcher_log, "")
    first = run_dir.read_error()
    if first and first.get("kind") != PeerLost.__name__:
        unforeseen = first.get("message", "").startswith(f"{first.get('kind')}:")
        return describe_error(first) + (_tail_of(of_rank.get(first.get("rank", -1)), said) if unforeseen else "")
    # Rank zero's errors are in the launcher's log.
    texts = {rank: said[path] for rank, path in of_rank.items()} | {0: launcher}
    if hung := _hung({rank: _main_stack(texts[rank]) for rank in sorted(texts)}):
        return hung
    for rank, code in _ENDED.findall(launcher):
        if int(code) < 0 and -int(code) != signal.SIGTERM:  # that is torchrun's, to the ranks that are left
            name = signal.Signals(-int(code)).name
            hint = " (by the kernel, for want of memory? dmesg says)" if name == "SIGKILL" else ""
            return f"rank {rank} was killed by {name}{hint}.{_tail_of(of_rank.get(int(rank)), said)}"
    if first:
        return describe_error(first)
    by_ranks = _SUMMARY.split(launcher, maxsplit=1)[0] or launcher  # as where an import failed: a traceback of Python's
    tail = by_ranks.splitlines()[-_LINES:]
    return "\n".join([*tail, f"The ranks left no error.json. All they said is above and in {run_dir.logs}."])


def _after(path: Path, size: int) -> str:
    with path.open("rb") as file:
        file.seek(size)
        return file.read().decode(errors="replace")


def _hung(stacks: Mapping[int, list[str]]) -> str:
    """`stacks`: by rank, empty for one that did not hang. One that waits for others in a collective is not to blame."""
    found = {rank: stack for rank, stack in stacks.items() if stack}
    busy = {rank: stack for rank, stack in found.items() if not any(_WAITING.search(call) for call in stack[:3])}
    return "\n".join(
        f"rank {rank} did not get on any more; if it was only slow, raise stall_timeout_s (before the first step: "
        f"setup_timeout_s). There it hung:\n" + "\n".join(stack)
        for rank, stack in (busy or found).items()
    )


def _main_stack(text: str) -> list[str]:
    """The main thread's calls, innermost first, as the watchdog dumped them, if it did. That thread is last."""
    _, found, dump = text.partition("Timeout (")
    threads = [part for part in re.split(r"^(?=Thread 0x|Current thread 0x)", dump, flags=re.MULTILINE) if found]
    if len(threads) < 2:
        return []
    calls = takewhile(lambda line: line.startswith("  File "), threads[-1].splitlines()[1:])
    return list(islice(calls, _LINES))


def _tail_of(log: Path | None, said: Mapping[Path, str]) -> str:
    lines = said[log].splitlines()[-_LINES:] if log is not None else []
    return "".join([f" The end of {log}:", *(f"\n  {line}" for line in lines)]) if lines else ""
