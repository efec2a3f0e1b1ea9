"""A fake W&B server on a loopback port with the parts that the real client needs to upload a run.

The client is the real one; only the server is replaced.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Behaviour = Literal["answers", "rejects the API key", "hangs", "answers with 500"]


class WandbServer:
    """Records what clients send; `behaviour` may change while they are connected."""

    def __init__(
        self, behaviour: Behaviour = "answers", sweep: str = "", points: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """`sweep` is the YAML of a sweep named `s`, whose agent gets the `points` in turn."""
        self.behaviour: Behaviour = behaviour
        self.histories: dict[str, list[dict[str, Any]]] = {}  # by run, as its page would show it
        self.buckets: dict[str, dict[str, Any]] = {}  # by run, its own description
        self._sweep = sweep
        self._points = [{"id": str(number), "type": "run", "run_id": f"of-sweep-{number}", "program": "dist_train",
                         "args": {key: {"value": value} for key, value in point.items()}}
                        for number, point in enumerate(points)]  # fmt: skip
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.stand_in = self
        self._over = threading.Event()
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> WandbServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    @property
    def is_dead(self) -> bool:
        return self._over.is_set()

    @property
    def runs(self) -> set[str]:
        return {*self.buckets}

    @property
    def history(self) -> list[dict[str, Any]]:
        """The history of the only run."""
        (found,) = self.histories.values() or ([],)
        return found

    @property
    def env(self) -> dict[str, str]:
        """The environment of a client that connects to this server."""
        url = f"http://127.0.0.1:{self._http.server_address[1]}"
        return {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": url}

    def die(self) -> None:
        """Refuse new connections and close the existing ones."""
        if not self._over.is_set():
            self._over.set()
            self._http.shutdown()
            self._http.server_close()
            self._http.cut_off()

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if self.behaviour == "hangs":
            self._over.wait()
        if self.behaviour == "rejects the API key":
            return 401, {"error": "user is not logged in"}
        if self.behaviour == "answers with 500":
            return 500, {"error": "for a while"}
        if path == "/graphql":
            asked = json.loads(body)
            return 200, {"data": self._look_up(asked["query"], asked.get("variables") or {})}
        if path.endswith("/file_stream"):
            self._take(path.split("/")[-2], json.loads(body))
        return 200, {}

    def _look_up(self, query: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        if "upsertBucket" in query:
            fields = {key: value for key, value in variables.items() if value is not None}
            self.buckets.setdefault(variables["name"], {}).update(fields)
            history = self.histories.setdefault(variables["name"], [])
            project = {"id": "cA==", "name": variables["project"], "entity": {"id": "ZQ==", "name": "somebody"}}
            names = {"name": variables["name"], "displayName": variables["displayName"] or variables["name"]}
            bucket = {"id": "aWQ=", **names, "project": project, "historyLineCount": len(history)}
            return {"upsertBucket": {"bucket": bucket, "inserted": not history}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.env['WANDB_BASE_URL']}/upload/{name}"}
                     for name in variables["files"]]  # fmt: skip
            return {"createRunFiles": {"runID": "aWQ=", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            return {"viewer": {"id": "dQ==", "entity": "somebody", "username": "somebody", "flags": "{}"}}
        if "SweepWithRuns" in query or "GetSweepState" in query:
            return {"project": {"sweep": {"id": "cw==", "name": "s", "config": self._sweep, "state": "RUNNING",
                                          "runs": {"edges": []}}}}  # fmt: skip
        if "createAgent" in query:
            return {"createAgent": {"agent": {"id": "YQ=="}}}
        if "agentHeartbeat" in query:
            return {"agentHeartbeat": {"agent": {"id": "YQ=="}, "commands": json.dumps(self._command(variables))}}
        if "RunResumeStatus" in query and variables["name"] in self.runs:
            history = self.histories[variables["name"]]
            names = {"name": variables["name"], "displayName": variables["name"], "tags": [], "notes": None}
            counts = {"logLineCount": 0, "eventsLineCount": 0, "historyLineCount": len(history)}
            tail = json.dumps([json.dumps(line) for line in history[-1:]])
            texts = {"historyTail": tail, "eventsTail": "[]", "summaryMetrics": "{}", "config": "{}"}
            entity = {"id": "ZQ==", "name": "somebody"}
            bucket = {"id": "aWQ=", **names, **counts, **texts, "wandbConfig": "{}"}
            return {"model": {"id": "cA==", "name": variables["project"], "entity": entity, "bucket": bucket}}
        return {"model": None}

    def _command(self, heartbeat: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the next command of the agent: one run at a time, then exit."""
        if any(json.loads(heartbeat["runState"]).values()):
            return []
        return [self._points.pop(0)] if self._points else [{"id": "exit", "type": "exit"}]

    def _take(self, run: str, sent: Mapping[str, Any]) -> None:
        chunk = sent.get("files", {}).get("wandb-history.jsonl")
        if chunk:
            self.histories[run][chunk["offset"] :] = [json.loads(line) for line in chunk["content"]]


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    stand_in: WandbServer

    def __init__(self, *arguments: Any) -> None:
        self._connected: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connected.add(request)
        super().process_request(request, client_address)

    def cut_off(self) -> None:
        for connection in self._connected:
            with suppress(OSError):  # the client has disconnected
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def _reply(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        code, answer = self.server.stand_in.answer(self.path, body)
        if self.server.stand_in.is_dead:
            self.close_connection = True
            return
        text = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = _reply

    def log_message(self, *_: object) -> None:
        pass
