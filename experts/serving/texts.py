"""A text that a request asks for, at once or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any, Self

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from experts.serving.batching import DeadlineError, QueueFullError
from experts.serving.bodies import EVENTS, ToWrite
from experts.serving.generation import Writing
from experts.serving.payload import RefusedError, encoded
from experts.serving.served import Texts
from experts.serving.server import Server

log = logging.getLogger("moe_envs.serve")
LOOK = 0.5  # seconds between two looks whether a client that waits for a text is still there


class RequestedText:
    """A text that is written for a request, as long as its client is there."""

    @classmethod
    async def of(cls, server: Server, asked: ToWrite, request: Request) -> Self:
        """The text of a request, whose prompt is encoded beside the event loop."""
        served = server.text_model()
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(server.parsers, encoded, served, asked.prompt)
        return cls(server, served, asked, ids, request)

    def __init__(self, server: Server, served: Texts, asked: ToWrite, ids: list[int], request: Request) -> None:
        settings = served.model.settings
        if asked.tokens >= settings.context:
            raise RefusedError(422, f"tokens: must be from 1 to {settings.context - 1}, the context less one")
        if asked.k is not None and asked.k > settings.k:
            raise RefusedError(422, f"k: the model runs 1 to {settings.k} experts for a token")
        self.ids = ids[-(settings.context - asked.tokens) :]
        self.server, self.served, self.request = server, served, request
        self.count, self.version = 0, server.version
        self.writing = Writing(
            self.ids, asked.tokens, asked.k or settings.k, asked.temperature, asked.top_p, asked.seed,
            time.monotonic() + server.limits.text_seconds,
        )  # fmt: skip

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it is written; bytes of a letter that is not whole wait for the rest."""
        tokens, said = list[int](), ""
        try:
            async for token in self.server.writer.write(self.writing):
                tokens.append(token)
                self.count += 1
                text = self.served.model.decode(tokens)
                if not text.endswith("\ufffd"):
                    yield text[len(said) :]
                    said = text
            rest = self.served.model.decode(tokens)[len(said) :]
            if rest:
                yield rest
        finally:
            self.server.metrics.tokens.inc(self.count)
            self.request.state.said |= {"tokens": self.count, "version": self.version}

    @property
    def end(self) -> str:
        """Why the text ends."""
        return "length" if self.count >= self.writing.tokens else "stop"

    async def whole(self) -> tuple[str, str]:
        """The text, and why it ends; it is given up where the client leaves."""

        async def written() -> str:
            return "".join([piece async for piece in self.pieces()])

        task = asyncio.get_running_loop().create_task(written())
        while not (await asyncio.wait([task], timeout=LOOK))[0]:
            if await self.request.is_disconnected():
                task.cancel()
                raise RefusedError(499, "the client left")
        return await task, self.end

    async def stream(self, form: Any) -> Response:
        """Server-sent events, of which the last says [DONE]; what goes wrong before the first is an error status."""
        pieces = self.pieces()
        first = await anext(pieces, None)

        async def events() -> AsyncIterator[str]:
            try:
                if first is not None:
                    yield _event(form(first, None))
                async for piece in pieces:
                    yield _event(form(piece, None))
                yield _event(form("", self.end))
            except Exception as error:
                if not isinstance(error, DeadlineError | QueueFullError):
                    log.exception("request %s failed", self.request.state.id)
                yield _event({"detail": str(error)})
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type=EVENTS)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
