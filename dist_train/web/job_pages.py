"""The page on which jobs are made."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyio.to_thread import run_sync
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from dist_train.config.loading import bundled_configs, load_config
from dist_train.data.sets.catalog import available_sets
from dist_train.errors import ConfigError, DistTrainError, LaunchError, RunDirError
from dist_train.launch import jobs
from dist_train.launch.job_queue import create_job, enqueue, ensure_keeper
from dist_train.launch.slurm.batch_script import BatchScript
from dist_train.runs.directory import RunDir
from dist_train.runs.start_options import free_name
from dist_train.runs.summary import Summary
from dist_train.web import child_processes
from dist_train.web.job_fields import FIELDS, LABELS, nearest_config, texts_of
from dist_train.web.job_form import Checked, Job, check, field_of
from dist_train.web.site import Site, json_response, quoted, read_form, wants_json

_FIRST = "mnist_bks"  # the config to start from
_OFFERED = 500  # runs to copy, the newest


class JobPages:
    """Handlers of the form of a new job."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._creating = threading.Lock()

    def new(self, request: Request) -> Response:
        """The form, filled in from a bundled config or from an old run."""
        base, copied = request.query_params.get("config", _FIRST), request.query_params.get("from", "")
        entry = self._site.index.find(copied)
        if (copied and entry is None) or base not in bundled_configs():
            raise HTTPException(404, f"There is no {f'run {copied}' if copied else f'config {base}'}.")
        config = load_config(base if entry is None else str(entry.summary.run_dir.config))
        base = base if entry is None else nearest_config(config)
        texts = texts_of(config, base) | {"name": free_name(copied or base, self._site.index.folder)}
        if entry is not None:
            texts |= _where(entry.summary)
        return self._form(request, texts, check(texts, self._site.index.folder), copied=copied)

    async def check(self, request: Request) -> Response:
        """What is wrong with the form, and the command that does the same."""
        _, checked = await self._read(request)
        return self._site.page(request, "checked.html", checked=checked, labels=LABELS, swapping=True)

    async def try_batch(self, request: Request) -> Response:
        """Train for a few steps, in a process of its own."""
        _, checked = await self._read(request)
        output, error = "", "Mend the form first." if checked.job is None else ""
        if checked.job is not None:
            try:
                output = await run_sync(child_processes.try_batch, checked.job.arguments)
            except LaunchError as failure:
                error = str(failure)
        return self._site.page(request, "tried.html", output=output, error=error)

    async def create(self, request: Request) -> Response:
        return await self._answer(request, run=False)

    async def run(self, request: Request) -> Response:
        return await self._answer(request, run=True)

    async def _answer(self, request: Request, *, run: bool) -> Response:
        texts = dict(await read_form(request))
        checked, done = await run_sync(self._create, texts, run)
        if not done:
            return self._refuse(request, texts, checked)
        if wants_json(request):
            return json_response({"run": texts["name"], "done": done}, 200 if done == "there" else 201)
        return RedirectResponse(f"../jobs/{quoted(texts['name'])}?done={done}", 303)

    def _create(self, texts: dict[str, str], run: bool) -> tuple[Checked, str]:
        """Create a job, unless a run has its name already. Returns what is wrong, and what was done."""
        folder = self._site.index.folder
        checked = check(texts, folder)
        with self._creating:  # the second of two clicks finds what the first has created
            if self._site.index.find(texts.get("name", "")) is not None:
                return Checked(), "there"
            if checked.job is None:
                return checked, ""
            try:
                _create(checked.job, folder, run)
            except DistTrainError as error:  # the disk is full, or Slurm refuses it: what was entered is not lost
                checked.refuse(field_of(str(error), texts, otherwise="where"), error)
                return checked, ""
            finally:
                self._site.index.forget_scan()
        return checked, "run" if run else "create"

    async def _read(self, request: Request) -> tuple[dict[str, str], Checked]:
        texts = dict(await read_form(request))
        return texts, await run_sync(check, texts, self._site.index.folder)

    def _refuse(self, request: Request, texts: dict[str, str], checked: Checked) -> Response:
        status = 422 if checked.job is None else 409
        if wants_json(request):
            return json_response({"errors": checked.errors}, status)
        try:
            whole = texts_of(load_config(texts.get("config", "")), texts.get("config", "")) | {"name": ""}
        except ConfigError:
            raise HTTPException(422, "\n".join(checked.errors.values())) from None
        return self._form(request, whole | texts, checked, status_code=status)

    def _form(self, request: Request, texts: Mapping[str, str], checked: Checked, **values: Any) -> Response:
        runs = sorted(self._site.index.listing().entries.values(), key=lambda entry: -entry.started)[:_OFFERED]
        values = {"copied": "", "absent": [each.name for each in available_sets() if not each.present], **values}
        return self._site.page(
            request, "new_job.html", texts=texts, checked=checked, fields=FIELDS, labels=LABELS, swapping=False,
            configs=list(bundled_configs()), runs=[entry.name for entry in runs], **values,
        )  # fmt: skip


def _where(summary: Summary) -> dict[str, str]:
    """Return the fields that say where a run trained."""
    run_dir = summary.run_dir
    nodes = run_dir.read_provenance().get("num_nodes") or 1
    per_node = str((summary.world_size or 1) // nodes)
    if summary.job is None:
        return {"nproc": per_node}
    return {"where": "slurm", "nodes": str(nodes), "per_node": per_node}


def _create(job: Job, folder: Path, run: bool) -> None:
    run_dir = RunDir(folder / job.name)
    if job.script is not None:
        if not run:
            raise ConfigError("The queue of Slurm's jobs is Slurm's: choose Create and run.")
        _submit(job, job.script, run_dir)
        return
    create_job(run_dir, job.config, job.nproc)
    if run:
        enqueue(run_dir.path)
        ensure_keeper(folder)


def _submit(job: Job, script: BatchScript, run_dir: RunDir) -> None:
    """Queue a job of Slurm as `slurm submit` does. If Slurm refuses it, its name is free again."""
    known = jobs.check_job(script, job.config, job.start)
    if not run_dir.create(new=True):
        raise RunDirError(f"{run_dir.path} exists already. Choose another name.")
    try:
        jobs.submit(script, job.config, job.start, known)
    except LaunchError:
        shutil.rmtree(run_dir.path)
        raise
