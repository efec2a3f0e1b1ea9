"""Promise 7: metrics.jsonl is always written, and no tracker can stop, slow or fail the training."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dist_train.config.loading import parse_config
from dist_train.config.schema import TrackingConfig
from dist_train.runs.directory import RunDir
from dist_train.training import tracking as module
from dist_train.training.tracking import Tracker, wandb_mode

LINES: list[dict[str, Any]] = [
    {"step": 2, "train/loss": 0.5, "train/grad_norm": None},
    {"step": 4, "train/loss": 0.25, "train/grad_norm": 1.5},
    {"step": 4, "val/accuracy": 0.9},
]

# --- W&B mode --------------------------------------------------------------------------------------------------------

KEY = {"WANDB_API_KEY": "x"}
MODES = [
    ("auto", {}, "offline"),
    ("auto", KEY, "online"),
    ("auto", {"WANDB_API_KEY": ""}, "offline"),
    ("online", {}, "online"),
    ("offline", KEY, "offline"),
    ("disabled", KEY, "disabled"),
    # An environment variable takes precedence over the file.
    ("online", {"WANDB_MODE": "offline"}, "offline"),
    ("disabled", {"WANDB_MODE": "online"}, "online"),
    ("online", {"WANDB_MODE": "disabled"}, "disabled"),
    ("online", {"WANDB_MODE": "dryrun"}, "offline"),
    ("offline", KEY | {"WANDB_MODE": ""}, "offline"),
    ("online", {"WANDB_DISABLED": "true"}, "disabled"),
    ("online", {"WANDB_DISABLED": "1", "WANDB_MODE": "online"}, "disabled"),
    ("auto", KEY | {"WANDB_DISABLED": "false"}, "online"),
]


@pytest.mark.parametrize(("setting", "env", "expected"), MODES)
def test_wandb_mode(setting: Any, env: dict[str, str], expected: str, tmp_path: Path) -> None:
    assert wandb_mode(TrackingConfig(wandb=setting), {"NETRC": str(tmp_path / "none")} | env) == expected


@pytest.mark.parametrize(
    ("netrc", "url", "expected"),
    [
        ("machine api.wandb.ai login user password key", "", "online"),
        ("machine elsewhere.org login user password key", "", "offline"),
        ("machine wandb.mine.org login user password key", "https://wandb.mine.org:8080/", "online"),
        ("machine api.wandb.ai login user password key", "https://wandb.mine.org", "offline"),
        ("not a netrc", "", "offline"),
        ("\xff\xfe", "", "offline"),
    ],
)
def test_api_key_in_netrc(netrc: str, url: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "netrc"
    path.write_bytes(netrc.encode("latin-1"))
    path.chmod(0o600)
    env = {"NETRC": str(path)} | ({"WANDB_BASE_URL": url} if url else {})
    assert wandb_mode(TrackingConfig(), env) == expected


# --- sinks -----------------------------------------------------------------------------------------------------------


class Recorder:
    """A sink that keeps its lines, and may fail at the n-th one."""

    def __init__(self, fails_at: int = 0) -> None:
        self.lines: list[tuple[int | None, dict[str, Any]]] = []
        self.finished = False
        self._fails_at = fails_at

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.lines.append((step, values))
        if len(self.lines) == self._fails_at:
            raise ConnectionError("no route to host")

    def finish(self) -> None:
        self.finished = True


def tracker_with(
    wandb: Any,
    tensorboard: Any,
    run_dir: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    enabled: bool = True,
    settings: dict[str, Any] | None = None,
) -> Tracker:
    for name, sink in {"start_wandb": wandb, "start_tensorboard": tensorboard}.items():

        def start(*_: object, sink: Any = sink) -> Any:
            if isinstance(sink, Exception):
                raise sink
            return sink

        start.__name__ = name
        monkeypatch.setattr(module, name, start)
    return Tracker(run_dir, parse_config({"tracking": settings or {}}), {}, enabled=enabled)


WITHOUT_NONE = [(line["step"], {k: v for k, v in line.items() if v is not None}) for line in LINES]


def test_every_line_reaches_file_and_sinks(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = Recorder()
    tracker = tracker_with(sink, None, run_dir, monkeypatch)
    for number, line in enumerate(LINES, start=1):
        tracker.log(line)
        assert len(list(run_dir.metrics.read())) == number  # immediately
    tracker.finish({})
    assert list(run_dir.metrics.read()) == LINES
    assert sink.lines == WITHOUT_NONE
    assert sink.finished


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_failing_sink_is_dropped(
    fails_at: int, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Recorder(fails_at), Recorder()
    tracker = tracker_with(bad, good, run_dir, monkeypatch)
    for line in LINES:
        tracker.log(line)
    tracker.finish({})
    assert list(run_dir.metrics.read()) == LINES
    assert (len(bad.lines), good.lines) == (fails_at, WITHOUT_NONE)
    assert caplog.messages == ["Recorder failed: no route to host. The run continues without it."]


def test_tracker_that_does_not_start_is_dropped(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sink = Recorder()
    tracker = tracker_with(ImportError("no wandb here"), sink, run_dir, monkeypatch)
    tracker.log(LINES[0])
    tracker.finish({})
    assert sink.lines == WITHOUT_NONE[:1]
    assert caplog.messages == ["wandb: no wandb here. The run continues without it."]


def test_hanging_sink_does_not_block(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = threading.Event()

    class Hanging(Recorder):
        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            free.wait(30)

    caplog.set_level("INFO")
    tracker = tracker_with(Hanging(), None, run_dir, monkeypatch, settings={"timeout_s": 0.1})
    started = time.monotonic()
    for _ in range(100):
        tracker.log(LINES[1])
    tracker.finish({})
    assert time.monotonic() - started < 25
    free.set()
    assert len(list(run_dir.metrics.read())) == 100
    assert caplog.text.index("waiting for W&B") < caplog.text.index("W&B did not finish within")


def test_other_ranks_track_nothing(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = tracker_with(AssertionError("started"), None, run_dir, monkeypatch, enabled=False)
    tracker.log(LINES[0])
    tracker.finish({})
    assert not run_dir.metrics.path.exists()
