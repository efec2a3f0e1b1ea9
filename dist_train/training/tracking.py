"""Metrics in metrics.jsonl, mirrored to W&B and TensorBoard through Accelerate's trackers. Rank zero only.

metrics.jsonl is authoritative and written immediately. A separate thread feeds the mirrors: a tracker that is slow,
missing or broken cannot stop or slow the training. It is named in the log and dropped.
"""

from __future__ import annotations

import io
import logging
import netrc
import os
import queue
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlparse

from dist_train.checkpoints.contents import MODEL
from dist_train.checkpoints.manifest import best_checkpoint, manifests
from dist_train.config.paths import temporary_cache
from dist_train.config.schema import Config, TrackingConfig
from dist_train.distributed.import_lock import IMPORT_LOCK
from dist_train.distributed.peer_failures import first_line
from dist_train.errors import DistTrainError, RunDirError
from dist_train.runs.directory import RunDir

_SILENT_WAIT_S = 2.0  # a longer wait is logged

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """The part of an Accelerate tracker that is used here."""

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None: ...

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None: ...

    def finish(self) -> None: ...


@runtime_checkable
class _WandbSink(Sink, Protocol):
    run: Any  # of W&B


class Tracker:
    """Records the metric lines. Exists on all ranks; does nothing except on rank zero."""

    def __init__(self, run_dir: RunDir, config: Config, provenance: Mapping[str, Any], *, enabled: bool) -> None:
        self._run_dir = run_dir
        self._enabled = enabled
        self._mirror = _Mirror(run_dir, config, provenance) if enabled else None

    def log(self, line: dict[str, Any]) -> None:
        """Record one line of metrics; `line["step"]` is its position on the x-axis."""
        if self._mirror is not None:
            self._run_dir.append_metrics(line)
            self._mirror.put(line)

    def finish(self, summary: Mapping[str, Any], pictures: Mapping[str, bytes] | None = None) -> None:
        """Finish the trackers. `summary`: the final results, {} if there are none yet; `pictures`: PNGs by name."""
        if self._mirror is not None:
            self._mirror.finish(summary, pictures or {})

    def abandon(self) -> None:
        """Mark the run as failed in W&B, waiting for a moment at most."""
        if self._mirror is not None:
            self._mirror.abandon()


