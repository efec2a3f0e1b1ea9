"""Diagnose a failed launch: the rank that failed first, its error, and its last log lines."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from itertools import islice, takewhile
from pathlib import Path

from dist_train.errors import PeerLost
from dist_train.runs.directory import RunDir
from dist_train.runs.error_report import describe_error

_LINES = 12  # shown of a log or a stack
# Calls in which a rank waits for the others; DDP exchanges gradients in the backward pass.
_WAITING = re.compile(r"torch/(distributed|autograd)/")
# torchrun's summary: its first line, and the entry of each failed rank.
_SUMMARY = re.compile(r"^[EW]\d{4} .* torch/distributed/elastic/", re.MULTILINE)
_ENDED = re.compile(r"rank\s*: (\d+) \(local_rank: \d+\)\s+exitcode\s*: (-?\d+)")


def log_sizes(run_dir: RunDir) -> dict[Path, int]:
    """Return the current size of each log: later output belongs to the next start."""
    return {path: path.stat().st_size for path in run_dir.logs.glob("*.log")}


def diagnose_failure(run_dir: RunDir, before: Mapping[Path, int]) -> str:
    """Describe which rank failed first, why, and its last log lines. `before`: log_sizes at the start.

    All ranks run on this machine. A rank that hangs or is killed leaves no error of its own; the others report it lost.
    """
    output = {path: _after(path, before.get(path, 0)) for path in log_sizes(run_dir)}
    rank_logs = {int(path.stem.partition("_")[2]): path for path in output if path.stem.startswith("rank_")}
    launcher = output.get(run_dir.launcher_log, "")
    first = run_dir.read_error()
    if first and first.get("kind") != PeerLost.__name__:
        unexpected = first.get("message", "").startswith(f"{first.get('kind')}:")
        return describe_error(first) + (_tail_of(rank_logs.get(first.get("rank", -1)), output) if unexpected else "")
    # Rank zero's errors are in the launcher's log.
    texts = {rank: output[path] for rank, path in rank_logs.items()} | {0: launcher}
    if hung := _describe_hung({rank: _main_stack(texts[rank]) for rank in sorted(texts)}):
        return hung
    for rank, code in _ENDED.findall(launcher):
        if int(code) < 0 and -int(code) != signal.SIGTERM:  # torchrun sends SIGTERM to the remaining ranks
            name = signal.Signals(-int(code)).name
            hint = " (by the kernel, out of memory? See dmesg)" if name == "SIGKILL" else ""
            return f"rank {rank} was killed by {name}{hint}.{_tail_of(rank_logs.get(int(rank)), output)}"
    if first:
        return describe_error(first)
    by_ranks = _SUMMARY.split(launcher, maxsplit=1)[0] or launcher  # such as the traceback of a failed import
    tail = by_ranks.splitlines()[-_LINES:]
    return "\n".join([*tail, f"The ranks left no error.json. Their output is above and in {run_dir.logs}."])


def _after(path: Path, size: int) -> str:
    with path.open("rb") as file:
        file.seek(size)
        return file.read().decode(errors="replace")


def _describe_hung(stacks: Mapping[int, list[str]]) -> str:
    """Describe the ranks that hung. Ranks that wait in a collective are listed only if all hung ranks do.

    `stacks`: by rank, empty for a rank that did not hang.
    """
    hung = {rank: stack for rank, stack in stacks.items() if stack}
    busy = {rank: stack for rank, stack in hung.items() if not any(_WAITING.search(call) for call in stack[:3])}
    return "\n".join(
        f"rank {rank} made no progress; if it was only slow, raise stall_timeout_s (before the first step: "
        f"setup_timeout_s). It hung in:\n" + "\n".join(stack)
        for rank, stack in (busy or hung).items()
    )


def _main_stack(text: str) -> list[str]:
    """Return the main thread's calls, innermost first, from the watchdog's dump, whose last thread it is."""
    _, dumped, dump = text.partition("Timeout (")
    threads = [part for part in re.split(r"^(?=Thread 0x|Current thread 0x)", dump, flags=re.MULTILINE) if dumped]
    if len(threads) < 2:
        return []
    calls = takewhile(lambda line: line.startswith("  File "), threads[-1].splitlines()[1:])
    return list(islice(calls, _LINES))


def _tail_of(log: Path | None, output: Mapping[Path, str]) -> str:
    lines = output[log].splitlines()[-_LINES:] if log is not None else []
    return "".join([f" Last lines of {log}:", *(f"\n  {line}" for line in lines)]) if lines else ""
