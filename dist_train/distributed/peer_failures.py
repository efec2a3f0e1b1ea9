"""How the failure of another rank, or of a collective, shows in this one."""

from __future__ import annotations

import traceback

import torch.distributed as dist


def is_peer_failure(error: BaseException) -> bool:
    """Return whether a collective failed because another rank is gone; the cause is then on that rank."""
    if isinstance(error, dist.DistError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    # The last frame must be that of a collective, also in backward: errors of user code may mention sockets too.
    frames = traceback.extract_tb(error.__traceback__)
    sources = ("torch/distributed/", "torch/autograd/", "torch/nn/parallel/", "accelerate/")
    words = ("connection closed by peer", "connection reset", "broken pipe", "timed out waiting", "socket", "nccl")
    text = str(error).lower()
    return any(w in text for w in words) and bool(frames) and any(part in frames[-1].filename for part in sources)


def peer_ended(rank: int) -> RuntimeError:
    """Return the error to raise in place of a collective's when another rank has ended."""
    return dist.DistNetworkError(f"Connection closed by peer: rank {rank} has ended.")


def peer_is_late(rank: int, timeout_s: float) -> RuntimeError:
    """Return the error to raise in place of a collective's when a rank was waited for too long."""
    return dist.DistBackendError(f"Timed out waiting {timeout_s:g} s for rank {rank}.")


def is_timeout(error: BaseException) -> bool:
    """Return whether a wait for other ranks timed out; only torch's message tells."""
    return any(words in str(error).lower() for words in ("timed out", "timeout"))


def first_line(error: BaseException) -> str:
    """Return the first line of the message, or the name of the error's class if there is no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
