"""The pages of models, data loaders and data sets: a list of versions, and the form that adds one."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyio.to_thread import run_sync
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from dist_train.errors import LibraryError
from dist_train.user_code.contents import CODE
from dist_train.user_code.library import (
    Kind,
    Version,
    check_name,
    delete,
    entries,
    find,
    last_change,
    library_root,
    uses,
)
from dist_train.web.adding import Adding, Task
from dist_train.web.outputs import stream_folder
from dist_train.web.site import Site, attachment_header, json_response, read_form, wants_json
from dist_train.web.uploads import Uploads


@dataclass(frozen=True)
class _Words:
    title: str
    one: str
    holds: str
    setting: str
    most_bytes: int | None  # of an upload


_WORDS = {
    Kind.MODELS: _Words("Models", "model", "bks_model.py with the class UserModel", "model.bundle", CODE.bytes),
    Kind.LOADERS: _Words(
        "Data loaders", "data loader", "bks_dataset.py with the class UserDataset", "data.bundle", CODE.bytes
    ),
    Kind.DATASETS: _Words("Data sets", "data set", "the files that a data loader reads", "data.root", None),
}


class LibraryPages:
    """Handlers of the models, data loaders and data sets."""

    def __init__(self, site: Site, uploads: Uploads) -> None:
        self._site = site
        self._uploads = uploads
        self._adding = Adding()

    def page(self, request: Request) -> Response:
        kind = _kind(request)
        if wants_json(request):
            return json_response([_plain(version, jobs) for version, jobs in self._rows(kind)])
        since = request.query_params.get("since")  # a poll; of the page's own address, so that its links stay right
        if since == self._since(kind):
            return Response(status_code=204)
        return self._site.page(request, "library_rows.html" if since else "library.html", **self._values(kind))

    async def add(self, request: Request) -> Response:
        """Begin to add what the form names: an upload, a path of this machine, or nothing for an empty data set.

        With `Accept: application/json` the answer comes when it is done.
        """
        kind, form = _kind(request), dict(await read_form(request))
        task = await run_sync(self._task, kind, form)
        self._adding.begin(task)
        if not wants_json(request):
            return RedirectResponse(f"{kind}?done=add", 303)
        version = await asyncio.wrap_future(task.version)
        return json_response(_plain(version, []), 201)

    def _task(self, kind: Kind, form: dict[str, str]) -> Task:
        name, path = form.get("name", "").strip(), form.get("path", "").strip()
        check_name(name)
        uploads = {key: self._uploads.path_of(form[key]) for key in ("upload", "weights") if form.get(key)}
        if "empty" in form and kind == Kind.DATASETS:
            arguments = []
        elif "upload" in uploads:
            arguments = [str(uploads["upload"])]
        elif Path(path).is_absolute() and "\0" not in path:
            arguments = [path]
        else:
            raise LibraryError(f"Choose a zip, or give the path, from / on, of a zip or folder: {_WORDS[kind].holds}.")
        if "weights" in uploads and kind == Kind.MODELS:
            arguments += ["--weights", str(uploads["weights"])]

        def remove_uploads() -> None:
            for each in uploads.values():
                self._uploads.remove(each)

        return Task(kind, name, arguments, remove_uploads)

    def cancel(self, request: Request) -> Response:
        self._adding.cancel(_kind(request), request.path_params["name"])
        return RedirectResponse(f"../../{_kind(request)}", 303)

    def delete(self, request: Request) -> Response:
        """Delete a version, or all of a name, unless a run names it."""
        kind, version = _kind(request), request.path_params.get("version")
        delete(kind, request.path_params["name"], version, runs=self._site.index.folder)
        return RedirectResponse(f"{'../' * (3 if version else 2)}{kind}?done=remove", 303)

    def download(self, request: Request) -> Response:
        """A version as one archive, made while it is sent."""
        try:
            found = find(_kind(request), request.path_params["name"], request.path_params["version"])
        except LibraryError as error:
            raise HTTPException(404, str(error)) from None
        header = attachment_header(f"{found.name}-{found.version}.zip")
        return StreamingResponse(stream_folder(found.path), media_type="application/zip", headers=header)

    def _values(self, kind: Kind) -> dict[str, Any]:
        since = self._since(kind)  # first: what changes meanwhile is shown by the next poll
        return {
            "kind": kind,
            "words": _WORDS[kind],
            "rows": self._rows(kind),
            "tasks": self._adding.tasks(kind),
            "since": since,
            "folder": library_root(),
            "host": socket.gethostname(),
        }

    def _rows(self, kind: Kind) -> list[tuple[Version, list[str]]]:
        """Return all versions by name, the newest first, and the runs that use them."""
        used = uses(self._site.index.folder)
        found = (version for entry in entries(kind) for version in reversed(entry.versions))
        return [(version, used.get((kind, version.name, version.version), [])) for version in found]

    def _since(self, kind: Kind) -> str:
        return f"{self._adding.version}.{last_change(kind)}"


def _kind(request: Request) -> Kind:
    return Kind(request.scope["path"].split("/")[1])


def _plain(version: Version, jobs: list[str]) -> dict[str, Any]:
    """Return a version as JSON."""
    return {
        "name": version.name, "version": version.version, "path": str(version.path), "created": version.created,
        "bytes": version.bytes, "files": version.files, "digest": version.digest, "source": version.source,
        "weights": str(version.weights) if version.weights else None, "check": version.check.summary,
        "problems": list(version.check.problems), "jobs": jobs,
    }  # fmt: skip
