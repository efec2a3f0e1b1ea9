"""The list of runs, and the page of machines."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dist_train.errors import RunDirError
from dist_train.launch.job_queue import ensure_keeper, is_of_this_host
from dist_train.runs.summary import Summary
from dist_train.web.login import Login
from dist_train.web.run_list import SORTS, Query, Row, make_page
from dist_train.web.site import Site, json_response, wants_json


class ListPages:
    """Handlers of the list of runs and of the machines."""

    def __init__(self, site: Site, login: Login) -> None:
        self._site = site
        self._login = login  # the address with the token is that of the list

    def jobs(self, request: Request) -> Response:
        if "token" in request.query_params:
            return self._login.begin_session(request, request.query_params["token"])
        return self._site.page(request, "jobs.html", **self._list(request))

    def rows(self, request: Request) -> Response:
        found = self._list(request)
        if request.query_params.get("since") == found["since"]:
            return Response(status_code=204)
        if wants_json(request):
            return json_response([_plain(row) for row in found["page"].rows])
        return self._site.page(request, "rows.html", **found)

    def _list(self, request: Request) -> dict[str, Any]:
        listing, query = self._site.index.listing(), Query.of(request.query_params)
        self._look_after_queue(entry.summary for entry in listing.entries.values())
        return {
            "page": make_page(listing, self._site.jobs(), query),
            "query": query,
            "sorts": list(SORTS),
            "since": f"{listing.version}.{self._site.queue.version}",
            "error": listing.error or self._site.queue.error,
            "folder": self._site.index.folder,
        }

    def _look_after_queue(self, runs: Iterable[Summary]) -> None:
        """Begin the keeper of the queue if jobs wait: the last one may have been killed."""
        if any(run.state == "QUEUED" and is_of_this_host(run) for run in runs):
            with suppress(RunDirError):  # a full disk: the list can be read
                ensure_keeper(self._site.index.folder)

    def machines(self, request: Request) -> Response:
        return self._site.page(request, "machines.html")


def _plain(row: Row) -> dict[str, Any]:
    """Return a row of the list as JSON."""
    summary = row.entry.summary
    return {
        "run": summary.name, "state": row.state, "step": summary.step, "total_steps": summary.total_steps,
        "epoch": summary.epoch, "left_s": row.left_s, "train_loss": row.train_loss,
        "val_accuracy": summary.accuracy, "test_accuracy": summary.test_accuracy,
        "samples_per_s": summary.samples_per_s, "world_size": summary.world_size, "job": summary.job,
        "place": row.place,
    }  # fmt: skip
