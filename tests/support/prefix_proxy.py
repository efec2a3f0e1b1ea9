"""A reverse proxy that puts a server below a path: python prefix_proxy.py PORT PREFIX UPSTREAM_PORT."""

from __future__ import annotations

import sys
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT, PREFIX, UPSTREAM = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])


class Proxy(BaseHTTPRequestHandler):
    def forward(self) -> None:
        if not self.path.startswith(f"{PREFIX}/"):
            self.send_error(404, "outside the prefix")
            return
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        upstream = HTTPConnection("127.0.0.1", UPSTREAM)
        upstream.request(self.command, self.path.removeprefix(PREFIX), body, dict(self.headers))
        answer = upstream.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_HEAD = do_PATCH = do_DELETE = forward

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", PORT), Proxy)
    print("ready", flush=True)
    server.serve_forever()