class _Mirror:
    """A thread that owns the trackers."""

    def __init__(self, run_dir: RunDir, config: Config, provenance: Mapping[str, Any]) -> None:
        self._run_dir = run_dir
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._artifact = config.tracking.artifact
        self._timeout_s = config.tracking.timeout_s
        self._summary: Mapping[str, Any] = {}
        self._pictures: Mapping[str, bytes] = {}
        self._failed = False
        self._thread = threading.Thread(target=self._run, args=(config, provenance), name="tracking", daemon=True)
        self._thread.start()

    def put(self, line: dict[str, Any]) -> None:
        if self._thread.is_alive():
            self._queue.put(line)

    def abandon(self) -> None:
        self._failed = True
        self._queue.put(None)
        self._thread.join(min(_SILENT_WAIT_S, self._timeout_s))

    def finish(self, summary: Mapping[str, Any], pictures: Mapping[str, bytes]) -> None:
        self._summary, self._pictures = summary, pictures
        self._queue.put(None)
        silent_s = min(_SILENT_WAIT_S, self._timeout_s)
        self._thread.join(silent_s)
        if self._thread.is_alive():
            _log.info("waiting for W&B to finish, for at most %g s", self._timeout_s)
            self._thread.join(self._timeout_s - silent_s)  # W&B's local files remain in any case
        if self._thread.is_alive():
            _log.warning(
                "W&B did not finish within tracking.timeout_s=%g. Upload the rest later: dist-train wandb sync %s",
                self._timeout_s, self._run_dir.path,
            )  # fmt: skip

    def _run(self, config: Config, provenance: Mapping[str, Any]) -> None:
        sinks: list[Sink] = []
        for start in (start_wandb, start_tensorboard):
            # The training continues without the tracker, whatever it raises.
            try:
                sink = start(self._run_dir, config, provenance)
            except Exception as error:
                _log.warning("%s: %s. The run continues without it.", start.__name__.removeprefix("start_"), error)
            else:
                sinks += [sink] if sink else []
        while (line := self._queue.get()) is not None:
            for sink in list(sinks):
                try:
                    sink.log({key: value for key, value in line.items() if value is not None}, step=line["step"])
                except Exception as error:
                    _log.warning("%s failed: %s. The run continues without it.", type(sink).__name__, error)
                    sinks.remove(sink)
        for sink in sinks:
            for part in () if self._failed else (self._log_summary, self._log_artifact, self._log_pictures):
                try:
                    part(sink)
                except Exception as error:
                    _log.warning("%s failed at the end: %s", type(sink).__name__, first_line(error))
            with suppress(Exception):
                if self._failed and isinstance(sink, _WandbSink):
                    sink.run.finish(exit_code=1)
                else:
                    sink.finish()

    def _log_summary(self, sink: Sink) -> None:
        if isinstance(sink, _WandbSink):
            sink.run.summary.update(dict(self._summary))

    def _log_artifact(self, sink: Sink) -> None:
        if not (self._artifact and self._summary and isinstance(sink, _WandbSink)):
            return
        import wandb

        checkpoints = manifests(self._run_dir)
        candidates = {"best": best_checkpoint(self._run_dir), "last": next(iter(checkpoints), None)}
        alias, folder = next((alias, folder) for alias, folder in candidates.items() if folder is not None)
        metadata = {name: checkpoints[folder][name] for name in ("step", "score")}
        artifact = wandb.Artifact(f"{sink.run.id}-model", type="model", metadata=metadata)
        # Not copied: an offline run is uploaded from this path.
        artifact.add_file(str(folder / MODEL), policy="immutable")
        sink.run.log_artifact(artifact, aliases=[alias])

    def _log_pictures(self, sink: Sink) -> None:
        import numpy as np
        from PIL import Image

        for name, picture in self._pictures.items():
            # Accelerate's trackers take a batch of images: here a batch of one.
            pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))[None]
            if not isinstance(sink, _WandbSink):
                pixels = pixels.transpose(0, 3, 1, 2)  # TensorBoard expects channels first
            sink.log_images({f"pictures/{name}": pixels}, step=self._summary["step"])


def sync(runs: Iterable[RunDir]) -> None:
    """Upload to W&B what it lacks of these runs, in the order of recording.

    Raises:
        RunDirError: a run has no W&B recording.
        DistTrainError: W&B has not confirmed the whole upload.
    """
    folders: list[Path] = []
    for run_dir in runs:
        # W&B cannot tell which online recordings it has completely; a repeated upload makes no duplicates.
        recorded = [*run_dir.path.glob("wandb/run-*"), *run_dir.path.glob("wandb/offline-run-*")]
        if not recorded:
            raise RunDirError(f"{run_dir.path} has no W&B recording in {run_dir.path / 'wandb'}.")
        folders += sorted(recorded, key=lambda folder: folder.name.removeprefix("offline-"))
    from wandb.cli.cli import cli

    cli.main(["sync", "--no-skip-online", *map(str, folders)], standalone_mode=False)
    # The exit code is always 0; W&B marks each complete upload with a file.
    unconfirmed = [str(folder) for folder in folders if not any(folder.glob("*.synced"))]
    if unconfirmed:
        raise DistTrainError(
            f"W&B has not confirmed the whole upload of {', '.join(unconfirmed)}. For a run that was cut off while "
            f"online it may never do so: check its page for the last step. Otherwise see above, and sync again."
        )


