"""Several hosts on one machine: network namespaces with their own names, addresses and processes, on one switch.

Files are shared, as on a cluster. The machine's own network is neither changed nor reachable. Needs root.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from support.patience import wait_until

NEEDS = ("ip", "nsenter", "unshare")
REASON = "needs root and iproute2: apt-get install -y --no-install-recommends iproute2"


def can_be_made() -> bool:
    return os.geteuid() == 0 and all(map(shutil.which, NEEDS))


# Process 1 of a host: it reaps orphans, and its death kills every process of the host.
_INIT = """
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs -o size=1g tmpfs /dev/shm
: > "$2/ready.$1"
while :; do sleep 1000 & wait $!; done
"""


_groups = itertools.count()


class Hosts:
    """Hosts that are up inside `with Hosts(folder, ["a", "b"]) as hosts` and removed on exit."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.names = list(names)
        # Namespace names are global to the machine, and a process may have several groups of hosts.
        self._prefix = f"dt{os.getpid()}.{next(_groups)}"
        self._switch = f"{self._prefix}-switch"
        self._inits: dict[str, subprocess.Popen[bytes]] = {}
        self._disconnected: set[str] = set()

    def address(self, name: str) -> str:
        return f"10.77.0.{self.names.index(name) + 1}"

    def __enter__(self) -> Hosts:
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in self.names)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")  # no DNS to wait for
        try:
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "br0", "up")
            for name in self.names:
                space = f"{self._prefix}-{name}"
                _ip("netns", "add", space)
                _ip("-n", space, "link", "set", "lo", "up")
                _ip("-n", self._switch, "link", "add", self._port(name), "type", "veth", "peer", "eth0", "netns", space)
                _ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
                _ip("-n", space, "link", "set", "eth0", "up")
                self.reconnect(name)
                self.boot(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            self._halt(name)
        for space in (*(f"{self._prefix}-{name}" for name in self.names), self._switch):
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", space)

    # --- host failures --------------------------------------------------------------------------------------------

    def disconnect(self, name: str) -> None:
        """Drop the packets of a host at the switch; the host still sees its link up."""
        _ip("-n", self._switch, "link", "set", self._port(name), "nomaster")
        self._disconnected.add(name)

    def reconnect(self, name: str) -> None:
        _ip("-n", self._switch, "link", "set", self._port(name), "master", "br0", "up")
        self._disconnected.discard(name)

    def crash(self, name: str) -> None:
        """Power off a host without closing connections. It stays disconnected until `reconnect`."""
        self.disconnect(name)
        self._halt(name)

    def boot(self, name: str) -> None:
        """Start a host without processes."""
        ready = self.folder / f"ready.{name}"
        ready.unlink(missing_ok=True)
        self._inits[name] = subprocess.Popen(
            [
                "nsenter", f"--net=/run/netns/{self._prefix}-{name}",
                "unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL",
                "bash", "-c", _INIT, "init", name, str(self.folder),
            ],
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        wait_until(lambda: ready.exists() or self._inits[name].poll() is not None, f"host {name}")
        assert ready.exists(), f"{name} did not come up"

    # --- processes ------------------------------------------------------------------------------------------------

    def command(self, name: str, *command: object) -> list[str]:
        """Return the command line that runs `command` on a host, in the current folder."""
        outer = self._inits[name].pid
        inner = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0]
        spaces = ("--net", "--uts", "--mount", "--pid")
        return ["nsenter", "-t", inner, *spaces, f"--wdns={Path.cwd()}", "--", *map(str, command)]

    def run(
        self, name: str, *command: object, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(name, *command), capture_output=True, text=True, env=os.environ | (env or {}), **options
        )

    def _port(self, name: str) -> str:
        return f"port{self.names.index(name) + 1}"

    def _halt(self, name: str) -> None:
        init = self._inits.pop(name, None)
        if init is not None:
            with suppress(ProcessLookupError):
                os.killpg(init.pid, signal.SIGKILL)
            init.wait()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
