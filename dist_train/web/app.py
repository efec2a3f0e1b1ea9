"""The application: which address is answered by which page. Reading changes nothing."""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from dist_train.errors import DistTrainError
from dist_train.user_code.library import Kind
from dist_train.web.access import Access
from dist_train.web.actions import Actions
from dist_train.web.compare_pages import ComparePages
from dist_train.web.downloads import Downloads
from dist_train.web.error_pages import ErrorPages
from dist_train.web.guard import Guard
from dist_train.web.job_pages import JobPages
from dist_train.web.library_pages import LibraryPages
from dist_train.web.list_pages import ListPages
from dist_train.web.login import Login
from dist_train.web.run_pages import RunPages
from dist_train.web.site import Site
from dist_train.web.uploads import Uploads


def make_app(folder: Path, access: Access, hosts: frozenset[str] = frozenset()) -> Starlette:
    """Return the application for the runs in `folder`. `hosts`: names it answers to besides the local ones."""
    site = Site(folder)
    login, errors = Login(site, access), ErrorPages(site)
    return Starlette(
        routes=_routes(site, login),
        middleware=[Middleware(Guard, access=access, hosts=hosts, refuse=login.refuse)],
        exception_handlers={
            HTTPException: errors.http_error,
            DistTrainError: errors.own_error,
            OSError: errors.disk_error,
        },
    )


def _routes(site: Site, login: Login) -> list[Route | Mount]:
    listed, run, files = ListPages(site, login), RunPages(site), Downloads(site)
    actions, comparison, jobs, uploads = Actions(site), ComparePages(site), JobPages(site), Uploads()
    return [
        Route("/", listed.jobs),
        Route("/rows", listed.rows),
        Route("/machines", listed.machines),
        Route("/login", login.login, methods=["GET", "POST"]),
        Route("/new", jobs.new),
        Route("/new/check", jobs.check, methods=["POST"]),
        Route("/new/try", jobs.try_batch, methods=["POST"]),
        Route("/new/create", jobs.create, methods=["POST"]),
        Route("/new/run", jobs.run, methods=["POST"]),
        Route("/compare", comparison.compare),
        Route("/compare.{suffix}", comparison.export_comparison),
        Route("/bin", actions.bin),
        Route("/bin/{action}", actions.change_bin, methods=["POST"]),
        Route("/act/{action}", actions.act_on_several, methods=["POST"]),
        Route("/jobs/{name}", run.job),
        Route("/jobs/{name}/live", run.live),
        Route("/jobs/{name}/settings", run.settings),
        Route("/jobs/{name}/logs", run.logs),
        Route("/jobs/{name}/log", run.log),
        Route("/jobs/{name}/points", run.points),
        Route("/jobs/{name}/evaluations.csv", run.evaluations),
        Route("/jobs/{name}/files", run.files),
        Route("/jobs/{name}/files/{path:path}", files.file),
        Route("/jobs/{name}/checkpoints/{step:int}.safetensors", files.safetensors),
        Route("/jobs/{name}/checkpoints/{step:int}.pth", files.pth),
        Route("/jobs/{name}/outputs.zip", files.outputs),
        Route("/jobs/{name}/pictures/{picture}.png", files.picture),
        Route("/jobs/{name}/predict", run.predict, methods=["PUT"]),
        Route("/jobs/{name}/{action}", actions.act, methods=["POST"]),
        *_library_routes(LibraryPages(site, uploads)),
        Route("/uploads", uploads.create, methods=["POST"]),
        Route("/uploads", uploads.options, methods=["OPTIONS"]),
        Route("/uploads/{upload}", uploads.look, methods=["HEAD"]),
        Route("/uploads/{upload}", uploads.append, methods=["PATCH"]),
        Route("/uploads/{upload}", uploads.terminate, methods=["DELETE"]),
        Mount("/static", StaticFiles(packages=[("dist_train.web", "static")])),
    ]


def _library_routes(library: LibraryPages) -> list[Route]:
    found = []
    for kind in Kind:
        found += [
            Route(f"/{kind}", library.page),
            Route(f"/{kind}", library.add, methods=["POST"]),
            Route(f"/{kind}/{{name}}/delete", library.delete, methods=["POST"]),
            Route(f"/{kind}/{{name}}/cancel", library.cancel, methods=["POST"]),
            Route(f"/{kind}/{{name}}/{{version}}/delete", library.delete, methods=["POST"]),
            Route(f"/{kind}/{{name}}/{{version}}.zip", library.download),
        ]
    return found
