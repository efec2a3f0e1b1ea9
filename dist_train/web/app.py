"""The pages and what they answer. Reading changes nothing; a run is looked up by name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

from anyio.to_thread import run_sync
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from dist_train import __version__
from dist_train.atomic_files import to_json
from dist_train.checkpoints.contents import MODEL
from dist_train.checkpoints.manifest import folder_of
from dist_train.errors import DistTrainError, RunDirError
from dist_train.launch.jobs import delete_run, request_save, request_stop
from dist_train.launch.resume import describe_command, resume
from dist_train.launch.slurm.commands import Job
from dist_train.runs import deleted_runs
from dist_train.runs.reports.compare import METRICS, LoadedRun, compare, read_run
from dist_train.runs.start_lock import is_starting
from dist_train.web import children, format, job_view, outputs
from dist_train.web.access import SESSION_S, Access
from dist_train.web.curves import MetricsCache, points
from dist_train.web.guard import Guard
from dist_train.web.run_index import Entry, RunIndex
from dist_train.web.run_list import SORTS, Query, Row, make_page, make_row
from dist_train.web.machine import MachineWatch, free_bytes
from dist_train.web.slurm_queue import SlurmQueue

_FORM_BYTES = 1 << 20  # at most
_LOG_BYTES = 64 * 1024  # at most, in one answer
_COMPARED = 40  # runs, at most
_BYTES = "application/octet-stream"
_AXES = ("step", "samples", "seconds")
_EXPORTS = ("csv", "md", "json", "html", "png")
# What was done, for the page that follows: texts are chosen here, never taken from a URL.
_DONE = {
    "stop": "It stops after its current step, and saves first.",
    "save": "It saves after its current step.",
    "resume": "It is starting, and goes on where it was saved.",
    "delete": "It is in the bin for 24 hours.",
    "restore": "It is back.",
    "empty": "The bin is empty.",
}


def make_app(folder: Path, access: Access, hosts: frozenset[str] = frozenset()) -> Starlette:
    """Return the application for the runs in `folder`. `hosts`: names it answers to besides the local ones."""
    pages = Pages(folder, access)
    return Starlette(
        routes=pages.routes(),
        middleware=[Middleware(Guard, access=access, hosts=hosts, refuse=pages.refuse)],
        exception_handlers={
            HTTPException: pages.http_error,
            DistTrainError: pages.own_error,
            OSError: pages.disk_error,
        },
    )


class Pages:
    """The handlers of all routes, and what they share."""

    def __init__(self, folder: Path, access: Access) -> None:
        self._index = RunIndex(folder)
        self._access = access
        self._queue = SlurmQueue()
        threading.Thread(target=self._empty_bin, name="empty_bin", daemon=True).start()  # may take long
        self._metrics = MetricsCache()
        self._machine = MachineWatch(folder)
        self._templates = Environment(
            loader=PackageLoader("dist_train.web"),
            autoescape=select_autoescape(default=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals |= {"format": format, "version": __version__, "quote": _quote}

    def routes(self) -> list[Route | Mount]:
        static = StaticFiles(packages=[("dist_train.web", "static")])
        return [
            Route("/", self.jobs),
            Route("/rows", self.rows),
            Route("/login", self.login, methods=["GET", "POST"]),
            Route("/machines", self.machines),
            Route("/compare", self.compare),
            Route("/compare.{suffix}", self.export_comparison),
            Route("/bin", self.bin),
            Route("/bin/{action}", self.change_bin, methods=["POST"]),
            Route("/act/{action}", self.act_on_several, methods=["POST"]),
            Route("/jobs/{name}", self.job),
            Route("/jobs/{name}/live", self.live),
            Route("/jobs/{name}/settings", self.settings),
            Route("/jobs/{name}/logs", self.logs),
            Route("/jobs/{name}/log", self.log),
            Route("/jobs/{name}/files", self.files),
            Route("/jobs/{name}/files/{path:path}", self.file),
            Route("/jobs/{name}/points", self.points),
            Route("/jobs/{name}/checkpoints/{step:int}.safetensors", self.safetensors),
            Route("/jobs/{name}/checkpoints/{step:int}.pth", self.pth),
            Route("/jobs/{name}/outputs.zip", self.outputs),
            Route("/jobs/{name}/pictures/{picture}.png", self.picture),
            Route("/jobs/{name}/predict", self.predict, methods=["PUT"]),
            Route("/jobs/{name}/{action}", self.act, methods=["POST"]),
            Mount("/static", static),
        ]

    # --- the list ----------------------------------------------------------------------------------------------------

    def jobs(self, request: Request) -> Response:
        if "token" in request.query_params:
            return self._begin_session(request, request.query_params["token"])
        return self._page(request, "jobs.html", **self._list(request))

    def rows(self, request: Request) -> Response:
        found = self._list(request)
        if request.query_params.get("since") == found["since"]:
            return Response(status_code=204)
        if "application/json" in request.headers.get("accept", ""):
            return _json([_plain(row) for row in found["page"].rows])
        return self._page(request, "rows.html", **found)

    def _list(self, request: Request) -> dict[str, Any]:
        listing, query = self._index.listing(), Query.of(request.query_params)
        return {
            "page": make_page(listing, self._jobs(), query),
            "query": query,
            "sorts": list(SORTS),
            "since": f"{listing.version}.{self._queue.version}",
            "error": listing.error or self._queue.error,
            "folder": self._index.folder,
        }

    def _jobs(self) -> dict[str, Job]:
        return self._queue.jobs(entry.summary for entry in self._index.listing().entries.values())

    # --- one run -----------------------------------------------------------------------------------------------------

    def job(self, request: Request) -> Response:
        return self._page(request, "job.html", tab="results", **self._results(request))

    def live(self, request: Request) -> Response:
        found = self._results(request)
        if request.query_params.get("since") == found["since"]:
            return Response(status_code=204)
        return self._page(request, "live.html", **found)

    def _results(self, request: Request) -> dict[str, Any]:
        entry = self._find(request)
        run_dir = entry.summary.run_dir
        lines, inode = self._metrics.lines(run_dir.metrics.path)
        starting = is_starting(run_dir)
        epochs = job_view.epochs(run_dir, lines)
        uses, effective = job_view.seconds_by_use(entry)
        pictures = [path.stem for path in outputs.files_in(run_dir, "pictures", ".png").values()]
        return {
            **self._head(entry),
            "starting": starting,
            "epochs": epochs,
            "own": job_view.own_metrics(epochs),
            "uses": uses,
            "effective": effective,
            "failure": None if starting else job_view.failure(entry),
            "not_started": "" if starting else job_view.not_started(entry),
            "by_class": job_view.accuracy_by_class(entry),
            "pictures": pictures,
            "layers": run_dir.read_layers(),
            "busy": self._is_busy(),
            "since": f"{len(lines)}.{inode}.{'.'.join(map(str, entry.signature))}.{entry.summary.state}.{starting}"
            f".{self._queue.version}",
        }

    def _is_busy(self) -> bool:
        """Whether a run on this machine may be using all of its processors."""
        return any(entry.summary.is_live for entry in self._index.listing().entries.values())

    def settings(self, request: Request) -> Response:
        entry = self._find(request)
        base, differing, every = job_view.settings(entry.summary.run_dir)
        return self._page(request, "settings.html", tab="settings", base=base, differing=differing, every=every,
                          **self._head(entry))  # fmt: skip

    def logs(self, request: Request) -> Response:
        entry = self._find(request)
        return self._page(request, "logs.html", tab="logs", logs=job_view.logs(entry.summary.run_dir),
                          **self._head(entry))  # fmt: skip

    def log(self, request: Request) -> Response:
        """The text of a log from `offset` on, as {"text", "offset"}."""
        run_dir = self._find(request).summary.run_dir
        name, offset = request.query_params.get("name", ""), request.query_params.get("offset", "")
        path = job_view.logs(run_dir).get(name)
        if path is None:
            raise HTTPException(404, f"There is no log {name}.")
        start = int(offset) if offset.isascii() and offset.isdigit() and len(offset) < 19 else None
        text, end = job_view.tail(path, _LOG_BYTES, start)
        return _json({"text": text, "offset": end})

    def files(self, request: Request) -> Response:
        entry = self._find(request)
        return self._page(request, "files.html", tab="files", files=outputs.list_files(entry.summary.run_dir),
                          **self._head(entry))  # fmt: skip

    def file(self, request: Request) -> Response:
        return self._download(request, request.path_params["path"])

    def points(self, request: Request) -> Response:
        """The numbers of a run's curves from line `from` on; `cut` changes when a resume has cut the file."""
        lines, inode = self._metrics.lines(self._find(request).summary.run_dir.metrics.path)
        start = request.query_params.get("from", "")
        first = int(start) if start.isascii() and start.isdigit() and len(start) < 19 else 0
        if request.query_params.get("cut") != str(inode):
            first = 0
        return _json({"cut": str(inode), "from": first, "to": len(lines), "points": list(points(lines, first))})

    def safetensors(self, request: Request) -> Response:
        step = request.path_params["step"]
        run_dir = self._find(request).summary.run_dir
        path = (folder_of(run_dir, step) / MODEL).relative_to(run_dir.path)
        return self._download(request, str(path), f"{run_dir.path.name}-{step}.safetensors")

    def pth(self, request: Request) -> Response:
        run_dir, step = self._find(request).summary.run_dir, request.path_params["step"]
        stream = outputs.chunks_of(children.export_pth(run_dir.path, step))
        return StreamingResponse(stream, media_type=_BYTES, headers=_named(f"{run_dir.path.name}-{step}.pth"))

    def outputs(self, request: Request) -> Response:
        run_dir = self._find(request).summary.run_dir
        stream = outputs.stream_zip(run_dir, with_checkpoints="checkpoints" in request.query_params)
        return StreamingResponse(stream, media_type="application/zip", headers=_named(f"{run_dir.path.name}.zip"))

    def picture(self, request: Request) -> Response:
        path = outputs.file_of(self._find(request).summary.run_dir, f"pictures/{request.path_params['picture']}.png")
        if path is None:
            raise HTTPException(404, "There is no such picture.")
        return FileResponse(path, media_type="image/png")

    async def predict(self, request: Request) -> Response:
        """The most probable classes of the image in the body."""
        image = await _body(request, children.MAX_IMAGE_BYTES)
        entry = await run_sync(self._find, request)
        if self._is_busy() and "anyway" not in request.query_params:
            raise DistTrainError("A training is using this machine. Tick the box beside the image to do it anyway.")
        classes = await run_sync(children.predict, entry.summary.run_dir, image)
        return _json({"classes": classes})

    # --- changes -----------------------------------------------------------------------------------------------------

    async def act(self, request: Request) -> Response:
        """Stop, save, resume or delete a run, then show it, or the list if it is gone."""
        action = request.path_params["action"]
        await run_sync(self._act, self._action(action), await run_sync(self._find, request))
        target = (
            f"../../?done={action}" if action == "delete" else f"../{_quote(request.path_params['name'])}?done={action}"
        )
        return RedirectResponse(target, 303)

    async def act_on_several(self, request: Request) -> Response:
        """Do the same to each run that was selected in the list."""
        action = self._action(request.path_params["action"])
        entries = [entry for name in _all(await _form(request), "run") if (entry := self._index.find(name)) is not None]
        refused = []
        for entry in entries:  # what one refuses does not keep the others
            try:
                await run_sync(self._act, action, entry)
            except DistTrainError as error:
                refused.append(str(error))
        if refused:
            raise DistTrainError("\n".join(refused))
        return RedirectResponse(f"../?done={request.path_params['action']}", 303)

    def _action(self, name: str) -> Callable[[Path], object]:
        actions = {"stop": request_stop, "save": request_save, "resume": resume, "delete": delete_run}
        if name not in actions:
            raise HTTPException(404, "There is no such action.")
        return actions[name]

    def _act(self, action: Callable[[Path], object], entry: Entry) -> None:
        action(entry.summary.run_dir.path)
        self._index.forget_scan()
        if action is delete_run:
            self._empty_bin()

    def _empty_bin(self) -> None:
        """Remove what has been in the bin for long enough."""
        with suppress(RunDirError):  # what cannot be removed yet stays
            deleted_runs.empty(self._index.folder, deleted_runs.KEPT_S)

    def bin(self, request: Request) -> Response:
        return self._page(request, "bin.html", runs=list(deleted_runs.find_deleted(self._index.folder)))

    async def change_bin(self, request: Request) -> Response:
        action, form = request.path_params["action"], await _form(request)
        if action == "empty":
            await run_sync(deleted_runs.empty, self._index.folder)
        elif action == "restore":
            await run_sync(deleted_runs.restore, self._index.folder, dict(form).get("entry", ""))
        else:
            raise HTTPException(404, "There is no such action.")
        self._index.forget_scan()
        return RedirectResponse(f"../bin?done={action}", 303)

    # --- several runs, the machine -----------------------------------------------------------------------------------

    def compare(self, request: Request) -> Response:
        runs = self._compared(request)
        sort = request.query_params.get("sort")
        return self._page(
            request, "compare.html", names=[run.name for run in runs], tables=compare(runs, sort) if runs else [],
            metrics=[metric.name for metric in METRICS if metric.best], sort=sort, exports=_EXPORTS,
        )  # fmt: skip

    def export_comparison(self, request: Request) -> Response:
        suffix = request.path_params["suffix"]
        if suffix not in _EXPORTS:
            raise HTTPException(404, "There is no such format.")
        axis = request.query_params.get("by", "step")
        content = children.export_comparison(
            [run.summary.run_dir.path for run in self._compared(request)],
            f".{suffix}",
            axis if axis in _AXES else "step",
        )
        return Response(content, media_type=_BYTES, headers=_named(f"comparison.{suffix}"))

    def _compared(self, request: Request) -> list[LoadedRun]:
        names = list(dict.fromkeys(request.query_params.getlist("run")))[:_COMPARED]
        entries = [entry for name in names if (entry := self._index.find(name)) is not None]
        return [read_run(entry.summary.run_dir.path) for entry in entries]

    def machines(self, request: Request) -> Response:
        listing = self._index.listing()
        running = [make_row(entry, None) for entry in listing.entries.values() if entry.summary.may_be_running]
        return self._page(request, "machines.html", machine=self._machine.look(), running=running)

    # --- logging in, errors ------------------------------------------------------------------------------------------

    async def login(self, request: Request) -> Response:
        if request.method == "POST":
            return self._begin_session(request, dict(await _form(request)).get("token", ""))
        return self._page(request, "login.html", refused="")

    def _begin_session(self, request: Request, token: str) -> Response:
        """Set the cookie on a page that goes on by itself: a redirect would lose a strict cookie when the link was
        followed from another site, such as a mail program. The cookie's path is that of the page."""
        if not self._access.is_token(token):
            return self._page(request, "login.html", refused="This is not the token of this server.", status_code=403)
        answer = self._page(request, "welcome.html")
        answer.set_cookie(
            self._access.cookie, self._access.open_session(), max_age=int(SESSION_S), path=None,
            httponly=True, samesite="strict",
        )  # fmt: skip
        return answer

    def refuse(self, request: Request, status: int, reason: str) -> Response:
        return self._page(request, "login.html", refused=reason, status_code=status)

    def http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return self._error(request, error.status_code, error.detail)

    def own_error(self, request: Request, error: Exception) -> Response:
        return self._error(request, 409, str(error))

    def disk_error(self, request: Request, error: Exception) -> Response:
        """A file that is gone since it was listed, a full disk."""
        assert isinstance(error, OSError)
        return self._error(request, 503, f"{error.strerror or error}. Load the page again.")

    def _error(self, request: Request, status: int, message: str) -> Response:
        if request.headers.get("accept", "").startswith("application/json"):
            return _json({"error": message}, status)
        return self._page(request, "error.html", status_code=status, message=message)

    # --- shared ------------------------------------------------------------------------------------------------------

    def _find(self, request: Request) -> Entry:
        entry = self._index.find(request.path_params["name"])
        if entry is None:
            raise HTTPException(404, f"There is no run {request.path_params['name']} in {self._index.folder}.")
        return entry

    def _head(self, entry: Entry) -> dict[str, Any]:
        """What all pages of a run show."""
        job = self._jobs().get(entry.summary.job or "")
        return {
            "entry": entry,
            "summary": entry.summary,
            "row": make_row(entry, job),
            "job": job,
            "command": describe_command(entry.summary.run_dir),
        }

    def _download(self, request: Request, relative: str, name: str | None = None) -> Response:
        path = outputs.file_of(self._find(request).summary.run_dir, relative)
        if path is None:
            raise HTTPException(404, "There is no such file.")
        return FileResponse(path, headers=_named(name or path.name), media_type=_BYTES)

    def _page(self, request: Request, template: str, *, status_code: int = 200, **values: Any) -> HTMLResponse:
        depth = request.scope["path"].count("/") - 1
        done = _DONE.get(request.query_params.get("done", ""), "")
        text = self._templates.get_template(template).render(
            root="../" * depth, done=done, disk_free=free_bytes(self._index.folder), **values
        )
        return HTMLResponse(text.encode(errors="replace"), status_code)  # a file may hold what is no text


