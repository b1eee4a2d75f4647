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

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from experts.serving.payload import RefusedError

SWITCH = 0.0005  # seconds after which the model's thread lets the event loop run
HEAD_SECONDS = 10.0  # for the head of a request, and before the first of a connection
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
CROWDED = _last(b"503 Service Unavailable", b"too many connections")


class Admission:
    """Refuses predictions beyond what can be answered in time, before their bodies are read, which costs a fifth of an
    answer. By Little's law there may be half a deadline times the requests a second that were answered when it last
    refused."""

    def __init__(self, app: FastAPI) -> None:
        server = app.state.server
        self.app, self.inside = app, 0
        self.seconds = min(each.deadline for each in server.limits.classes) / 2
        self.capacity = min(FIRST, float(server.service.sizes[-1] / server.service.seconds[:, -1].min()))
        self._done, self._refused, self._since = 0, False, time.monotonic()

    def enter(self) -> Any:
        """The application for a prediction whose head has just come."""
        if self.inside >= max(LEAST, self.capacity * self.seconds):
            self._refused = True
            return self._busy
        self.inside += 1
        return self._counted

    async def _counted(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self.app(scope, receive, send)
        finally:
            self.inside -= 1
            self._done += 1
            if (elapsed := time.monotonic() - self._since) > WINDOW:
                if self._refused:
                    self.capacity += (self._done / elapsed - self.capacity) / 4
                self._done, self._refused, self._since = 0, False, time.monotonic()

    async def _busy(self, scope: Any, receive: Any, send: Any) -> None:
        self.app.state.server.metrics.refused.inc()
        await send({"type": "http.response.start", "status": 429, "headers": BUSY_HEADERS})
        await send({"type": "http.response.body", "body": BUSY})


class Impatient(HttpToolsProtocol):
    """Closes connections whose request does not come, and refuses predictions where there are too many."""

    admission: ClassVar[Admission]
    most: ClassVar[int]  # connections
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait; refuse a connection too many."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.write(CROWDED)
            transport.close()
        else:
            self._wait()

    def on_message_begin(self) -> None:
        """The first byte of a request came."""
        super().on_message_begin()
        self._wait()

    def on_headers_complete(self) -> None:
        """The head of a request is whole."""
        self._stop()
        app, free = self.app, self.cycle is None or self.cycle.response_complete
        if free and self.url.startswith(b"/predict") and not self.parser.should_upgrade():
            self.app = self.admission.enter()
        super().on_headers_complete()
        self.app = app

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(LATE)
            self.transport.close()


def run(app: FastAPI, host: str, port: int, connections: int) -> None:
    """Serve until SIGINT or SIGTERM, which let requests end; SIGHUP loads the model again. Connections above the limit
    are answered 503."""
    sys.setswitchinterval(SWITCH)
    loop = import_module("uvloop" if find_spec("uvloop") else "asyncio")  # there is no uvloop for Windows
    loop.run(_serve(app, config_of(app, host, port, connections)))


def config_of(app: FastAPI, host: str, port: int, connections: int) -> uvicorn.Config:
    """How uvicorn runs the service."""
    protocol = type("Protocol", (Impatient,), {"admission": Admission(app), "most": connections})
    return uvicorn.Config(
        app, host=host, port=port, http=protocol, timeout_graceful_shutdown=30, access_log=False, log_config=None,
        server_header=False,
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
