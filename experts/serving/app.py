"""A model as a web service: predictions in batches, texts token by token, health, metrics, reload.

`create_app` returns a FastAPI application; `moe-serve` runs it. Errors are JSON with one sentence: `{"detail": "..."}`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from experts.serving import bodies
from experts.serving import served as models
from experts.serving.batching import DeadlineError, QueueFullError
from experts.serving.control import CAPS, MakeController
from experts.serving.gate import Gate
from experts.serving.payload import (
    JSON,
    RefusedError,
    parse_json,
    read,
    rows_of,
)
from experts.serving.server import Limits, Load, Server
from experts.serving.texts import RequestedText

log = logging.getLogger("moe_envs.serve")
INLINE = 32_768  # bytes of JSON that are parsed in the event loop, which takes less than a change of threads


def create_app(
    model_path: Path | str, controller: MakeController | None = None, load: Load = models.load, **limits: Any
) -> FastAPI:
    """The web service of a model: a bundle, a reference model or a language model by name or folder, or an exported
    ONNX folder. `controller` makes what decides when a batch is sent (default: the rule tuned at the export, or
    SlackFit), `limits` are those of `Limits`. The model is loaded and timed at once; raises what `load` raises."""
    return app_of(Server(model_path, controller, load, Limits(**limits)))


def app_of(server: Server) -> FastAPI:
    """The web service of a server's parts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.start()
        yield
        await server.stop()

    about = "Predictions of a Mixture-of-Experts model. Errors are JSON with one sentence under `detail`."
    app = FastAPI(title="moe-serve", version=server.version, description=about, lifespan=lifespan)
    app.state.server = server
    app.add_middleware(Gate, server=server)
    for kind, answer in ((RefusedError, _refused), (QueueFullError, _full), (DeadlineError, _late),
                         (ValidationError, _invalid), (HTTPException, _http), (Exception, _failed)):  # fmt: skip
        app.add_exception_handler(kind, answer)
    Api(server).add_to(app)
    return app