def _quote(name: str) -> str:
    return quote(name, safe="")


def _named(name: str) -> dict[str, str]:
    """Return the header that makes a browser store an answer as a file."""
    return {"content-disposition": f"attachment; filename*=utf-8''{_quote(name)}"}


def _json(value: Any, status_code: int = 200) -> Response:
    return Response(to_json(value), status_code, media_type="application/json")


async def _body(request: Request, at_most: int) -> bytes:
    content = bytearray()
    try:
        async for chunk in request.stream():
            content += chunk
            if len(content) > at_most:
                raise HTTPException(413, f"More than {format.size(at_most)}.")
    except ClientDisconnect:
        raise HTTPException(400, "The request ended early.") from None
    return bytes(content)


async def _form(request: Request) -> list[tuple[str, str]]:
    content = await _body(request, _FORM_BYTES)
    return parse_qsl(content.decode(errors="replace"), keep_blank_values=True)


def _all(form: Sequence[tuple[str, str]], name: str) -> list[str]:
    return [value for key, value in form if key == name]


def _plain(row: Row) -> dict[str, Any]:
    """Return a row of the list as JSON."""
    summary = row.entry.summary
    return {
        "run": summary.name, "state": row.state, "step": summary.step, "total_steps": summary.total_steps,
        "epoch": summary.epoch, "left_s": row.left_s, "train_loss": row.train_loss,
        "val_accuracy": summary.accuracy, "test_accuracy": summary.test_accuracy,
        "samples_per_s": summary.samples_per_s, "world_size": summary.world_size, "job": summary.job,
    }  # fmt: skip
