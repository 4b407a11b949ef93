"""HTTP: requests come in, are counted, befallen by faults, routed, and answered."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_stand_in.faults import Corruption, Cut, Event, Failure
from hub_stand_in.repositories import Account, RefusedError

if TYPE_CHECKING:
    from hub_stand_in.hub import HubStandIn


@dataclass(frozen=True)
class Request:
    """A request as the routes see it; `path` is still quoted, so that a quoted slash parts nothing."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    account: Account | None
    endpoint: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def first(self, key: str) -> str | None:
        return next(iter(self.query.get(key, [])), None)


@dataclass
class Answer:
    """What is sent back."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, status: int = 200, **headers: str) -> Answer:
        """The value as JSON."""
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json", **named})

    @classmethod
    def refused(cls, error: RefusedError, headers: Mapping[str, str] = {}) -> Answer:
        """An error as the Hub words it: in the headers too, since a HEAD has no body."""
        named = {"X-Error-Message": error.message, "X-Request-Id": "Root=1-stand-in", **headers}
        if error.code is not None:
            named["X-Error-Code"] = error.code
        answer = cls.of({"error": error.message}, error.status)
        answer.headers |= named
        return answer


def serve(hub: HubStandIn, *, storage: bool = False) -> ThreadingHTTPServer:
    """Serve the API, or the storage of large files, on a free port until it is shut down."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub, storage))
    server.daemon_threads = True
    threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, hub: HubStandIn, storage: bool, *connection: Any) -> None:
        self.hub = hub
        self.storage = storage
        super().__init__(*connection)

    def log_message(self, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        from hub_stand_in.hub import Asked

        hub = self.hub
        body = self._body()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        with hub.lock:
            hub.asked.append(Asked(self.command, self.path, token, self.storage))
            fault = next((each for each in hub.faults if each.befalls(self.command, self.path)), None)
        if isinstance(fault, Event):
            fault.happen()
        if isinstance(fault, Cut) and fault.after is None:
            self._hang_up()
            return
        if isinstance(fault, Failure):
            answer = Answer.refused(RefusedError(fault.status, fault.message, fault.code), fault.headers)
        else:
            answer = self._answer(body, token)
        self._send(answer, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815 (http.server's names)

    def _answer(self, body: bytes, token: str | None) -> Answer:
        from hub_stand_in.routes import ROUTES, STORAGE_ROUTES

        parts = urlsplit(self.path)
        try:
            if token is not None and token not in self.hub.accounts and not self.storage:
                raise RefusedError(401, "Invalid credentials in Authorization header")
            request = Request(
                self.command,
                parts.path,
                parse_qs(parts.query),
                self.headers,
                body,
                self.hub.accounts.get(token or ""),
                self.hub.endpoint,
            )
            for method, pattern, route in STORAGE_ROUTES if self.storage else ROUTES:
                found = re.fullmatch(pattern, parts.path)
                if found and method == self.command.replace("HEAD", "GET"):
                    with self.hub.lock:
                        return route(self.hub, request, **{k: unquote(v) for k, v in found.groupdict("").items()})
            raise RefusedError(404, f"Sorry, we can't find the page you are looking for: {self.command} {parts.path}")
        except RefusedError as error:
            return Answer.refused(error)

    def _send(self, answer: Answer, fault: object) -> None:
        body = answer.body
        if isinstance(fault, Corruption) and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        with suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if "Content-Length" not in answer.headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if isinstance(fault, Cut):
                self.wfile.write(body[: fault.after])
                self._hang_up()
                return
            self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))