def wandb_mode(config: TrackingConfig, env: Mapping[str, str]) -> str:
    """Return online, offline or disabled. Decided before W&B starts, which would prompt for a key on a terminal.

    WANDB_MODE takes precedence over `tracking.wandb`; auto is online if there is a key.
    """
    explicit = env.get("WANDB_MODE", "")
    if env.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return "disabled"
    if explicit in ("online", "offline", "disabled"):
        return explicit
    if explicit == "dryrun":  # W&B's old name for offline
        return "offline"
    if config.wandb != "auto":
        return config.wandb
    return "online" if _has_key(env) else "offline"


def _has_key(env: Mapping[str, str]) -> bool:
    if env.get("WANDB_API_KEY"):
        return True
    host = urlparse(env.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(env.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return False


def start_wandb(run_dir: RunDir, config: Config, provenance: Mapping[str, Any]) -> Sink | None:
    """Start the W&B tracker, offline if W&B cannot be reached; None if it is disabled."""
    settings = config.tracking
    mode = wandb_mode(settings, os.environ)
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    if (cache := temporary_cache()) is not None:  # W&B prints its log if it cannot write it
        os.environ.setdefault("WANDB_CACHE_DIR", str(cache / "wandb"))
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # W&B's own telemetry, which may fail
    with IMPORT_LOCK:
        import wandb
        from accelerate.tracking import WandBTracker

    init = {
        "dir": str(run_dir.path),
        # One W&B run for all attempts.
        "id": os.environ.get("WANDB_RUN_ID") or run_dir.run_id,
        "resume": "allow",
        "name": os.environ.get("WANDB_NAME") or settings.name or run_dir.path.name,
        "entity": os.environ.get("WANDB_ENTITY") or settings.entity,
        "group": os.environ.get("WANDB_RUN_GROUP") or settings.group or os.environ.get("WANDB_SWEEP_ID"),
        "job_type": os.environ.get("WANDB_JOB_TYPE") or settings.job_type,
        "tags": _tags(settings, provenance),
        "settings": wandb.Settings(console="off", init_timeout=settings.timeout_s / 2, x_disable_stats=True),
    }
    project = os.environ.get("WANDB_PROJECT") or settings.project
    try:
        tracker = WandBTracker(project, mode=mode, **init)
        tracker.start()
    except Exception as error:
        if mode == "offline":
            raise
        _log.warning(
            "W&B cannot be reached: %s. The run is recorded offline. Upload it later: dist-train wandb sync %s",
            first_line(error).rstrip("."), run_dir.path,
        )  # fmt: skip
        wandb.teardown()  # its service still holds the run that did not start
        mode = "offline"
        tracker = WandBTracker(project, mode=mode, **init)
        tracker.start()
    tracker.run.config.update({**config.flat(), "facts": dict(provenance)}, allow_val_change=True)
    tracker.run.define_metric("samples")
    tracker.run.define_metric("*", step_metric="step")
    _log.info("W&B: %s, run %s in %s", mode, init["id"], run_dir.path / "wandb")
    return tracker  # type: ignore[no-any-return]


def _tags(settings: TrackingConfig, provenance: Mapping[str, Any]) -> list[str]:
    from_env = [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag.strip()]
    precision = {"no": "fp32"}.get(provenance["mixed_precision"], provenance["mixed_precision"])
    return [
        *(from_env or settings.tags),
        f"world_size={provenance['world_size']}",
        str(precision),
        str(provenance["device"]),
    ]


def start_tensorboard(run_dir: RunDir, config: Config, provenance: Mapping[str, Any]) -> Sink | None:
    """Start the TensorBoard tracker; None if it is not asked for."""
    if not config.tracking.tensorboard:
        return None
    with IMPORT_LOCK:
        from accelerate.tracking import TensorBoardTracker

        tracker = TensorBoardTracker(run_name="tensorboard", logging_dir=str(run_dir.path))
        tracker.start()  # imports most of it
    return tracker  # type: ignore[no-any-return]
