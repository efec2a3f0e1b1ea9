"""The guard before all pages: allowed hosts, no requests from other sites, a session or the token, strict headers."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dist_train.web.access import Access

_LOCAL = frozenset({"127.0.0.1", "localhost", "[::1]"})
_READS = ("GET", "HEAD")
OPEN = ("/login", "/static/")  # need no session
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-dist-train": "1",  # the page's script accepts no other answer, such as the login page of a proxy
}

Refuse = Callable[[Request, int, str], Response]


class Guard:
    """ASGI middleware. `refuse` makes the answer of a refused request from its status code and the reason."""

    def __init__(self, app: ASGIApp, access: Access, hosts: frozenset[str], refuse: Refuse) -> None:
        self._app = app
        self._access = access
        self._hosts = _LOCAL | {_name(host) for host in hosts}
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                # A cached answer, also a 204, would be repeated by the browser, and the page would stand still.
                headers.setdefault("cache-control", "no-store")
            await send(message)

        request = Request(scope, receive)
        refused = self._check(request)
        answer: ASGIApp = self._app if refused is None else self._refuse(request, *refused)
        await answer(scope, receive, send_with_headers)

    def _check(self, request: Request) -> tuple[int, str] | None:
        """Return why a request is refused, with its status code, or None."""
        host = request.headers.get("host", "")
        if _name(host) not in self._hosts:
            return 403, f"This server does not answer to the host name {_name(host)}. Allow it with --allow-host."
        path, with_token = request.scope["path"], self._holds_token(request)
        if request.method not in _READS and not with_token and not _is_same_origin(request.headers, host):
            return 403, "This request came from another site."
        if with_token or path.startswith(OPEN) or self._access.is_session(self._session(request)):
            return None
        if path == "/" and "token" in request.query_params and request.method in _READS:
            return None  # answered by the login page
        return 403, "Log in with the token that dist-train web prints at its start."

    def _session(self, request: Request) -> str:
        return request.cookies.get(self._access.cookie, "")

    def _holds_token(self, request: Request) -> bool:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        return kind.lower() in ("token", "bearer") and self._access.is_token(token.strip())


def _name(host: str) -> str:
    """Return the Host header in lower case, without the port."""
    host = host.lower()
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]


def _is_same_origin(headers: Headers, host: str) -> bool:
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] == host
