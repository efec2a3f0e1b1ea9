"""Two hosts share one folder of runs, each with its own keeper."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from dist_train.runs.directory import RunDir
from dist_train.runs.summary import summarise
from support.hosts import REASON, Hosts, can_be_made
from support.patience import wait_until
from support.queue_jobs import trace

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(not can_be_made(), reason=REASON)]

# Arguments: names of jobs.
QUEUE = """
import sys
from pathlib import Path
from dist_train.launch.job_queue import ensure_keeper
from support.queue_jobs import queued
queued(Path.cwd(), *sys.argv[1:])
ensure_keeper(Path("runs"))
"""


def test_two_hosts_do_not_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    def state(name: str) -> str:
        return summarise(RunDir(tmp_path / "runs" / name).path).state

    with Hosts(tmp_path / "hosts", ["node1", "node2"]) as hosts:
        for host, names in (("node1", ("a", "b")), ("node2", ("c", "d"))):
            done = hosts.run(host, sys.executable, "-c", QUEUE, *names)
            assert done.returncode == 0, done.stderr
        wait_until(lambda: {*trace(tmp_path)} == {"begin a", "begin c"}, "one job on each host")
        assert [state(name) for name in "abcd"] == ["STARTING", "QUEUED", "STARTING", "QUEUED"]
        listed = hosts.run("node1", "dist-train", "queue", "ls").stdout.splitlines()
        assert [line.split()[::5] for line in listed[1:]] == [["-", "node1"], ["1", "node1"], ["1", "node2"]]
        hosts.crash("node2")
        (tmp_path / "go.a").touch()
        wait_until(lambda: "begin b" in trace(tmp_path), "the next job of the host that is left")
        assert [state(name) for name in "cd"] == ["KILLED", "QUEUED"]
        (tmp_path / "go").touch()
        wait_until(lambda: "end b" in trace(tmp_path), "the end of that job")
        assert hosts.run("node1", "dist-train", "queue", "ls").returncode == 0
        assert "begin d" not in trace(tmp_path)  # it waits for its own host
        hosts.reconnect("node2")
        hosts.boot("node2")
        assert hosts.run("node2", "dist-train", "queue", "ls").returncode == 0
        wait_until(lambda: "end d" in trace(tmp_path), "the job of the host that is back")
    assert sorted(trace(tmp_path)) == ["begin a", "begin b", "begin c", "begin d", "end a", "end b", "end d"]
