"""Training of a language model: resumes bit for bit, validates by domain, survives being killed.

A run is a folder with `run.json` (settings and the hash of the corpus), the tokenizer, a checkpoint, `curve.csv` and,
at the end, `model/`. What a step trains on depends on the seed and on the step alone.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated
from safetensors.torch import save as to_bytes

from cost.arguments import one_line
from cost.files import (
    alone,
    load_json,
    read_arrays,
    read_verified,
    save_json,
    sealed,
    sha256_of,
    write_bytes,
    write_text,
)
from cost.machine import fingerprint, source_commit
from cost.meters import require_device
from cost.monitor import Monitor
from cost.timing import torch_threads
from experts.data import DataError
from experts.language import corpus as corpora
from experts.language import tokens
from experts.language.model import TOKENIZER, LanguageModel
from experts.language.transformer import ModelSettings, Output, Transformer
from experts.losses import load_balancing_loss, z_loss

if TYPE_CHECKING:
    from tokenizers import Tokenizer

RUN, CHECKPOINT, CURVE, MODEL = "run.json", "checkpoint.safetensors", "curve.csv", "model"
NOT_HIDDEN = ("embedding.weight", "gate.weight")  # matrices that AdamW trains in any case
VALIDATED = 8  # windows of the context that each domain is validated on
Report = Callable[[float, str], object]


@validated(frozen=True, kw_only=True)
class PretrainingSettings:
    """How a language model is trained: a linear warm-up and a linear decay of the rate to 0 over `steps`.

    `optimizer="muon"` is Muon (Jordan et al. 2024) for the matrices of attention and experts and AdamW for the rest.
    A step sees `batch_size` windows of the context in equal `parts`, whose gradients are added: up to `threads` of them
    are computed at once, which does not change the result, the others one after the other (gradient accumulation). In
    `random_share` of the windows every token runs a number of experts in each layer that is drawn from 0 to k for the
    window, so that the model can run with fewer. `precision="auto"` takes bfloat16 where the processor multiplies it
    faster.
    """

    steps: Annotated[int, Ge(1)] = 3000
    batch_size: Annotated[int, Ge(1)] = 8
    parts: Annotated[int, Ge(1)] = 2
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: Annotated[float, Gt(0)] = 4e-3
    warmup: Annotated[float, Interval(ge=0, le=1)] = 0.03
    weight_decay: Annotated[float, Ge(0)] = 0.1
    beta2: Annotated[float, Interval(gt=0, lt=1)] = 0.95
    clip: Annotated[float, Gt(0)] = 1.0
    load_balancing: Annotated[float, Ge(0)] = 0.01
    z_loss: Annotated[float, Ge(0)] = 1e-3
    random_share: Annotated[float, Interval(ge=0, le=1)] = 1 / 3
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "cpu"
    threads: Annotated[int, Ge(1)] = 2
    seed: Annotated[int, Ge(0)] = 0

    def __post_init__(self) -> None:
        if self.batch_size % self.parts:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of parts={self.parts}")


def train(
    data: Path | str, folder: Path | str, model: ModelSettings | None = None,
    settings: PretrainingSettings | None = None, *, limit: int | None = None, tokenizer: Tokenizer | None = None,
    save_every: int = 50, validate_every: int = 250, report: Report = lambda share, line: None,
) -> LanguageModel:  # fmt: skip
    """Train a model on the corpus in the folder `data` and write the run into `folder`.

    A tokenizer is trained unless one is given. `report` gets the share that is done and the last losses. Raises
    `DataError` for text that is no corpus and `ValueError` for a folder that holds a run.
    """
    target, size, own = Path(folder), model or ModelSettings(), settings or PretrainingSettings()
    require_device(own.device)
    text = corpora.read(data, limit)
    made = tokenizer or tokens.train(text, size.vocabulary)
    about = {
        "data": str(Path(data).resolve()), "limit": limit, "corpus": text.sha256, "sources": text.about,
        "domains": list(text.domains), "model": asdict(size), "settings": asdict(own), "save_every": save_every,
        "validate_every": validate_every, "commit": source_commit(), "machine": fingerprint(),
        "tokenizer": sha256_of(made.to_str().encode()),
    }  # fmt: skip
    with alone(target, ValueError):
        if (target / RUN).exists():
            raise ValueError(f"{target} holds a run: resume it, or choose another folder")
        begun = _Pretraining(target, about, text, made, report)
        write_text(target / TOKENIZER, made.to_str())
        save_json(target / RUN, about)
        return begun.run()


def resume(folder: Path | str, report: Report = lambda share, line: None) -> LanguageModel:
    """Go on with an interrupted run; the result has the bits of one that was not interrupted.

    Raises `DataError` where a file is damaged or the corpus is another one.
    """
    target = Path(folder)
    about = load_json(target / RUN, DataError, "begin a new run")
    with alone(target, ValueError):
        try:
            data, limit, wanted = Path(about["data"]), about["limit"], about["tokenizer"]
            raw = read_verified(target / TOKENIZER, wanted, DataError, "begin a new run")
            text = corpora.read(data, limit)
            if text.sha256 != about["corpus"]:
                raise DataError(f"{data} has changed since the run began: put the corpus back, or begin a new run")
            begun = _Pretraining(target, about, text, tokens.load(raw.decode()), report)
        except (KeyError, TypeError, ValidationError) as error:
            raise DataError(f"{target / RUN} is not that of a training: {one_line(error)}") from error
        return begun.run()


class _Pretraining:
    """One run, from its last checkpoint to its end."""

    def __init__(
        self, folder: Path, about: dict[str, Any], text: corpora.Corpus, tokenizer: Tokenizer, report: Report
    ) -> None:
        self.folder, self.about, self.tokenizer, self.report = folder, about, tokenizer, report
        self.settings: PretrainingSettings = TypeAdapter(PretrainingSettings).validate_python(about["settings"])
        self.size: ModelSettings = TypeAdapter(ModelSettings).validate_python(about["model"])
        self.save_every, self.validate_every = int(about["save_every"]), int(about["validate_every"])
        self.device = torch.device(self.settings.device)
        if taken := sorted({"step", "seconds", "train", "validation", "validation k=1"} & set(text.domains)):
            raise DataError(f"{taken[0]!r} is a column of {CURVE}: give this domain's folder another name")
        every = [tokens.encoded(tokenizer, text.documents["train"][domain]) for domain in text.domains]
        self.windows = Windows(np.concatenate(every), self.size.context, self.settings.seed)
        self.validation = {
            domain: _rows(tokens.encoded(tokenizer, text.documents["validation"][domain]), self.size.context)
            for domain in text.domains
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            self.network = Transformer(self.size).to(self.device)
        self.optimizers = _optimizers(self.network, self.settings)
        self.replicas = _replicas(self.network, self.settings.parts)
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict[str, float]] = []
        self._restore()

    def run(self) -> LanguageModel:
        settings, began = self.settings, time.perf_counter() - self.seconds
        # a resumed run's monitor begins anew, in a folder of its own
        logs = self.folder / (f"monitor-{self.step}" if self.step else "monitor")
        monitored = Monitor(self.network, self.optimizers[-1], every=20, path=logs, overwrite=True)
        workers = ThreadPoolExecutor(settings.threads)
        with torch_threads(1), workers as self.pool, monitored as monitor:
            while self.step < settings.steps:
                loss = self._learn(monitor)
                self.step += 1
                self.seconds = time.perf_counter() - began
                if self.step % self.validate_every == 0 or self.step == settings.steps:
                    self._validate(loss)
                    monitor.end_epoch(validation_loss=self.curve[-1]["validation"])
                if self.step % self.save_every == 0 or self.step == settings.steps:
                    self._save()
                self.report(self.step / settings.steps, f"loss {loss:.3f}")
        metadata = {key: self.about[key] for key in ("corpus", "sources", "domains", "commit", "machine")}
        metadata |= {"training": self.about["settings"], "seconds": round(self.seconds), "curve": self.curve}
        found = LanguageModel(self.network.cpu().eval().requires_grad_(False), self.tokenizer, metadata)
        found.save(self.folder / MODEL)
        return found

    def _learn(self, monitor: Monitor) -> float:
        """One step; returns its loss."""
        settings = self.settings
        for group in (group for each in self.optimizers for group in each.param_groups):
            group["lr"] = settings.learning_rate * rate_at(self.step, settings)
        loss = sum(self.pool.map(self._part, range(settings.parts)))
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} in step {self.step}: lower learning_rate={settings.learning_rate}")
        for whole, *others in zip(*(each.parameters() for each in self.replicas), strict=True):
            for part in others:
                if part.grad is not None:
                    whole.grad = part.grad if whole.grad is None else whole.grad.add_(part.grad)
                    part.grad = None
        monitor.record(loss=loss)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip)
        for _ in self.pool.map(lambda optimizer: optimizer.step(), self.optimizers):
            pass
        self.network.zero_grad()
        return loss

    def _part(self, part: int) -> float:
        """Add the gradients of a part of this step's windows to those of its replica; returns its share of the loss."""
        parts = self.settings.parts
        number = self.step * parts + part
        ids_BT = self.windows.batch(number, self.settings.batch_size // parts).to(self.device)
        with self._autocast():
            found = self.replicas[part](ids_BT[:, :-1], self._experts(number, ids_BT[:, :-1]))
            loss = F.cross_entropy(found.logits.float().flatten(0, 1), ids_BT[:, 1:].flatten()) / parts
            whole = loss + self._losses_of_routing(found) / parts
        whole.backward()
        return float(loss.detach())

    def _losses_of_routing(self, found: Output) -> torch.Tensor:
        own, loss = self.settings, torch.zeros((), device=self.device)
        for routing in found.routing:
            logits = routing.logits.float()
            extra = own.load_balancing * load_balancing_loss(logits, routing.members) + own.z_loss * z_loss(logits)
            loss = loss + extra / len(found.routing)
        return loss

    def _experts(self, number: int, ids_BT: torch.Tensor) -> torch.Tensor | None:
        """Experts of each token and layer `[B, T, L]`, or None if all run k."""
        if not self.settings.random_share:
            return None
        generator = torch.Generator().manual_seed((self.settings.seed << 32) + 2 * number + 1)
        drawn_BL = torch.randint(self.size.k + 1, (len(ids_BT), self.size.layers), generator=generator)
        whole_B1 = torch.rand((len(ids_BT), 1), generator=generator) >= self.settings.random_share
        k_BL = torch.where(whole_B1, self.size.k, drawn_BL)
        return k_BL[:, None].expand(-1, ids_BT.shape[1], -1).to(self.device)

    def _autocast(self) -> Any:
        kind = self.settings.precision
        if kind == "float32" or (kind == "auto" and not _multiplies_bfloat16(self.device)):
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @torch.no_grad()
    def _validate(self, loss: float) -> None:
        """Add a row to the curve: nats a token in each domain, and their mean, with all experts and with one."""
        self.network.eval()
        row = {"step": self.step, "seconds": round(self.seconds, 1), "train": loss}
        with self._autocast():
            by_domain = {name: self._loss(rows, None) for name, rows in self.validation.items()}
            row["validation"] = sum(by_domain.values()) / len(by_domain)
            row["validation k=1"] = sum(self._loss(rows, 1) for rows in self.validation.values()) / len(by_domain)
        self.curve.append(row | by_domain)
        self.network.train()

    def _loss(self, rows_BT: torch.Tensor, k: int | None) -> float:
        ids_BT = rows_BT.to(self.device)
        logits = self.network(ids_BT[:, :-1], k).logits.float()
        return float(F.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten()))

    def _save(self) -> None:
        arrays = {f"model/{name}": value for name, value in self.network.state_dict().items()}
        for place, optimizer in enumerate(self.optimizers):
            for number, state in optimizer.state_dict()["state"].items():
                arrays |= {f"{place}/{number}/{name}": torch.as_tensor(value) for name, value in state.items()}
        arrays = {name: value.detach().cpu().contiguous() for name, value in arrays.items()}
        said = json.dumps({"run": self._digest(), "step": self.step, "seconds": self.seconds, "curve": self.curve})
        write_bytes(self.folder / CHECKPOINT, to_bytes(arrays, sealed(arrays, said)))
        if self.curve:
            write_text(self.folder / CURVE, pd.DataFrame(self.curve).to_csv(index=False, float_format="%g"))

    def _digest(self) -> str:
        """SHA-256 of what the run was begun with."""
        return sha256_of(json.dumps(self.about, sort_keys=True).encode())

    def _restore(self) -> None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            return
        metadata, arrays = read_arrays(path, DataError, "begin a new run")
        try:
            said = json.loads(metadata["settings"])
            if said["run"] != self._digest():
                raise ValueError(f"it was made with another {RUN}")
            self.step, self.seconds, self.curve = said["step"], said["seconds"], said["curve"]
            values = {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}
            weights = {name[6:]: value for name, value in values.items() if name.startswith("model/")}
            self.network.load_state_dict(weights)
            for place, optimizer in enumerate(self.optimizers):
                state: dict[int, dict[str, torch.Tensor]] = {}
                for name, value in values.items():
                    if name.startswith(f"{place}/"):
                        state.setdefault(int(name.split("/")[1]), {})[name.split("/")[2]] = value
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": state, "param_groups": groups})
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise DataError(f"{path} does not fit the run: {one_line(error)}") from error


