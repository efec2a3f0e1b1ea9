"""What all pages share: the index of runs, Slurm's answers, the templates, and how requests are read and answered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response

from dist_train import __version__
from dist_train.atomic_files import to_json
from dist_train.launch.slurm.commands import Job
from dist_train.web import format
from dist_train.web.machines import Machines
from dist_train.web.run_index import Entry, RunIndex
from dist_train.web.slurm_queue import SlurmQueue

_FORM_BYTES = 1 << 20  # at most
# What was done, for the page that follows: texts are chosen here, never taken from a URL.
_DONE = {
    "run": "It waits in the queue, and begins when it is its turn.",
    "take_back": "It is out of the queue.",
    "stop": "It stops after its current step, and saves first.",
    "save": "It saves after its current step.",
    "resume": "It is starting, and goes on where it was saved.",
    "create": "It is created, and waits to be run.",
    "there": "There is a run of this name already. Nothing was created.",
    "delete": "It is in the bin for 24 hours.",
    "restore": "It is back.",
    "empty": "The bin is empty.",
    "add": "It is being added.",
    "remove": "It is deleted.",
}


class Site:
    """What the handlers of all pages share."""

    def __init__(self, folder: Path) -> None:
        self.index = RunIndex(folder)
        self.queue = SlurmQueue()
        self.machines = Machines(self.index)
        self._templates = Environment(
            loader=PackageLoader("dist_train.web"),
            autoescape=select_autoescape(default=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals |= {"format": format, "version": __version__, "quote": quoted}

    def find(self, request: Request) -> Entry:
        """Return the run that an address names. It is looked up, never joined to a path.

        Raises:
            HTTPException: there is no such run.
        """
        entry = self.index.find(request.path_params["name"])
        if entry is None:
            raise HTTPException(404, f"There is no run {request.path_params['name']} in {self.index.folder}.")
        return entry

    def jobs(self) -> dict[str, Job]:
        """Return what Slurm said last of the jobs of all runs, by id."""
        return self.queue.jobs(entry.summary for entry in self.index.listing().entries.values())

    def is_busy(self) -> bool:
        """Whether a run on this machine may be using all of its processors."""
        return any(entry.summary.is_live for entry in self.index.listing().entries.values())

    def page(
        self, request: Request, template: str, *, status_code: int = 200, depth: int | None = None, **values: Any
    ) -> HTMLResponse:
        """Return a page. All its addresses begin with `root`, which leads from the request's address to the list.

        `depth`: the number of folders above the page that a fragment becomes part of; None: as of the request.
        """
        depth = request.scope["path"].count("/") - 1 if depth is None else depth
        done = _DONE.get(request.query_params.get("done", ""), "")
        text = self._templates.get_template(template).render(
            root="../" * depth, done=done, machines=self.machines, **values
        )
        return HTMLResponse(text.encode(errors="replace"), status_code)  # a file may hold what is no text


def quoted(name: str) -> str:
    """Return a name as a part of an address."""
    return quote(name, safe="")


def attachment_header(name: str) -> dict[str, str]:
    """Return the header that makes a browser store an answer as a file."""
    return {"content-disposition": f"attachment; filename*=utf-8''{quoted(name)}"}


def whole_number(text: str, digits: int = 18) -> int | None:
    """Return the number that a parameter of an address holds; None if it is none, or has more than `digits` digits."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= digits else None


def wants_json(request: Request) -> bool:
    return "application/json" in request.headers.get("accept", "")


def json_response(value: Any, status_code: int = 200) -> Response:
    return Response(to_json(value), status_code, media_type="application/json")


async def read_body(request: Request, at_most: int) -> bytes:
    """Return the body of a request.

    Raises:
        HTTPException: it is longer than `at_most` bytes, or ends early.
    """
    content = bytearray()
    try:
        async for chunk in request.stream():
            content += chunk
            if len(content) > at_most:
                raise HTTPException(413, f"More than {format.size(at_most)}.")
    except ClientDisconnect:
        raise HTTPException(400, "The request ended early.") from None
    return bytes(content)


async def read_form(request: Request) -> list[tuple[str, str]]:
    content = await read_body(request, _FORM_BYTES)
    return parse_qsl(content.decode(errors="replace"), keep_blank_values=True)


def values_of(form: Sequence[tuple[str, str]], name: str) -> list[str]:
    return [value for key, value in form if key == name]
