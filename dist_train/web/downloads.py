"""Files of a run to take away."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse

from dist_train.checkpoints.contents import MODEL
from dist_train.checkpoints.manifest import folder_of
from dist_train.web import child_processes, outputs
from dist_train.web.site import Site, attachment_header

BYTES = "application/octet-stream"


class Downloads:
    """Handlers of the files of a run."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def file(self, request: Request) -> Response:
        return self._download(request, request.path_params["path"])

    def safetensors(self, request: Request) -> Response:
        step = request.path_params["step"]
        run_dir = self._site.find(request).summary.run_dir
        path = (folder_of(run_dir, step) / MODEL).relative_to(run_dir.path)
        return self._download(request, str(path), f"{run_dir.path.name}-{step}.safetensors")

    def pth(self, request: Request) -> Response:
        run_dir, step = self._site.find(request).summary.run_dir, request.path_params["step"]
        stream = outputs.chunks_of(child_processes.export_pth(run_dir.path, step))
        return StreamingResponse(stream, media_type=BYTES, headers=attachment_header(f"{run_dir.path.name}-{step}.pth"))

    def outputs(self, request: Request) -> Response:
        run_dir = self._site.find(request).summary.run_dir
        stream = outputs.stream_zip(run_dir, with_checkpoints="checkpoints" in request.query_params)
        return StreamingResponse(
            stream, media_type="application/zip", headers=attachment_header(f"{run_dir.path.name}.zip")
        )

    def picture(self, request: Request) -> Response:
        path = outputs.file_of(
            self._site.find(request).summary.run_dir, f"pictures/{request.path_params['picture']}.png"
        )
        if path is None:
            raise HTTPException(404, "There is no such picture.")
        return FileResponse(path, media_type="image/png")

    def _download(self, request: Request, relative: str, name: str | None = None) -> Response:
        path = outputs.file_of(self._site.find(request).summary.run_dir, relative)
        if path is None:
            raise HTTPException(404, "There is no such file.")
        return FileResponse(path, headers=attachment_header(name or path.name), media_type=BYTES)
