"""The server's process: uvicorn, with a limit on the time that the head of a request takes, and reload on SIGHUP."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar
from urllib.parse import unquote

import uvicorn
from fastapi import FastAPI
from httptools import HttpParserInvalidURLError, parse_url
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from experts.serving.payload import RefusedError

SWITCH = 0.0005  # seconds after which the model's thread lets the event loop run
HEAD_SECONDS = 10.0  # for the head of a request, and before the first of a connection
BODY_SECONDS = 30.0  # for the rest of it, when the application reads no more
HEAD_BYTES = 65_536
BUSY = b'{"detail": "too many requests wait; come again in 1 s"}'
BUSY_HEADERS = [(b"content-type", b"application/json"), (b"retry-after", b"1"), (b"content-length", b"%d" % len(BUSY))]
FIRST, LEAST, WINDOW = 1000.0, 32, 0.25  # requests a second until more is known; admitted at least; seconds
log = logging.getLogger("moe_envs.serve")


def _last(status: bytes, detail: bytes) -> bytes:
    """An answer after which the connection is closed."""
    body = b'{"detail": "%s"}' % detail
    head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(body)) + body


LATE = _last(b"408 Request Timeout", b"the request did not come whole")
LONG = _last(b"431 Request Header Fields Too Large", b"the request is too long")
CROWDED = _last(b"503 Service Unavailable", b"too many connections")


class Admission:
    """Refuses predictions beyond what can be answered in time, before their bodies are read. By Little's law there may
    be half the longest deadline times the requests a second that were answered when it last refused: those of a class
    with a shorter one expire in the queue. Requests count once they have come whole."""

    def __init__(self, app: FastAPI) -> None:
        server = app.state.server
        self.app, self.inside = app, 0
        self.seconds = max(each.deadline for each in server.limits.classes) / 2
        self.capacity = min(FIRST, float(server.service.sizes[-1] / server.service.seconds[:, -1].min()))
        self._done, self._refused, self._since = 0, False, time.monotonic()

    def enter(self) -> Any:
        """The application for a prediction whose head has just come."""
        if not self.inside:  # the time without requests says nothing of the capacity
            self._done, self._refused, self._since = 0, False, time.monotonic()
        if self.inside >= max(LEAST, self.capacity * self.seconds):
            self._refused = True
            return self._busy
        return Prediction(self)

    def answered(self) -> None:
        """Count an answer; learn the capacity from a time in which requests were refused."""
        self._done += 1
        if (elapsed := time.monotonic() - self._since) > WINDOW:
            if self._refused:
                self.capacity += (self._done / elapsed - self.capacity) / 4
            self._done, self._refused, self._since = 0, False, time.monotonic()

    async def _busy(self, scope: Any, receive: Any, send: Any) -> None:
        self.app.state.server.metrics.refused.inc()
        await send({"type": "http.response.start", "status": 429, "headers": BUSY_HEADERS})
        await send({"type": "http.response.body", "body": BUSY})


class Prediction:
    """A prediction that was let in."""

    def __init__(self, admission: Admission) -> None:
        self.admission, self.counted, self.over = admission, False, False

    def whole(self) -> None:
        """Its body has come."""
        if not self.counted and not self.over:
            self.counted = True
            self.admission.inside += 1

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer it."""
        status = 0

        async def watched(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.admission.app(scope, receive, watched)
        finally:
            self.over = True
            self.admission.inside -= self.counted
            if status == 200:
                self.admission.answered()


class Impatient(HttpToolsProtocol):
    """Closes connections whose request does not come, or is too long, and refuses predictions where there are too
    many."""

    admission: ClassVar[Admission]
    most: ClassVar[int]  # connections
    body_bytes: ClassVar[int]
    _timer: asyncio.TimerHandle | None = None
    _prediction: Prediction | None = None
    _bytes, _room = 0, HEAD_BYTES

    def connection_made(self, transport: Any) -> None:
        """Begin to wait; refuse a connection too many."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.write(CROWDED)
            transport.close()
        else:
            self._wait(HEAD_SECONDS)

    def data_received(self, data: bytes) -> None:
        """Take part of a request, unless the request is too long."""
        self._bytes += len(data)
        if self._bytes > self._room + len(data):  # what came before this was too long already
            self._end(LONG)
            return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """The first byte of a request came."""
        super().on_message_begin()
        self._bytes, self._room = 0, HEAD_BYTES
        self._wait(HEAD_SECONDS)

    def on_headers_complete(self) -> None:
        """The head of a request is whole."""
        self._stop()
        self._wait(BODY_SECONDS)
        self._room = HEAD_BYTES + 2 * self.body_bytes
        app, free = self.app, self.cycle is None or self.cycle.response_complete
        prediction = free and not self.parser.should_upgrade() and _path(self.url) == "/predict"
        if prediction:
            self.app = self.admission.enter()
            self._prediction = self.app if isinstance(self.app, Prediction) else None
        super().on_headers_complete()
        self.app = app

    def on_message_complete(self) -> None:
        """A request is whole."""
        self._stop()
        self._bytes, self._room = 0, HEAD_BYTES
        if self._prediction is not None:
            self._prediction.whole()
            self._prediction = None
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stop()
        super().connection_lost(exc)

    def _wait(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(seconds, self._give_up)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self.cycle is not None and not self.cycle.response_complete:  # of the request before
            self._wait(HEAD_SECONDS)
        else:
            self._end(LATE)

    def _end(self, answer: bytes) -> None:
        """Close the connection, with an answer where none is being sent or has been."""
        if not self.transport.is_closing():
            if self.cycle is None or not self.cycle.response_started:
                self.transport.write(answer)
            self.transport.close()


def _path(url: bytes) -> str:
    """The path of a request's target as the application sees it."""
    try:
        return unquote(parse_url(url).path.decode("ascii"))
    except (ValueError, HttpParserInvalidURLError, AttributeError):
        return ""


def run(app: FastAPI, host: str, port: int, connections: int) -> None:
    """Serve until SIGINT or SIGTERM, which let requests end; SIGHUP loads the model again. Connections above the limit
    are answered 503."""
    sys.setswitchinterval(SWITCH)
    loop = import_module("uvloop" if find_spec("uvloop") else "asyncio")  # there is no uvloop for Windows
    loop.run(_serve(app, config_of(app, host, port, connections)))


def config_of(app: FastAPI, host: str, port: int, connections: int) -> uvicorn.Config:
    """How uvicorn runs the service."""
    protocol = type("Protocol", (Impatient,), {
        "admission": Admission(app), "most": connections, "body_bytes": app.state.server.limits.body_bytes,
    })  # fmt: skip
    return uvicorn.Config(
        app, host=host, port=port, http=protocol, timeout_graceful_shutdown=30, access_log=False, log_config=None,
        server_header=False, proxy_headers=False,
    )  # fmt: skip


async def _serve(app: FastAPI, config: uvicorn.Config) -> None:
    reloads = set[asyncio.Task[None]]()

    def reload() -> None:
        task = asyncio.get_running_loop().create_task(_reload(app))
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    if hasattr(signal, "SIGHUP"):
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
    await uvicorn.Server(config).serve()


async def _reload(app: FastAPI) -> None:
    with suppress(RefusedError):  # has been logged
        await app.state.server.reload()
