"""Models as a server runs them: rows in, answers out, at one of several quality levels, with the times measured."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cost.timing import torch_threads
from experts import bundle, language, reference_models
from experts.data import DataError
from experts.language import LanguageModel, passages
from experts.model import mix
from experts.routers import top_k
from experts.serving.control import CAPS, Service
from experts.serving.export import MANIFEST, load_exported

SIZES = (1, 4, 16, 64)  # rows of the batches that are timed
REPEATS = 3
TOKENS = 64  # of a text that is timed
LIKELIEST = 5  # next tokens of an answer
SAMPLE = 64, 64  # passages and tokens on which levels are compared


class Served(ABC):
    """A model behind a server. `levels` are its quality levels, the best first, `quality` what is left of the best
    one's, `shape` and `dtype` those of a row (of a text its most tokens), `manifest` what it is."""

    levels: tuple[str, ...]
    quality: tuple[float, ...]
    shape: tuple[int, ...]
    dtype: str
    manifest: dict[str, Any]

    @abstractmethod
    def run(self, rows: Sequence[np.ndarray], level: int) -> list[dict[str, Any]]:
        """An answer for each row."""

    def weight(self, row: np.ndarray) -> int:
        """How many rows of the size that is timed take as long as this one."""
        return 1

    @property
    def signature(self) -> tuple[Any, ...]:
        """What requests are made for: models of one signature can take each other's place."""
        return self.shape, self.dtype, self.levels

    @abstractmethod
    def examples(self, count: int) -> list[np.ndarray]:
        """Rows to warm up and measure with."""


class Classifier(Served):
    """A Mixture-of-Experts classifier, whose levels are numbers of experts of an input."""

    dtype = "float32"

    def __init__(self, module: nn.Module, inputs: np.ndarray, quality: dict[int, float], about: dict[str, Any]) -> None:
        self.module: Any = module.eval()
        self.inputs, self.shape = np.asarray(inputs, dtype=np.float32), tuple(inputs.shape[1:])
        self.numbers = tuple(sorted(quality, reverse=True))
        self.levels = tuple(f"top-{k}" for k in self.numbers)
        self.quality = tuple(quality[k] for k in self.numbers)
        self.manifest = manifest_of(self, about)

    def run(self, rows: Sequence[np.ndarray], level: int) -> list[dict[str, Any]]:
        """Label, probabilities of all classes, and the experts that ran, for each row."""
        with torch.inference_mode():
            x_BD = torch.from_numpy(np.stack(rows))
            h_BD = self.module.trunk(x_BD)
            gate_BE = self.module.gate(h_BD)
            members_BE = top_k(gate_BE, self.numbers[level])
            logits_BC = mix(gate_BE, self.module.experts(h_BD), members_BE, self.module.graph)
        return classes(logits_BC.numpy(), members_BE.numpy())

    def examples(self, count: int) -> list[np.ndarray]:
        """Inputs that come with the model."""
        return list(np.take(self.inputs, np.arange(count), axis=0, mode="wrap"))


