"""What the buttons do: run, take back, stop, save, resume, delete, restore."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from anyio.to_thread import run_sync
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from dist_train.errors import DistTrainError, RunDirError
from dist_train.launch.job_queue import enqueue, ensure_keeper, take_back
from dist_train.launch.jobs import delete_run, request_save, request_stop
from dist_train.launch.resume import resume
from dist_train.runs import deleted_runs
from dist_train.web.run_index import Entry
from dist_train.web.site import Site, quoted, read_form, values_of


class Actions:
    """Handlers of what changes a run."""

    def __init__(self, site: Site) -> None:
        self._site = site
        threading.Thread(target=self._empty_bin, name="empty_bin", daemon=True).start()  # may take long

    async def act(self, request: Request) -> Response:
        """Do something to a run, then show it, or the list if it is gone."""
        action = request.path_params["action"]
        await run_sync(self._act, self._action(action), await run_sync(self._site.find, request))
        target = (
            f"../../?done={action}" if action == "delete" else f"../{quoted(request.path_params['name'])}?done={action}"
        )
        return RedirectResponse(target, 303)

    async def act_on_several(self, request: Request) -> Response:
        """Do the same to each run that was selected in the list."""
        action = self._action(request.path_params["action"])
        names = values_of(await read_form(request), "run")
        entries = [entry for name in names if (entry := self._site.index.find(name)) is not None]
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
        actions: dict[str, Callable[[Path], object]] = {
            "run": _queue, "take_back": take_back, "stop": request_stop, "save": request_save, "resume": resume,
            "delete": delete_run,
        }  # fmt: skip
        if name not in actions:
            raise HTTPException(404, "There is no such action.")
        return actions[name]

    def _act(self, action: Callable[[Path], object], entry: Entry) -> None:
        action(entry.summary.run_dir.path)
        self._site.index.forget_scan()
        if action is delete_run:
            self._empty_bin()

    def _empty_bin(self) -> None:
        """Remove what has been in the bin for long enough."""
        with suppress(RunDirError):  # what cannot be removed yet stays
            deleted_runs.empty(self._site.index.folder, deleted_runs.KEPT_S)

    def bin(self, request: Request) -> Response:
        return self._site.page(request, "bin.html", runs=list(deleted_runs.find_deleted(self._site.index.folder)))

    async def change_bin(self, request: Request) -> Response:
        action, form = request.path_params["action"], await read_form(request)
        if action == "empty":
            await run_sync(deleted_runs.empty, self._site.index.folder)
        elif action == "restore":
            await run_sync(deleted_runs.restore, self._site.index.folder, dict(form).get("entry", ""))
        else:
            raise HTTPException(404, "There is no such action.")
        self._site.index.forget_scan()
        return RedirectResponse(f"../bin?done={action}", 303)


def _queue(path: Path) -> None:
    enqueue(path)
    ensure_keeper(path.parent)