@dataclass(frozen=True)
class Windows:
    """Windows of `context + 1` tokens of a long text, each once an epoch, at another offset and in another order in
    each epoch."""

    text: np.ndarray
    context: int
    seed: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise DataError(f"{len(self.text)} tokens to train on: at least {2 * self.context + 1} are needed")

    @property
    def count(self) -> int:
        """Windows of an epoch."""
        return (len(self.text) - 1) // self.context - 1

    def batch(self, number: int, size: int) -> torch.Tensor:
        """Batch `number` of `size` windows, int64 `[B, context + 1]`."""
        places = range(number * size, (number + 1) * size)
        epochs = {epoch: self._epoch(epoch) for epoch in {place // self.count for place in places}}
        found = []
        for place in places:
            epoch, inside = divmod(place, self.count)
            offset, order = epochs[epoch]
            start = offset + int(order[inside]) * self.context
            found.append(self.text[start : start + self.context + 1])
        return torch.from_numpy(np.stack(found).astype(np.int64))

    def _epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        random = np.random.default_rng([self.seed, epoch])
        return int(random.integers(self.context)), random.permutation(self.count)


def rate_at(step: int, settings: PretrainingSettings) -> float:
    """Share of the learning rate in a step: a linear warm-up, then a linear decay to 0."""
    warmup = max(1.0, settings.warmup * settings.steps)
    return min(1.0, (step + 1) / warmup) * (1 - step / settings.steps)


def _optimizers(network: Transformer, settings: PretrainingSettings) -> list[torch.optim.Optimizer]:
    """Muon for matrices if it is asked for, AdamW for the others; norms are not decayed."""
    named, muon = list(network.named_parameters()), settings.optimizer == "muon"
    hidden = [each for name, each in named if muon and each.ndim == 2 and not name.endswith(NOT_HIDDEN)]
    known = set(map(id, hidden))
    rest = [each for _, each in named if id(each) not in known]
    groups = [
        {"params": [each for each in rest if each.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [each for each in rest if each.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.beta2), fused=True)
    if not muon:
        return [adam]
    own: dict[str, Any] = {"weight_decay": settings.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return [*(torch.optim.Muon(hidden[part::2], **own) for part in range(2)), adam]  # two, for two threads


def _replicas(network: Transformer, count: int) -> list[Transformer]:
    """The network and others with the same weights in memory, each with gradients of its own."""
    found = [network, *(copy.deepcopy(network) for _ in range(count - 1))]
    for replica in found[1:]:
        for own, shared in zip(replica.parameters(), network.parameters(), strict=True):
            own.data = shared.data
    return found


def _rows(ids: np.ndarray, context: int) -> torch.Tensor:
    """The first windows of a text, int64 `[B, context + 1]`; a shorter text is one window."""
    size = min(len(ids), context + 1)
    count = max(1, min(VALIDATED, len(ids) // size))
    return torch.from_numpy(ids[: count * size].astype(np.int64)).view(count, size)


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def all_threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
