"""Addition of gradients through memory that the ranks of one host share, which costs less than gloo's sockets.

Each rank writes a piece into its slot, tells the others, waits for them, and adds all slots in the order of the ranks:
every rank gets the same bits. There are two slots per rank, used in turns: a rank that writes into a slot again knows
that all others have read it, since they have told it of a later piece.
"""

from __future__ import annotations

import mmap
import os
import secrets
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.distributed.peer_failures import peer_ended, peer_is_late

# Bytes of a slot. A larger gradient goes through it in pieces, which stay in the processor's cache.
SLOT_BYTES = 1 << 20
# How often a rank asks for the news of a peer before it sleeps: about 0.1 ms. Waking it costs another 0.05.
_TRIES = 100
CONNECT_S = 30.0


@dataclass
class SharedMemory:
    """The slots of all ranks, and a socket to each other rank: for news, and for the news that it has ended."""

    rank: int
    peers: dict[int, socket.socket]
    memory: mmap.mmap
    timeout_s: float

    def __post_init__(self) -> None:
        self.size = len(self.peers) + 1
        everything = torch.frombuffer(self.memory, dtype=torch.uint8)
        self._slots = everything.view(2, self.size, SLOT_BYTES)
        self._turn = 0

    def average(self, values: Tensor) -> None:
        """Replace `values`, contiguous and of any dtype, by their mean over the ranks.

        Each rank divides its own by the number of ranks before they are added, as DDP does.

        Collective: every rank must call this.

        Raises:
            RuntimeError: another rank has ended, or did not call this within `timeout_s`.
        """
        for piece in values.view(-1).split(SLOT_BYTES // values.element_size()):
            slots = [self._slots[self._turn, rank].view(values.dtype)[: len(piece)] for rank in range(self.size)]
            torch.div(piece, self.size, out=slots[self.rank])
            self._meet()
            torch.add(slots[0], slots[1], out=piece)
            for slot in slots[2:]:
                piece.add_(slot)
            self._turn = 1 - self._turn

    def _meet(self) -> None:
        """Tell the other ranks that this one has written its slot, and wait for theirs.

        The system calls also order the memory: what a rank wrote before it sent is seen by those who received.
        """
        for rank, peer in self.peers.items():
            try:
                peer.send(b"!")
            except OSError as error:
                raise peer_ended(rank) from error
        for rank, peer in self.peers.items():
            try:
                news = self._receive(peer)
            except OSError as error:
                raise peer_ended(rank) from error
            if news is None:
                raise peer_is_late(rank, self.timeout_s)
            if not news:
                raise peer_ended(rank)

    def _receive(self, peer: socket.socket) -> bytes | None:
        """Return what the peer sent, nothing if it has ended, None if it is late."""
        for _ in range(_TRIES):
            try:
                return peer.recv(1)
            except BlockingIOError:
                os.sched_yield()
        waiting = select.poll()
        waiting.register(peer, select.POLLIN)
        return peer.recv(1) if waiting.poll(1000 * self.timeout_s) else None

    def close(self) -> None:
        for peer in self.peers.values():
            peer.close()


def share_memory(rank: int, size: int, gather: Callable[[Any], list[Any]], timeout_s: float) -> SharedMemory | str:
    """Connect this rank with all others of its host; return why not if they cannot share memory.

    `gather`: returns the objects of all ranks.

    Collective: every rank must call this.
    """
    if not hasattr(os, "memfd_create"):
        return "only Linux offers it"
    name = f"\0dist_train-{secrets.token_hex(16)}"  # no file, and known in this network namespace only
    with socket.socket(socket.AF_UNIX) as listener:
        host, problem = "", None
        try:
            host = host_identity()
            listener.bind(name)
            listener.listen(size)
            listener.settimeout(CONNECT_S)
        except OSError as error:
            problem = f"rank {rank}: {error}"
        everyone = gather((host, name, problem))
        problems: list[str] = [each for _, _, each in everyone if each is not None]
        if problems:
            return problems[0]
        if len({host for host, _, _ in everyone}) > 1:
            return "the processes are on several hosts or in several containers"
        shared = None
        try:
            shared = _connect(rank, [name for _, name, _ in everyone], listener, timeout_s)
        except OSError as error:
            problem = f"rank {rank}: {error}"
    # The listener is closed: whoever waits for a rank that failed is told now.
    problems = [each for each in gather(problem) if each is not None]
    if shared is not None and problems:
        shared.close()
    return problems[0] if shared is None or problems else shared


def _connect(rank: int, names: list[str], listener: socket.socket, timeout_s: float) -> SharedMemory:
    """Connect to the ranks below this one, accept those above, and map the memory, which rank zero sends to the others.

    Raises:
        OSError: a rank cannot be reached, or the system refuses the memory.
    """
    size = 2 * len(names) * SLOT_BYTES
    memory = -1
    peers: dict[int, socket.socket] = {}
    try:
        if rank == 0:
            memory = os.memfd_create("dist_train")  # in no file system: the /dev/shm of a container may be small
            os.truncate(memory, size)
        for other in range(rank):
            peers[other] = peer = socket.socket(socket.AF_UNIX)
            peer.settimeout(CONNECT_S)
            peer.connect(names[other])
            peer.sendall(rank.to_bytes(4, "little"))
            if other == 0:
                _, descriptors, _, _ = socket.recv_fds(peer, 1, 1)
                if not descriptors:
                    raise ConnectionError("rank 0 sent no memory")
                memory = descriptors[0]
        while len(peers) < len(names) - 1:
            peer, _ = listener.accept()
            uid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
            if uid != os.getuid():  # another user of this host, who has read the name in /proc/net/unix
                peer.close()
                continue
            peer.settimeout(CONNECT_S)
            peers[int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "little")] = peer
            if rank == 0:
                socket.send_fds(peer, [b"!"], [memory])
        shared = SharedMemory(rank, peers, mmap.mmap(memory, size), timeout_s)
    except OSError:
        for peer in peers.values():
            peer.close()
        raise
    finally:
        if memory >= 0:
            os.close(memory)
    for peer in peers.values():
        peer.setblocking(False)
    return shared


def host_identity() -> str:
    """Return what is the same for processes that can connect to each other by name: kernel and network namespace."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text()} {Path('/proc/self/ns/net').readlink()}"