class Api:
    """The endpoints of a server."""

    def __init__(self, server: Server) -> None:
        self.server, self.limits = server, server.limits
        self.classes = [each.name for each in server.limits.classes]

    def add_to(self, app: FastAPI) -> None:
        """Add all endpoints to an application."""
        errors: Any = bodies.ERRORS
        texts: Any = errors | {200: {"description": "A text, or its events", "content": {JSON: {}, bodies.EVENTS: {}}}}
        refused: Any = {code: errors[code] for code in (401, 429)}
        ready: Any = refused | {503: {"description": "not yet, or no more", "content": {JSON: {}}}}
        counters: Any = refused | {200: {"description": "Counters", "content": {"text/plain": {}}}}
        inputs, texts_form = bodies.inputs_schema(self.server), bodies.text_schema(self.server, bodies.ToWrite)
        completion = bodies.text_schema(self.server, bodies.Completion)
        for path, answer, summary, body, answers in (
            ("/predict", self.predict, "Answers to rows of inputs", inputs, errors),
            ("/generate", self.generate, "A text after a prompt", texts_form, texts),
            ("/v1/completions", self.completions, "The same in OpenAI's form", completion, texts),
            ("/reload", self.reload, "Load the model again", None, errors),
        ):
            app.add_api_route(
                path, answer, methods=["POST"], summary=summary, responses=answers,
                openapi_extra=None if body is None else bodies.body_of(body),
            )  # fmt: skip
        for path, get, summary, answers in (
            ("/health", self.health, "Live and ready", ready),
            ("/health/live", self.live, "The process answers", ready),
            ("/health/ready", self.health, "Requests are answered", ready),
            ("/metrics", self.metrics, "Counters in Prometheus' format", counters),
            ("/model", self.model, "What the model is, and its measured seconds", refused),
        ):
            kind = PlainTextResponse if get == self.metrics else JSONResponse
            app.add_api_route(path, get, methods=["GET"], summary=summary, responses=answers, response_class=kind)

    async def predict(self, request: Request) -> Response:
        """Queue the rows and answer with what the model says."""
        server = self.server
        media, raw = request.headers.get("content-type", ""), await self._read(request)
        if len(raw) <= INLINE and media.startswith(JSON) and server.served.dtype != "int64":
            rows, more = rows_of(raw, media, server.served)
        else:
            loop = asyncio.get_running_loop()
            rows, more = await loop.run_in_executor(server.parsers, rows_of, raw, media, server.served)
        asked = bodies.Asked.model_validate(more)
        deadline = None if asked.deadline_ms is None else asked.deadline_ms / 1e3
        number, size = self._class(asked.request_class), sum(server.served.weight(row) for row in rows)
        if size > min(CAPS[-1], self.limits.queue_size):
            most = min(CAPS[-1], self.limits.queue_size)
            raise RefusedError(
                413, f"the inputs are as long as {size} usual rows, more than {most}: send them in parts"
            )
        found, level = await server.batcher.submit(rows, deadline, number, size)
        answers, version, name = [answer for _, answer in found], found[0][0], server.served.levels[level]
        _count_experts(server, answers)
        experts = [each["experts"] for each in answers]
        request.state.said |= {"rows": len(rows), "level": name, "version": version, "experts": experts}
        return Response(to_json({"predictions": answers, "version": version, "level": name}), media_type=JSON)

    def _class(self, name: str | None) -> int:
        if name is not None and name not in self.classes:
            raise RefusedError(422, f"request_class={name[:80]!r} is not one of {', '.join(self.classes)}")
        return 0 if name is None else self.classes.index(name)

    async def generate(self, request: Request) -> Response:
        """Write a text, at once or as events."""
        asked = bodies.ToWrite.model_validate(await self._object(request))
        text = await RequestedText.of(self.server, asked, request)
        if asked.stream:
            return await text.stream(lambda piece, end: {"text": piece} | ({"finish_reason": end} if end else {}))
        whole, end = await text.whole()
        return JSONResponse({"text": whole, "finish_reason": end, "tokens": text.count, "version": text.version})

    async def completions(self, request: Request) -> Response:
        """Write a text, asked and answered in OpenAI's form."""
        asked = bodies.Completion.model_validate(await self._object(request)).to_write()
        text = await RequestedText.of(self.server, asked, request)
        name = self.server.served.manifest["source"]["name"]
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
        }

        def of(piece: str, end: str | None) -> dict[str, Any]:
            return head | {"choices": [{"index": 0, "text": piece, "logprobs": None, "finish_reason": end}]}

        if asked.stream:
            return await text.stream(of)
        whole, end = await text.whole()
        asked_for, written = len(text.ids), text.count
        usage = {"prompt_tokens": asked_for, "completion_tokens": written, "total_tokens": asked_for + written}
        return JSONResponse(of(whole, end) | {"usage": usage})

    async def reload(self, request: Request) -> Response:
        """Load the model again, for those who have a key or are on this machine; not for a page in a browser."""
        if not self.server.keys and (not request.state.local or "origin" in request.headers):
            raise RefusedError(403, "a reload from another machine, or by a page in a browser, needs an API key")
        return JSONResponse({"version": await self.server.reload()})

    async def health(self) -> Response:
        """Whether requests are answered."""
        status = {"live": True, "ready": self.server.ready, "version": self.server.version}
        return JSONResponse(status, 200 if self.server.ready else 503)

    async def live(self) -> Response:
        """That this answers, and batches are sent."""
        return JSONResponse({"live": not self.server.dead}, 503 if self.server.dead else 200)

    async def metrics(self) -> Response:
        """All counters."""
        return Response(self.server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def model(self) -> Response:
        """The manifest, the measured times, and what decides."""
        server, service = self.server, self.server.service
        seconds = {name: dict(zip(map(str, service.sizes), row, strict=True))
                   for name, row in zip(service.levels, service.seconds.tolist(), strict=True)}  # fmt: skip
        about = {"seconds": seconds, "controller": server.rule}
        return JSONResponse(server.served.manifest | about)

    async def _read(self, request: Request) -> bytes:
        length = request.headers.get("content-length")
        return await read(request.stream(), length, self.limits.body_bytes, self.limits.body_seconds)

    async def _object(self, request: Request) -> dict[str, Any]:
        """The object of a JSON body."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != JSON:
            raise RefusedError(415, f"the media type {kind[:80]!r} is not {JSON}")
        raw = await self._read(request)
        if len(raw) <= INLINE:
            return parse_json(raw)
        return await asyncio.get_running_loop().run_in_executor(self.server.parsers, parse_json, raw)


def _count_experts(server: Server, answers: list[dict[str, Any]]) -> None:
    """How often each expert ran, of a language model for the last token by layer."""
    counter = server.metrics.experts
    for answer in answers:
        for number, expert in enumerate(answer["experts"] or ()):
            names = [f"{number}/{each}" for each in expert] if isinstance(expert, list) else [str(expert)]
            for name in names:
                counter.labels(name).inc()


def _answer(status: int, detail: str, **headers: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)


async def _refused(request: Request, error: Any) -> Response:
    return _answer(error.status, error.detail)


async def _full(request: Request, error: Any) -> Response:
    wait = str(max(1, math.ceil(error.retry_after)))
    return _answer(429, f"{error}; come again in {wait} s", **{"Retry-After": wait})


async def _late(request: Request, error: Any) -> Response:
    return _answer(504, str(error))


async def _invalid(request: Request, error: Any) -> Response:
    first = error.errors()[0]
    return _answer(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:400])


async def _http(request: Request, error: Any) -> Response:
    return JSONResponse({"detail": str(error.detail)}, error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    log.exception("request %s failed", getattr(request.state, "id", "?"), exc_info=error)
    return _answer(500, f"the server failed; its log has more under request {getattr(request.state, 'id', '?')}")
