"""The pages of one run."""

from __future__ import annotations

from typing import Any

from anyio.to_thread import run_sync
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from dist_train.errors import DistTrainError
from dist_train.launch.job_queue import in_order, places
from dist_train.launch.resume import describe_command, describe_new_start
from dist_train.web import child_processes, outputs, run_view
from dist_train.web.curves import MetricsCache, points
from dist_train.web.run_index import Entry
from dist_train.web.run_list import make_row
from dist_train.web.site import Site, attachment_header, json_response, read_body, whole_number

_LOG_BYTES = 64 * 1024  # at most, in one answer


class RunPages:
    """Handlers of the pages of one run."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._metrics = MetricsCache()

    def job(self, request: Request) -> Response:
        return self._site.page(request, "job.html", tab="results", **self._results(self._site.find(request)))

    def live(self, request: Request) -> Response:
        entry = self._site.find(request)
        if request.query_params.get("since") == self._version(entry):  # before manifests and logs are read
            return Response(status_code=204)
        return self._site.page(request, "live.html", depth=1, **self._results(entry))

    def _version(self, entry: Entry) -> str:
        """Return what changes whenever the results of a run do."""
        run_dir = entry.summary.run_dir
        lines, inode = self._metrics.lines(run_dir.metrics.path)
        parts = (*entry.signature, entry.summary.state, self._place(entry), self._site.queue.version)
        return ".".join(map(str, (len(lines), inode, *parts)))

    def _results(self, entry: Entry) -> dict[str, Any]:
        since = self._version(entry)  # first: what changes meanwhile is shown by the next poll
        run_dir = entry.summary.run_dir
        lines, _ = self._metrics.lines(run_dir.metrics.path)
        epochs = run_view.epochs(run_dir, lines)
        uses, effective = run_view.seconds_by_use(entry)
        pictures = [path.stem for path in outputs.files_in(run_dir, "pictures", ".png").values()]
        return {
            **self._head(entry),
            "epochs": epochs,
            "own": run_view.own_metrics(epochs),
            "uses": uses,
            "effective": effective,
            "failure": run_view.failure(entry),
            "not_started": run_view.not_started(entry),
            "by_class": run_view.accuracy_by_class(entry),
            "pictures": pictures,
            "layers": run_dir.read_layers(),
            "busy": self._site.is_busy(),
            "since": since,
        }

    def settings(self, request: Request) -> Response:
        entry = self._site.find(request)
        base, differing, every = run_view.settings(entry.summary.run_dir)
        return self._site.page(request, "settings.html", tab="settings", base=base, differing=differing, every=every,
                          **self._head(entry))  # fmt: skip

    def logs(self, request: Request) -> Response:
        entry = self._site.find(request)
        return self._site.page(request, "logs.html", tab="logs", logs=run_view.logs(entry.summary.run_dir),
                          **self._head(entry))  # fmt: skip

    def log(self, request: Request) -> Response:
        """The text of a log from `offset` on, as {"text", "offset"}."""
        run_dir = self._site.find(request).summary.run_dir
        name = request.query_params.get("name", "")
        path = run_view.logs(run_dir).get(name)
        if path is None:
            raise HTTPException(404, f"There is no log {name}.")
        text, end = run_view.tail(path, _LOG_BYTES, whole_number(request.query_params.get("offset", "")))
        return json_response({"text": text, "offset": end})

    def files(self, request: Request) -> Response:
        entry = self._site.find(request)
        return self._site.page(request, "files.html", tab="files", files=outputs.list_files(entry.summary.run_dir),
                          **self._head(entry))  # fmt: skip

    def points(self, request: Request) -> Response:
        """The numbers of a run's curves from line `from` on; `cut` changes when a resume has cut the file."""
        lines, inode = self._metrics.lines(self._site.find(request).summary.run_dir.metrics.path)
        first = whole_number(request.query_params.get("from", "")) or 0
        if request.query_params.get("cut") != str(inode):
            first = 0
        return json_response({"cut": str(inode), "from": first, "to": len(lines), "points": list(points(lines, first))})

    def evaluations(self, request: Request) -> Response:
        """The table of evaluations as a file."""
        run_dir = self._site.find(request).summary.run_dir
        lines, _ = self._metrics.lines(run_dir.metrics.path)
        stream = run_view.evaluations_csv(run_view.epochs(run_dir, lines))
        headers = attachment_header(f"{run_dir.path.name}-evaluations.csv")
        return StreamingResponse(stream, media_type="text/csv", headers=headers)

    async def predict(self, request: Request) -> Response:
        """What the run's net predicts for the image in the body."""
        image = await read_body(request, child_processes.MAX_IMAGE_BYTES)
        entry = await run_sync(self._site.find, request)
        if self._site.is_busy() and "anyway" not in request.query_params:
            raise DistTrainError("A training is using this machine. Tick the box beside the image to do it anyway.")
        return json_response(await run_sync(child_processes.predict, entry.summary.run_dir, image))

    def _head(self, entry: Entry) -> dict[str, Any]:
        """What all pages of a run show."""
        job = self._site.jobs().get(entry.summary.job or "")
        return {
            "entry": entry,
            "summary": entry.summary,
            "row": make_row(entry, job, self._place(entry)),
            "job": job,
            "command": describe_command(entry.summary.run_dir),
            "new_start": describe_new_start(entry.summary.run_dir),
        }

    def _place(self, entry: Entry) -> int | None:
        """Return the place of a job in the queue."""
        listed = self._site.index.listing().entries.values()
        return places(in_order(other.summary for other in listed)).get(entry.name)
