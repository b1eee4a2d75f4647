"""Texts that a language model writes side by side: each joins when there is a place and leaves when it ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import torch

from experts.language import LanguageModel
from experts.language.model import sampled
from experts.language.transformer import Cache
from experts.serving.batching import DeadlineError, QueueFullError

PLACES = 8  # texts that are written at once


@dataclass(eq=False)
class Writing:
    """A text to be written: its prompt as ids, at most `tokens` more, and how they are drawn."""

    ids: list[int]
    tokens: int
    k: int
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int | None = None
    due: float = float("inf")
    said: Callable[[int | BaseException | None], object] = field(default=lambda token: None, repr=False)
    given_up: threading.Event = field(default_factory=threading.Event, repr=False)


class Writer:
    """Writes texts in one thread: a step adds a token to each of up to `places` texts. A text does not depend on those
    beside it, except by rounding."""

    def __init__(self, model: Callable[[], LanguageModel], places: int = PLACES, queue_size: int = 64) -> None:
        self._model, self.places, self.queue_size = model, places, queue_size
        self._queue: deque[Writing] = deque()
        self._wake, self._ended = threading.Condition(), False
        self.running = 0
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def stop(self) -> None:
        """Write what was begun and what waits, then end."""
        with self._wake:
            self._ended = True
            self._wake.notify()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Texts that are not begun."""
        return len(self._queue)

    async def write(self, asked: Writing) -> AsyncIterator[int]:
        """Tokens as they are written. Raises `QueueFullError` or `DeadlineError`."""
        with self._wake:
            for given_up in [each for each in self._queue if each.given_up.is_set()]:
                self._queue.remove(given_up)
        if len(self._queue) >= self.queue_size:
            raise QueueFullError(1.0)
        loop, tokens = asyncio.get_running_loop(), asyncio.Queue[int | BaseException | None]()

        def said(token: int | BaseException | None) -> None:
            loop.call_soon_threadsafe(tokens.put_nowait, token)

        asked.said = said
        with self._wake:
            self._queue.append(asked)
            self._wake.notify()
        try:
            while (token := await tokens.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                yield token
        finally:
            asked.given_up.set()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._ended:
                    self._wake.wait()
                if not self._queue:
                    return
            self._write_all(self._model())

    @torch.inference_mode()
    def _write_all(self, model: LanguageModel) -> None:
        """Write until nothing is left, with the model of this moment; a newer one takes the next texts."""
        texts, cache = list[_Written](), model.network.cache(0)
        try:
            while True:
                cache = self._admit(model, texts, cache)
                going = [place for place, text in enumerate(texts) if not text.over()]
                if len(going) < len(texts):
                    texts[:], cache = (
                        [texts[place] for place in going],
                        cache.rows(torch.tensor(going, dtype=torch.int64)),
                    )
                self.running = len(texts)
                if not texts:
                    return
                last = torch.tensor([[text.last] for text in texts])
                k = torch.tensor([text.asked.k for text in texts])[:, None, None].expand(-1, 1, model.settings.layers)
                for text, each in zip(texts, model.network(last, k, cache).logits[:, -1], strict=True):
                    text.add(each)
        except Exception as error:  # those that were being written cannot go on
            for text in texts:
                text.asked.said(error)
        finally:
            self.running = 0

    def _admit(self, model: LanguageModel, texts: list[_Written], cache: Cache) -> Cache:
        """Read the prompts of texts for which there is a place; one whose prompt fails is told."""
        while len(texts) < self.places and self._queue and self._model() is model:
            try:
                text = _Written(self._queue.popleft())
            except IndexError:  # it was given up just now
                break
            if text.over():
                continue
            try:
                one = model.network.cache(1)
                text.add(model.network(torch.tensor([text.asked.ids]), text.asked.k, one).logits[0, -1])
            except Exception as error:
                text.asked.said(error)
                continue
            texts.append(text)
            cache = Cache(
                torch.cat([cache.keys, one.keys], 1), torch.cat([cache.values, one.values], 1),
                torch.cat([cache.lengths, one.lengths]),
            )  # fmt: skip
        return cache


class _Written:
    """A text that is being written."""

    def __init__(self, asked: Writing) -> None:
        self.asked, self.last, self.left = asked, 0, asked.tokens
        self._generator = torch.Generator()
        if asked.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(asked.seed)
        self._ended = False

    def add(self, logits: torch.Tensor) -> None:
        """Draw the next token."""
        asked = self.asked
        self.last = int(sampled(logits[None].float(), asked.temperature, asked.top_p, self._generator)[0])
        self.left -= 1
        if self.last == 0:  # the model ends the document
            self._ended = True
        else:
            asked.said(self.last)

    def over(self) -> bool:
        """Whether nothing more is written; the reader is told."""
        if time.monotonic() > self.asked.due and not self._ended and self.left:
            self.asked.said(DeadlineError("the deadline passed before the text was written"))
            return True
        if self._ended or not self.left:
            self.asked.said(None)
            return True
        return self.asked.given_up.is_set()
