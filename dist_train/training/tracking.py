"""Metrics to metrics.jsonl, mirrored to W&B and TensorBoard through Accelerate's trackers. Rank zero only.

metrics.jsonl is the truth and is written at once. The mirrors get it from a thread of their own: a tracker that is
slow, absent or broken cannot stop or slow the training, it is named in the log and left out.
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

from dist_train.checkpoints.manifest import MODEL, best_checkpoint, manifests
from dist_train.config.paths import cache_stand_in
from dist_train.config.schema import Config, TrackingConfig
from dist_train.distributed.world import first_line
from dist_train.errors import DistTrainError, RunDirError
from dist_train.runs.directory import RunDir

_SOON_S = 2.0  # a wait that is not worth a word

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """What we use of an Accelerate tracker."""

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None: ...

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None: ...

    def finish(self) -> None: ...


@runtime_checkable
class _WandbSink(Sink, Protocol):
    run: Any  # W&B's own


class Tracker:
    """Takes every line of metrics. Made on all ranks; on others than rank zero it does nothing."""

    def __init__(self, run_dir: RunDir, config: Config, provenance: Mapping[str, Any], *, enabled: bool) -> None:
        self._run_dir = run_dir
        self._enabled = enabled
        self._mirror = _Mirror(run_dir, config, provenance) if enabled else None

    def log(self, line: dict[str, Any]) -> None:
        """One line of metrics; `line["step"]` is its place on the x-axis."""
        if self._mirror is not None:
            self._run_dir.append_metrics(line)
            self._mirror.put(line)

    def finish(self, summary: Mapping[str, Any], pictures: Mapping[str, bytes] | None = None) -> None:
        """`summary`: the final results, empty where there are none yet; `pictures`: PNGs by name."""
        if self._mirror is not None:
            self._mirror.finish(summary, pictures or {})


class _Mirror:
    """A thread that owns the trackers."""

    def __init__(self, run_dir: RunDir, config: Config, provenance: Mapping[str, Any]) -> None:
        self._run_dir = run_dir
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._artifact = config.tracking.artifact
        self._timeout_s = config.tracking.timeout_s
        self._summary: Mapping[str, Any] = {}
        self._pictures: Mapping[str, bytes] = {}
        self._thread = threading.Thread(target=self._run, args=(config, provenance), name="tracking", daemon=True)
        self._thread.start()

    def put(self, line: dict[str, Any]) -> None:
        if self._thread.is_alive():
            self._queue.put(line)

    def finish(self, summary: Mapping[str, Any], pictures: Mapping[str, bytes]) -> None:
        self._summary, self._pictures = summary, pictures
        self._queue.put(None)
        soon_s = min(_SOON_S, self._timeout_s)
        self._thread.join(soon_s)
        if self._thread.is_alive():
            _log.info("waiting for W&B to take what is left, for %g s at most", self._timeout_s)
            self._thread.join(self._timeout_s - soon_s)  # its files remain whatever happens
        if self._thread.is_alive():
            _log.warning(
                "W&B did not take all within tracking.timeout_s=%g. Later: dist-train wandb sync %s",
                self._timeout_s, self._run_dir.path,
            )  # fmt: skip

    def _run(self, config: Config, provenance: Mapping[str, Any]) -> None:
        sinks: list[Sink] = []
        for start in (start_wandb, start_tensorboard):
            # Whatever a tracker raises, the training goes on without it.
            try:
                sink = start(self._run_dir, config, provenance)
            except Exception as error:
                _log.warning("%s: %s. The run goes on without it.", start.__name__.removeprefix("start_"), error)
            else:
                sinks += [sink] if sink else []
        while (line := self._queue.get()) is not None:
            for sink in list(sinks):
                try:
                    sink.log({key: value for key, value in line.items() if value is not None}, step=line["step"])
                except Exception as error:
                    _log.warning("%s failed: %s. The run goes on without it.", type(sink).__name__, error)
                    sinks.remove(sink)
        for sink in sinks:
            for part in (self._log_summary, self._log_artifact, self._log_pictures):
                try:
                    part(sink)
                except Exception as error:
                    _log.warning("%s failed at the end: %s", type(sink).__name__, first_line(error))
            with suppress(Exception):
                sink.finish()

    def _log_summary(self, sink: Sink) -> None:
        if isinstance(sink, _WandbSink):
            sink.run.summary.update(dict(self._summary))

    def _log_artifact(self, sink: Sink) -> None:
        if not (self._artifact and self._summary and isinstance(sink, _WandbSink)):
            return
        import wandb

        there = manifests(self._run_dir)
        found = {"best": best_checkpoint(self._run_dir), "last": next(iter(there), None)}
        alias, folder = next((alias, folder) for alias, folder in found.items() if folder is not None)
        about = {name: there[folder][name] for name in ("step", "score")}
        artifact = wandb.Artifact(f"{sink.run.id}-model", type="model", metadata=about)
        # Not copied: an offline run is sent from where it lies.
        artifact.add_file(str(folder / MODEL), policy="immutable")
        sink.run.log_artifact(artifact, aliases=[alias])

    def _log_pictures(self, sink: Sink) -> None:
        import numpy as np
        from PIL import Image

        for name, picture in self._pictures.items():
            # As a batch of one, which is how Accelerate's trackers take pictures.
            pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))[None]
            if not isinstance(sink, _WandbSink):
                pixels = pixels.transpose(0, 3, 1, 2)  # TensorBoard wants the channels first
            sink.log_images({f"pictures/{name}": pixels}, step=self._summary["step"])


def sync(runs: Iterable[RunDir]) -> None:
    """Send to W&B what it has not got of these runs, in the order in which it was recorded.

    Raises:
        RunDirError: of one of them nothing was recorded.
        DistTrainError: W&B has not confirmed all of it.
    """
    folders: list[Path] = []
    for run_dir in runs:
        # Of those recorded online W&B cannot tell which it got whole; what is sent twice is there once.
        found = [*run_dir.path.glob("wandb/run-*"), *run_dir.path.glob("wandb/offline-run-*")]
        if not found:
            raise RunDirError(f"{run_dir.path} has nothing that W&B recorded in {run_dir.path / 'wandb'}.")
        folders += sorted(found, key=lambda folder: folder.name.removeprefix("offline-"))
    from wandb.cli.cli import cli

    cli.main(["sync", "--no-skip-online", *map(str, folders)], standalone_mode=False)
    # Its exit code is 0 whatever became of them; what it has whole it marks.
    doubtful = [str(folder) for folder in folders if not any(folder.glob("*.synced"))]
    if doubtful:
        raise DistTrainError(
            f"W&B has not confirmed that it has all of {', '.join(doubtful)}. Of a run that was cut off while online "
            f"it may never do so: its page shows whether the last step is there. Else see above, and sync again."
        )


def wandb_mode(config: TrackingConfig, env: Mapping[str, str]) -> str:
    """online, offline or disabled; decided before W&B is asked, since it would ask on a terminal for a key.

    WANDB_MODE wins, then `tracking.wandb`; auto is online where a key is there.
    """
    explicit = env.get("WANDB_MODE", "")
    if env.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return "disabled"
    if explicit in ("online", "offline", "disabled"):
        return explicit
    if explicit == "dryrun":  # W&B's old name for it
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
    settings = config.tracking
    mode = wandb_mode(settings, os.environ)
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    if (cache := cache_stand_in()) is not None:  # W&B would print its log where it cannot write it
        os.environ.setdefault("WANDB_CACHE_DIR", str(cache / "wandb"))
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # W&B's own telemetry, which may fail
    import wandb
    from accelerate.tracking import WandBTracker

    init = {
        "dir": str(run_dir.path),
        # One W&B run over all attempts.
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
            "W&B cannot be reached: %s. The run is recorded offline. Later: dist-train wandb sync %s",
            first_line(error).rstrip("."), run_dir.path,
        )  # fmt: skip
        wandb.teardown()  # its service holds on to the run that did not start
        mode = "offline"
        tracker = WandBTracker(project, mode=mode, **init)
        tracker.start()
    tracker.run.config.update({**config.flat(), "facts": dict(provenance)}, allow_val_change=True)
    tracker.run.define_metric("samples")
    tracker.run.define_metric("*", step_metric="step")
    _log.info("W&B: %s, run %s in %s", mode, init["id"], run_dir.path / "wandb")
    return tracker  # type: ignore[no-any-return]


def _tags(settings: TrackingConfig, provenance: Mapping[str, Any]) -> list[str]:
    told = [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag.strip()]
    precision = {"no": "fp32"}.get(provenance["mixed_precision"], provenance["mixed_precision"])
    return [
        *(told or settings.tags),
        f"world_size={provenance['world_size']}",
        str(precision),
        str(provenance["device"]),
    ]


def start_tensorboard(run_dir: RunDir, config: Config, provenance: Mapping[str, Any]) -> Sink | None:
    if not config.tracking.tensorboard:
        return None
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker(run_name="tensorboard", logging_dir=str(run_dir.path))
    tracker.start()
    return tracker  # type: ignore[no-any-return]
