"""The answer to what cannot be done."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dist_train.web.site import Site, json_response, wants_json


class ErrorPages:
    """Handlers of errors."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = self._error(request, error.status_code, error.detail)
        answer.headers.update(error.headers or {})
        return answer

    def own_error(self, request: Request, error: Exception) -> Response:
        return self._error(request, 409, str(error))

    def disk_error(self, request: Request, error: Exception) -> Response:
        """A file that is gone since it was listed, a full disk."""
        assert isinstance(error, OSError)
        return self._error(request, 503, f"{error.strerror or error}. Load the page again.")

    def _error(self, request: Request, status: int, message: str) -> Response:
        if wants_json(request):
            return json_response({"error": message}, status)
        return self._site.page(request, "error.html", status_code=status, message=message)
