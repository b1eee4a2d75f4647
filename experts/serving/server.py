"""The parts of a running server: model, batches, texts that are written, limits, metrics; and how it reloads."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cost.arguments import one_line
from experts.language import LanguageModel
from experts.serving import served as models
from experts.serving.batching import Batcher
from experts.serving.control import DEADLINE, Choices, MakeController, RequestClass
from experts.serving.generation import PLACES, Writer
from experts.serving.limits import Keys, TokenBuckets
from experts.serving.metrics import Metrics
from experts.serving.payload import RefusedError
from experts.serving.rules import default, rule_of, tuned_rule_of
from experts.serving.served import Served, Texts

log = logging.getLogger("moe_envs.serve")
Load = Callable[[Path | str], Served]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server accepts: bytes of a body and seconds for it to come; rows that wait; requests a second of a client
    (0: any number) and at once; API keys (none: everybody may ask); kinds of requests, of which the first is what a
    request is that names none; seconds for a text, texts written at once, and texts that wait."""

    body_bytes: int = 4_000_000
    body_seconds: float = 10.0
    queue_size: int = 1024
    rate: float = 0.0
    burst: float | None = None
    keys: Sequence[str] = ()
    classes: Sequence[RequestClass] = (RequestClass(deadline=DEADLINE),)
    text_seconds: float = 120.0
    texts: int = PLACES
    text_queue: int = 64

    def __post_init__(self) -> None:
        for name in ("body_bytes", "body_seconds", "queue_size", "text_seconds", "texts", "text_queue"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        names = [each.name for each in self.classes]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"request classes must have names of their own, got {names}")


class Server:
    """A model that answers. It is loaded and measured at once; `start` and `stop` are called in the event loop."""

    def __init__(
        self, path: Path | str, controller: MakeController | None = None, load: Load = models.load,
        limits: Limits | None = None,
    ) -> None:  # fmt: skip
        self.path, self.load, self.limits = path, load, limits or Limits()
        self.served = load(path)
        self.service = models.measure(self.served)
        self.metrics, self.keys = Metrics(), Keys(self.limits.keys)
        self.buckets = TokenBuckets(self.limits.rate, self.limits.burst)
        choices = Choices(len(self.served.levels), len(self.limits.classes))
        tuned = None if controller else tuned_rule_of(self.served.manifest, self.limits.classes)
        make = controller or (rule_of(tuned) if tuned else default)
        self.controller = make(choices, self.service, self.limits.classes)
        self.rule = f"{tuned} (tuned at the export)" if tuned else type(self.controller).__name__
        self.batcher = Batcher(
            self.run, self.controller, choices, self.service, self.limits.classes, self.limits.queue_size, self._ran,
            self.metrics.failures.inc,
        )  # fmt: skip
        self.writer = Writer(self._language, self.limits.texts, self.limits.text_queue)
        self.metrics.watch(lambda: self.batcher.waiting, lambda: self.writer.running)
        self.metrics.serve_version(self.version)
        self._loader = ThreadPoolExecutor(1, "loader")
        self._reloading: asyncio.Task[str] | None = None
        self._started = False
        self.parsers = ThreadPoolExecutor(2, "parser")

    @property
    def version(self) -> str:
        """Of the model that answers now."""
        return str(self.served.manifest["version"])

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return self.batcher.alive

    @property
    def dead(self) -> bool:
        """Whether it was started and answers no more."""
        return self._started and not self.batcher.alive

    def start(self) -> None:
        """Begin to answer, once."""
        if self._started:
            raise RuntimeError("this application was started before: create_app makes another")
        torch.set_num_threads(1)
        gc.collect()
        gc.freeze()  # a collection of all objects of torch would stop the event loop for long
        self.batcher.start()
        self._started = True
        self.writer.start()

    async def stop(self) -> None:
        """Answer what waits, then end."""
        await self.batcher.stop()
        await asyncio.get_running_loop().run_in_executor(None, self.writer.stop)
        self._loader.shutdown()
        self.parsers.shutdown()

    async def reload(self) -> str:
        """Load the model again; the old one answers meanwhile, and goes on if the new one is damaged or takes other
        inputs, which raises `RefusedError`. Returns the version. Who asks while it is loaded gets the same answer."""
        if self._reloading is None or self._reloading.done():
            self._reloading = asyncio.get_running_loop().create_task(self._reload())
        return await asyncio.shield(self._reloading)

    async def _reload(self) -> str:
        try:
            new = await asyncio.get_running_loop().run_in_executor(self._loader, self._fitting)
        except Exception as error:
            self.metrics.reloads.labels("refused").inc()
            log.warning("the model was not reloaded, %s goes on: %s", self.version, one_line(error))
            raise RefusedError(409, f"{self.version} goes on: {one_line(error)}") from error
        self.served = new
        self.metrics.reloads.labels("loaded").inc()
        self.metrics.serve_version(self.version)
        log.info("loaded %s", self.version)
        return self.version

    def _fitting(self) -> Served:
        new, old = self.load(self.path), self.served
        if new.signature != old.signature:
            raise ValueError("it takes other inputs, or has other levels: start a new server for it")
        new.run(new.examples(2), 0)
        return new

    def run(self, rows: list[Any], level: int) -> list[Any]:
        """Answers of the model of this moment, each with its version."""
        served = self.served
        return [(served.manifest["version"], answer) for answer in served.run(rows, level)]

    def text_model(self) -> Texts:
        """The model, if it writes texts; raises `RefusedError` otherwise."""
        if not isinstance(self.served, Texts):
            raise RefusedError(404, "the model is no language model; POST /predict asks it")
        return self.served

    def _language(self) -> LanguageModel:
        return self.text_model().model

    def _ran(self, rows: int, level: int, seconds: float) -> None:
        self.metrics.batch_rows.observe(rows)
        self.metrics.batch_seconds.labels(self.served.levels[level]).observe(seconds)
