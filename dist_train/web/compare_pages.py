"""The comparison of runs."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dist_train.runs.reports.compare import LoadedRun, compare, metrics_of, read_run
from dist_train.web import child_processes
from dist_train.web.downloads import BYTES
from dist_train.web.site import Site, attachment_header

_COMPARED = 40  # runs, at most
_AXES = ("step", "samples", "seconds")
_EXPORTS = ("csv", "md", "json", "html", "png")


class ComparePages:
    """Handlers of the comparison."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def compare(self, request: Request) -> Response:
        runs = self._compared(request)
        sort = request.query_params.get("sort")
        return self._site.page(
            request, "compare.html", names=[run.name for run in runs], tables=compare(runs, sort) if runs else [],
            metrics=[metric.name for metric in metrics_of(runs) if metric.best], sort=sort, exports=_EXPORTS,
        )  # fmt: skip

    def export_comparison(self, request: Request) -> Response:
        suffix = request.path_params["suffix"]
        if suffix not in _EXPORTS:
            raise HTTPException(404, "There is no such format.")
        axis = request.query_params.get("by", "step")
        content = child_processes.export_comparison(
            [run.summary.run_dir.path for run in self._compared(request)],
            f".{suffix}",
            axis if axis in _AXES else "step",
        )
        return Response(content, media_type=BYTES, headers=attachment_header(f"comparison.{suffix}"))

    def _compared(self, request: Request) -> list[LoadedRun]:
        names = list(dict.fromkeys(request.query_params.getlist("run")))[:_COMPARED]
        entries = [entry for name in names if (entry := self._site.index.find(name)) is not None]
        return [read_run(entry.summary.run_dir.path) for entry in entries]
