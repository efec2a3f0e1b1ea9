"""Everything that the files of one run, and Slurm, say about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_train.checkpoints.manifest import manifests
from dist_train.checkpoints.resume_hint import resume_hint
from dist_train.launch.job_queue import places, waiting_jobs
from dist_train.launch.jobs import is_active, unfinished_jobs
from dist_train.launch.slurm.commands import Job
from dist_train.runs.directory import RunDir
from dist_train.runs.error_report import describe_error
from dist_train.runs.reports.compare import LoadedRun, read_run
from dist_train.runs.summary import NOT_BEGUN, Summary
from dist_train.runs.time_accounting import effective_ratio


def run_details(path: Path) -> list[tuple[str, str]]:
    """Return rows of (name, text) for people.

    Raises:
        RunDirError: There is no run.
    """
    run = read_run(path)
    summary, run_dir = run.summary, run.summary.run_dir
    job = unfinished_jobs([summary]).get(summary.job or "")
    return [
        ("run", str(run_dir.path)),
        ("state", f"{summary.state}, last seen {summary.age_text} ago"),
        ("progress", f"{summary.progress_text}, start {summary.attempt}, world size {summary.world_size or '-'}"),
        *_computation(run_dir),
        *_metrics(run),
        *_speed(summary),
        ("checkpoints", ", ".join(path.name for path in manifests(run_dir)) or "none"),
        *_end(summary, job),
    ]


def _computation(run_dir: RunDir) -> list[tuple[str, str]]:
    provenance = run_dir.read_provenance()
    if "device" not in provenance:  # it did not reach training
        return []
    device, threads, mode, precision = (
        provenance.get(name, "?") for name in ("device", "num_threads", "step_mode", "mixed_precision")
    )
    return [("computed by", f"{device}, {threads} threads a rank, {mode} step, mixed precision {precision}")]


def _metrics(run: LoadedRun) -> list[tuple[str, str]]:
    """The newest value of each."""
    newest: dict[str, Any] = {}
    for line in run.lines:
        newest |= {key: value for key, value in line.items() if "/" in key and not key.startswith(("perf/", "audit/"))}
    newest |= {key: value for key, value in run.summary.result.items() if "/" in key}
    return [(key, f"{value:g}") for key, value in sorted(newest.items()) if isinstance(value, (int, float))]


def _speed(summary: Summary) -> list[tuple[str, str]]:
    rows = []
    if summary.samples_per_s:
        rows.append(("samples/s", f"{summary.samples_per_s:,.0f}"))
    if seconds := summary.seconds:
        spent = ", ".join(f"{use} {value:.1f}" for use, value in seconds.items() if value)
        rows.append(("seconds", f"{spent}; {effective_ratio(seconds):.1%} of them new steps"))
    return rows


def _end(summary: Summary, job: Job | None) -> list[tuple[str, str]]:
    """The job, its place in the queue, the error, and how to resume a run that ended early."""
    rows, run_dir = [], summary.run_dir
    if summary.state == "QUEUED":
        place = places(waiting_jobs(run_dir.path.parent)).get(summary.name)
        rows.append(("queue", f"place {place} on {summary.queue_host}"))
    if summary.state == "CREATED":
        rows.append(("to begin", f"dist-train queue add {run_dir.path}"))
    if summary.job:
        rows.append(("Slurm", f"job {summary.job}" + (f", {job.state} {job.reason}" if job else "")))
    if error := run_dir.read_error():
        rows.append(("error", describe_error(error)))
    if not summary.is_live and summary.state not in ("FINISHED", *NOT_BEGUN) and not is_active(job):
        alone = not summary.job and run_dir.read_provenance().get("num_nodes") == 1
        if hint := resume_hint(run_dir, summary.world_size if alone else None):
            rows.append(("to resume", hint))
    return rows
