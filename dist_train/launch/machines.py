"""Several machines that train together, each with its own launcher: the rendezvous, and machines that join late."""

from __future__ import annotations

import math
import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass

from dist_train.atomic_files import write_atomically
from dist_train.config.batch_plan import BatchPlan
from dist_train.config.schema import Config
from dist_train.errors import ConfigError, LaunchError
from dist_train.runs import heartbeat
from dist_train.runs.directory import RunDir
from dist_train.runs.status_file import ENDS

_PORT = 29_400  # torchrun's default
_REJOIN_REQUEST = "PREEMPTED\n"  # written to STOP by a machine that joins


@dataclass(frozen=True)
class Nodes:
    """The machines that train together, each with its own launcher."""

    at_least: int
    at_most: int
    endpoint: str  # HOST:PORT
    join_timeout_s: float  # how long they wait for each other

    @classmethod
    def parse(cls, text: str, endpoint: str, join_timeout_s: float) -> Nodes:
        """Parse a number of machines such as "2", or a range such as "1:4".

        Raises:
            ConfigError: `text` is neither.
            LaunchError: the endpoint's host cannot be resolved.
        """
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= least <= most:
            raise ConfigError(f"--nnodes={text} is not a number of machines. Write 2, or 1:4 for one to four.")
        host, _, port = endpoint.partition(":")
        try:
            socket.getaddrinfo(host, None)
        except (OSError, UnicodeError):  # UnicodeError: not a valid host name
            raise LaunchError(
                f'--rdzv-endpoint={endpoint}: "{host}" cannot be resolved on {socket.gethostname()}. '
                f"Write the name or address of one of the machines."
            ) from None
        return cls(least, most, f"{host}:{port or _PORT}", join_timeout_s)

    def options(self, run_dir: RunDir) -> list[str]:
        """Return torchrun's options. The rendezvous id names the next attempt: late machines must not join this one."""
        attempt = run_dir.status.read().get("attempt", 0) + 1
        number = f"{self.at_least}" if self.at_least == self.at_most else f"{self.at_least}:{self.at_most}"
        return [
            f"--nnodes={number}", "--rdzv-backend=c10d", f"--rdzv-endpoint={self.endpoint}",
            f"--rdzv-id={run_dir.path.name}.{attempt}",
            # last_call_timeout: how long a smaller world waits for more machines.
            f"--rdzv-conf=join_timeout={math.ceil(self.join_timeout_s)},last_call_timeout=10",
        ]  # fmt: skip


def find_nodes(
    nnodes: str | None, endpoint: str | None, run_name: str | None, nproc: int, config: Config
) -> Nodes | None:
    """Return the machines that `launch --nnodes` asks for, None for this one alone.

    Every number of machines that may meet is checked.

    Raises:
        ConfigError: The options do not fit together, or the batch cannot be divided among so many.
        LaunchError: As `Nodes.parse`.
    """
    outside = os.environ.get("PET_NNODES") or "1"
    if nnodes is None and outside not in ("1", "1:1"):
        raise ConfigError(
            f"PET_NNODES={outside} from outside asks torchrun for several machines. Start with launch "
            f"--nnodes={outside} --rdzv-endpoint={os.environ.get('PET_MASTER_ADDR') or 'HOST'}, or unset PET_NNODES to "
            f"train on this machine alone."
        )
    nnodes = "1" if nnodes is None else nnodes
    if nnodes == "1" and endpoint is None:
        return None
    if endpoint is None or not run_name:
        raise ConfigError(
            f"--nnodes={nnodes} needs --rdzv-endpoint=HOST, where the machines meet, and --run-name=N, so that they "
            f"train one run: give both, the same on each."
        )
    nodes = Nodes.parse(nnodes, endpoint, config.setup_timeout_s)
    for number in range(nodes.at_least, nodes.at_most + 1):
        BatchPlan.of(config, number * nproc)
    return nodes


def stop_run_to_rejoin(run_dir: RunDir) -> None:
    """Make the machines that train this run save and stop, so that it restarts with this machine too.

    torchrun itself can admit a machine while its ranks run, but then its agents often wait for each other (torch 2.13).
    """
    seen, seen_at = run_dir.status.read().get("heartbeat"), time.monotonic()
    while time.monotonic() - seen_at < heartbeat.GONE_S:  # detects changes only: the clocks of two machines may differ
        status = run_dir.status.read()
        if status.get("state") in (None, *ENDS):
            break
        if status.get("heartbeat") != seen:
            seen, seen_at = status.get("heartbeat"), time.monotonic()
            if not run_dir.stop_request_file.exists():
                write_atomically(run_dir.stop_request_file, _REJOIN_REQUEST, durable=False)
        time.sleep(0.5)
    with suppress(FileNotFoundError):  # somebody else's STOP stays
        if run_dir.stop_request_file.read_bytes() == _REJOIN_REQUEST.encode():
            run_dir.stop_request_file.unlink()
