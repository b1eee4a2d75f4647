"""What every request passes: API key, rate limit, request id, metrics, a line in the log."""

from __future__ import annotations

import json
import logging
import math
import re
import time
import uuid
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from experts.serving.server import Server

trace: Any = import_module("opentelemetry.trace") if find_spec("opentelemetry") else None
lines = logging.getLogger("moe_envs.serve.requests")  # a JSON object for each request
OPEN = "/health", "/health/live", "/health/ready"  # without a key and at any rate
LOCAL = "127.0.0.1", "::1"
IDENTIFIER = re.compile(r"[\w.-]{1,64}", re.ASCII)


class Gate:
    """ASGI middleware round the whole application."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server
        self._paths: set[str] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer 401 or 429."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, headers, status = time.perf_counter(), Headers(scope=scope), 500
        asked = headers.get("x-request-id", "")
        identifier = asked if IDENTIFIER.fullmatch(asked) else uuid.uuid4().hex
        address = scope["client"][0] if scope.get("client") else ""
        said: dict[str, Any] = {}
        scope.setdefault("state", {}).update(id=identifier, said=said, local=address in LOCAL)
        path = self._path(scope)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identifier.encode())]
            await send(message)

        metrics = self.server.metrics
        try:
            with metrics.flying.track_inprogress():
                if trace is not None:  # the span is FastAPI's
                    trace.get_current_span().set_attribute("request.id", identifier)
                refused = None if path in OPEN else self._refused(headers, address)
                await (refused or self.app)(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - begun
            metrics.requests.labels(path, status).inc()
            metrics.latency.labels(path).observe(seconds)
            if lines.isEnabledFor(logging.INFO):
                about = {"time": time.time(), "request_id": identifier, "method": scope["method"], "path": path,
                         "status": status, "ms": round(1e3 * seconds, 3)}  # fmt: skip
                lines.info(json.dumps(about | said))

    def _path(self, scope: Scope) -> str:
        """One of the application's paths, or "other"."""
        if self._paths is None:
            self._paths = {route.path for route in scope["app"].routes}
        return scope["path"] if scope["path"] in self._paths else "other"

    def _refused(self, headers: Headers, address: str) -> JSONResponse | None:
        keys, client = self.server.keys, address
        if keys:
            bearer = headers.get("authorization", "")
            given = bearer[7:] if bearer[:7].lower() == "bearer " else headers.get("x-api-key", "")
            number = keys.number(given)
            if number is None:
                return _answer(401, "give an API key: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})
            client = f"key {number}"
        wait = self.server.buckets.take(client)
        if wait == 0:
            return None
        seconds = str(math.ceil(wait))
        return _answer(429, f"too many requests from you; come again in {seconds} s", {"Retry-After": seconds})


def _answer(status: int, detail: str, headers: dict[str, str]) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)
