"""Logging in."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from dist_train.web.access import SESSION_S, Access
from dist_train.web.site import Site, read_form


class Login:
    """Handlers of the login, and the answer to those who have not."""

    def __init__(self, site: Site, access: Access) -> None:
        self._site = site
        self._access = access

    async def login(self, request: Request) -> Response:
        if request.method == "POST":
            return self.begin_session(request, dict(await read_form(request)).get("token", ""))
        return self._site.page(request, "login.html", refused="")

    def begin_session(self, request: Request, token: str) -> Response:
        """Set the cookie on a page that goes on by itself: a redirect would lose a strict cookie when the link was
        followed from another site, such as a mail program. The cookie's path is that of the page."""
        if not self._access.is_token(token):
            return self.refuse(request, 403, "This is not the token of this server.")
        answer = self._site.page(request, "welcome.html")
        answer.set_cookie(
            self._access.cookie, self._access.open_session(), max_age=int(SESSION_S), path=None,
            httponly=True, samesite="strict",
        )  # fmt: skip
        return answer

    def refuse(self, request: Request, status: int, reason: str) -> Response:
        return self._site.page(request, "login.html", refused=reason, status_code=status)