class Graph(Served):
    """An exported ONNX classifier: one level, and the experts are not known."""

    def __init__(self, folder: Path) -> None:
        found = load_exported(folder)
        self._run, self.manifest = found.run, found.manifest
        batch, *rest = found.manifest["input"]["shape"]
        if any(not isinstance(size, int) for size in rest):
            raise DataError(f"{folder} is no classifier: its inputs are {found.manifest['input']['shape']}")
        self.batch, self.shape = batch if isinstance(batch, int) else None, tuple(rest)
        self.dtype = found.manifest["input"]["dtype"]
        self.levels, self.quality = (found.manifest["format"],), (1.0,)

    def run(self, rows: Sequence[np.ndarray], level: int) -> list[dict[str, Any]]:
        """Label and probabilities for each row; a model of one batch size gets its last row several times."""
        inputs = np.stack(rows)
        size = self.batch or len(rows)
        whole = np.take(inputs, np.arange(-(-len(rows) // size) * size), axis=0, mode="clip")
        parts = [self._run(whole[start : start + size]) for start in range(0, len(whole), size)]
        return classes(np.concatenate(parts)[: len(rows)], None)

    def examples(self, count: int) -> list[np.ndarray]:
        """Random inputs from 0 to 1."""
        return list(np.random.default_rng(0).random((count, *self.shape)).astype(self.dtype))


class Texts(Served):
    """A language model: rows are texts as token ids of any length, answers the likeliest next tokens; its levels are
    numbers of experts of a token, and their quality is perplexity at the best level over their own."""

    dtype = "int64"

    def __init__(self, model: LanguageModel, examples: np.ndarray, about: dict[str, Any]) -> None:
        self.model, self._examples = model, examples
        k = model.settings.k
        self.numbers = tuple(sorted({k, max(1, k // 2), 1}, reverse=True))
        self.levels, self.shape = tuple(f"top-{each}" for each in self.numbers), (model.settings.context,)
        sample = examples[: SAMPLE[0], : SAMPLE[1] + 1]
        with torch_threads(1):
            losses = [float(model.loss(sample, each).mean()) for each in self.numbers]
        self.quality = tuple(float(np.exp(losses[0] - each)) for each in losses)
        self.manifest = manifest_of(self, about)

    def weight(self, row: np.ndarray) -> int:
        """A text of 64 tokens counts one row."""
        return -(-len(row) // TOKENS)

    @property
    def signature(self) -> tuple[Any, ...]:
        """With the tokenizer."""
        return *super().signature, self.model.tokenizer.to_str()

    def run(self, rows: Sequence[np.ndarray], level: int) -> list[dict[str, Any]]:
        """The likeliest next tokens of each text, and the experts of its last token in each layer. Texts that are more
        than twice as long as others are run after them, as all of a batch are filled up to the longest."""
        found, order = [dict[str, Any]()] * len(rows), sorted(range(len(rows)), key=lambda place: len(rows[place]))
        while order:
            together = [place for place in order if len(rows[place]) <= 2 * len(rows[order[0]])]
            for place, answer in zip(together, self._together([rows[each] for each in together], level), strict=True):
                found[place] = answer
            order = order[len(together) :]
        return found

    def _together(self, rows: Sequence[np.ndarray], level: int) -> list[dict[str, Any]]:
        lengths_B = np.array([len(each) for each in rows])
        ids_BT = np.zeros((len(rows), lengths_B.max()), dtype=np.int64)  # what follows a text does not change it
        for number, each in enumerate(rows):
            ids_BT[number, : len(each)] = each
        last_B, k = torch.from_numpy(lengths_B - 1), self.numbers[level]
        every_B = torch.arange(len(rows))
        with torch.inference_mode():
            output = self.model.network(torch.from_numpy(ids_BT), k)
            best = output.logits[every_B, last_B].softmax(-1).topk(LIKELIEST)
            gates = torch.stack([each.logits.view(*ids_BT.shape, -1)[every_B, last_B] for each in output.routing], 1)
            experts = gates.topk(k).indices.sort(-1).values.tolist()
        return [
            {"label": labels[0], "text": self.model.decode(labels[:1]), "labels": labels, "probabilities": odds,
             "experts": chosen}
            for labels, odds, chosen in zip(best.indices.tolist(), best.values.tolist(), experts, strict=True)
        ]  # fmt: skip

    def examples(self, count: int) -> list[np.ndarray]:
        """Beginnings of passages."""
        return list(np.take(self._examples[:, :TOKENS], np.arange(count), axis=0, mode="wrap"))


def load(path: Path | str) -> Served:
    """A model to serve: a bundle, a reference model or a language model by name or folder, or an exported ONNX folder.

    Raises `ValueError` or `DataError` for what is none of them, or is damaged.
    """
    place, name = Path(path), str(path)
    if (place / MANIFEST).exists():
        return Graph(place)
    if (language.find(name) / language.model.TOKENIZER).exists():
        return of_language(name)
    try:
        reference_models.recipe_of(name)
    except ValueError:
        return of_bundle(name)
    return of_reference_model(name)


def of_bundle(name: str | Path) -> Classifier:
    """The classifier of a bundle, with the accuracy of its levels on the validation split."""
    found = bundle.load(name)
    split = found.split("validation")
    gate_BE, outputs_BEC = torch.from_numpy(split.gate_logits), torch.from_numpy(split.logits)
    module: Any = found.model()
    accuracy = {
        k: float((mix(gate_BE, outputs_BEC, top_k(gate_BE, k), module.graph).argmax(-1).numpy() == split.labels).mean())
        for k in (2, 1)
    }
    about = {"kind": "classifier", "name": found.path.name, "sha256": found.sha256}
    return Classifier(module, found.examples, _relative(accuracy), about)


def of_reference_model(name: str) -> Classifier:
    """A reference model, with the accuracy of its levels on its calibration examples."""
    module, held = reference_models.load(name), reference_models.examples(name)
    inputs = np.asarray(held.inputs, dtype=np.float32)
    with torch.inference_mode():
        x_BD = torch.from_numpy(inputs)
        accuracy = {k: float((module(x_BD, k).argmax(-1).numpy() == held.labels).mean()) for k in (2, 1)}
    return Classifier(module, inputs, _relative(accuracy), {"kind": "classifier", "name": name})


def of_language(name: str | Path) -> Texts:
    """A language model, whose levels are compared on the passages that come with it, else on random tokens."""
    model = language.load(name)
    folder = language.find(name)
    if (folder / passages.FILE).exists():
        examples = passages.load(folder, "validation").ids
    else:
        examples = np.random.default_rng(0).integers(model.settings.vocabulary, size=(SIZES[-1], TOKENS + 1))
    about = {"kind": "language", "name": Path(name).name, "sha256": model.sha256}
    return Texts(model, examples[:, : model.settings.context], about)


def measure(served: Served, sizes: Sequence[int] = SIZES, repeats: int = REPEATS) -> Service:
    """Median seconds of batches at each level, after a first run. Large batches come first, as small ones are slowed by
    what ran before; a level is not slower than a better one."""
    seconds = np.zeros((len(served.levels), len(sizes)))
    with torch_threads(1):
        served.run(served.examples(sizes[0]), 0)
        for place in reversed(range(len(sizes))):
            rows = served.examples(sizes[place])
            for level in range(len(served.levels)):
                seconds[level, place] = np.median([_seconds(partial(served.run, rows, level)) for _ in range(repeats)])
    return Service(served.levels, tuple(sizes), np.minimum.accumulate(seconds), np.array(served.quality))


def _seconds(run: partial[Any]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def classes(logits_BC: np.ndarray, members_BE: np.ndarray | None) -> list[dict[str, Any]]:
    """Answers: label, probabilities, and the experts that ran, if they are known."""
    odds_BC = np.exp(logits_BC - logits_BC.max(1, keepdims=True))
    odds_BC /= odds_BC.sum(1, keepdims=True)
    experts = [None] * len(odds_BC) if members_BE is None else [each.nonzero()[0].tolist() for each in members_BE]
    labels = odds_BC.argmax(1).tolist()
    return [
        {"label": label, "probabilities": odds, "experts": chosen}
        for label, odds, chosen in zip(labels, odds_BC.tolist(), experts, strict=True)
    ]


def _relative(accuracy: dict[int, float]) -> dict[int, float]:
    best = accuracy[max(accuracy)]
    return {k: value / best for k, value in accuracy.items()}


def manifest_of(served: Served, about: dict[str, Any]) -> dict[str, Any]:
    """A manifest like an exported model's; the version is 0.0.0 and the beginning of the weights' SHA-256."""
    return {
        "version": f"0.0.0+{about.get('sha256', 'unknown')[:12]}", "format": "torch", "source": about,
        "input": {"name": "inputs", "dtype": served.dtype, "shape": ["batch", *served.shape]},
        "levels": dict(zip(served.levels, served.quality, strict=True)), "largest_batch": CAPS[-1],
    }  # fmt: skip
