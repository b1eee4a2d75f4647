"""What the dashboard shows: runs, cost profiles, the routing of a model, and the metrics of a server."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agents import runs, training
from cost.arguments import one_line
from cost.profile import Profile, parse

POINTS = 200  # of a learning curve
LAST = 0.1  # share of the training whose mean is a run's result
SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
KEPT = 300  # samples of a server
SECONDS = 2.0  # for a server to answer


@dataclass(frozen=True)
class TrainedRun:
    """A run: its group (all but the seed), seed, training curve (timesteps, return), validation curve, and the mean
    return, quality and cost at the end."""

    name: str
    group: str
    seed: int
    curve: pd.DataFrame
    looks: pd.DataFrame
    last: dict[str, float]


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Run folders in these folders, themselves included; raises `ValueError` for a folder without any."""
    found = []
    for folder in folders:
        inside = sorted({path.parent for path in folder.rglob(runs.SETTINGS)})
        if not inside:
            raise ValueError(f"{folder} holds no run of moe-train")
        found += inside
    return found


@lru_cache(maxsize=1024)
def _read(folder: Path, stamp: int) -> TrainedRun:
    config = json.loads((folder / runs.SETTINGS).read_text())
    config = config.get("content", config)
    own = config["env_kwargs"]
    words = [config["env"].split(":")[-1], config["algo"], config["backend"], *(f"{k}={v}" for k, v in own.items())]
    frame = pd.read_csv(folder / runs.EPISODES)
    names = [name for name in ("return", "reward/quality", "reward/cost", "quality", "cost") if name in frame]
    end = frame[frame["timesteps"] >= (1 - LAST) * frame["timesteps"].max()]
    place = (frame["timesteps"] * POINTS // max(1, int(frame["timesteps"].max()) + 1)).astype(int)
    curve = frame.groupby(place)[["timesteps", "return"]].mean()
    kept = training.load_curve(folder) if (folder / training.CURVE).exists() else []
    looks = pd.DataFrame([look._asdict() for look in kept])
    last = {name.removeprefix("reward/"): float(end[name].mean()) for name in names}
    return TrainedRun(folder.name, " ".join(words), int(config["seed"]), curve, looks, last)


def read_runs(folders: Iterable[Path]) -> tuple[list[TrainedRun], list[str]]:
    """Runs that can be read, and a sentence for each that cannot."""
    found, problems = [], []
    for folder in folders:
        try:
            found.append(_read(folder, (folder / runs.EPISODES).stat().st_mtime_ns))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            problems.append(f"{folder}: {one_line(error)}")
    return found, problems


def bands(trained: Iterable[TrainedRun]) -> dict[str, pd.DataFrame]:
    """For each group mean and 95 % interval of the return over its seeds, on a common grid of timesteps."""
    groups: dict[str, list[TrainedRun]] = {}
    for each in trained:
        groups.setdefault(each.group, []).append(each)
    return {name: _band(members) for name, members in groups.items()}


def _band(members: list[TrainedRun]) -> pd.DataFrame:
    end = min(float(each.curve["timesteps"].iloc[-1]) for each in members)
    start = max(float(each.curve["timesteps"].iloc[0]) for each in members)
    grid = np.linspace(min(start, end), end, POINTS)
    values = np.array([np.interp(grid, each.curve["timesteps"], each.curve["return"]) for each in members])
    from scipy.stats import t

    count = len(members)
    half = t.ppf(0.975, count - 1) * values.std(0, ddof=1) / count**0.5 if count > 1 else np.zeros_like(grid)
    return pd.DataFrame({"timesteps": grid, "mean": values.mean(0), "low": values.mean(0) - half,
                         "high": values.mean(0) + half})  # fmt: skip


def profiles() -> dict[str, Path]:
    """Shipped and cached cost profiles by name."""
    from experts import zoo

    shipped = {path: f"{path.parent.name}: {path.stem}" for path in zoo.ASSETS.rglob("*.json")}
    cached = {path: f"this machine: {path.stem}" for path in (zoo.cache_folder() / "profiles").glob("*.json")}
    found = {}
    for path, name in sorted({**shipped, **cached}.items(), key=lambda each: each[1]):
        if "operations" in json.loads(path.read_text()):
            found[name] = path
    return found


def times(path: Path) -> pd.DataFrame:
    """Median seconds of a profile's operations by rows."""
    raw = json.loads(path.read_text())
    sealed = "sha256" in raw  # in a bundle SHA256SUMS has it
    profile = Profile.load(path, any_machine=True) if sealed else parse(raw, str(path))
    rows = [
        {"operation": name, "rows": size, "ms": 1e3 * median}
        for name, operation in profile.operations.items()
        for size, median in zip(operation.sizes, operation.median, strict=True)
    ]
    return pd.DataFrame(rows, columns=["operation", "rows", "ms"])


@lru_cache(maxsize=8)
def routing(model: str) -> dict[str, np.ndarray]:
    """Share of the tokens of each domain that run an expert, `[L, E]` for each domain of the passages that come with a
    language model."""
    import torch

    from experts import language
    from experts.language import passages

    found, held = language.load(model), passages.load(language.find(model), "validation")
    shares = {}
    for number, domain in enumerate(held.domains):
        ids = torch.from_numpy(held.ids[held.domain == number][:16])
        with torch.inference_mode():
            layers = found.network(ids).routing
        k, experts = found.settings.k, found.settings.num_experts
        chosen = [torch.bincount(each.logits.topk(k).indices.flatten(), minlength=experts) for each in layers]
        shares[domain] = (torch.stack(chosen) / ids.numel()).numpy()
    return shares


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    """Values in Prometheus' text format by name and labels."""
    found = {}
    for line in text.splitlines():
        if line and line[0] != "#" and (match := SAMPLE.fullmatch(line)):
            found[match[1], tuple(LABEL.findall(match[2] or ""))] = float(match[3])
    return found


@dataclass
class Watched:
    """A server that is looked at now and then; `history` has what it counted since the look before."""

    url: str
    key: str | None = None
    history: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT))
    before: tuple[float, Samples] | None = None
    problem: str | None = None

    def look(self) -> None:
        """Ask for the metrics once more; `problem` says why there are none."""
        now = time.time()
        if self.before is not None and now - self.before[0] < 0.5:
            return
        try:
            headers = {"X-API-Key": self.key} if self.key else {}
            asked = urllib.request.Request(f"{self.url.rstrip('/')}/metrics", headers=headers)
            with urllib.request.urlopen(asked, timeout=SECONDS) as answer:
                found = samples(answer.read(10_000_000).decode())
        except (OSError, ValueError, HTTPException) as error:
            self.problem = f"{self.url} does not answer: {one_line(error)}"
            return
        self.problem = None
        if self.before is not None:
            self.history.append(_since(self.before, (now, found)))
        self.before = now, found

    @property
    def experts(self) -> dict[str, float]:
        """Rows that ran each expert so far."""
        values = {} if self.before is None else self.before[1]
        return {
            dict(labels)["expert"]: value for (name, labels), value in values.items() if name == "moe_expert_rows_total"
        }


def _since(before: tuple[float, Samples], after: tuple[float, Samples]) -> dict[str, Any]:
    seconds = max(after[0] - before[0], 1e-9)
    grown = {key: value - then if value >= (then := before[1].get(key, 0.0)) else value  # a new server counts from 0
             for key, value in after[1].items()}  # fmt: skip

    def total(name: str, **wanted: str) -> float:
        return sum(value for (found, labels), value in grown.items()
                   if found == name and wanted.items() <= dict(labels).items())  # fmt: skip

    batches = total("moe_batch_rows_count")
    codes = {dict(labels)["code"] for name, labels in grown if name == "moe_requests_total"}
    unread = total("moe_refused_total") / seconds
    levels = {dict(labels)["level"] for name, labels in grown if name == "moe_batch_seconds_count"}
    return {
        "time": after[0],
        "codes": {code: total("moe_requests_total", code=code, path="/predict") / seconds + unread * (code == "429")
                  for code in sorted({*codes, *(["429"] if unread else [])})},
        "p50": _quantile(grown, 0.5), "p95": _quantile(grown, 0.95),
        "queue": after[1].get(("moe_queue_rows", ()), 0.0),
        "rows": total("moe_batch_rows_sum") / batches if batches else None,
        "levels": {level: total("moe_batch_seconds_count", level=level) / seconds for level in sorted(levels)},
        "tokens": total("moe_tokens_written_total") / seconds,
    }  # fmt: skip


def _quantile(grown: Samples, share: float) -> float | None:
    """A quantile of the predictions' latency, in seconds, linear within a bucket."""
    found = sorted(_buckets(grown))
    if not found or not found[-1][1]:
        return None
    wanted, low, below = share * found[-1][1], 0.0, 0.0
    for high, count in found:
        if count >= wanted:
            return low if high == float("inf") else low + (high - low) * (wanted - below) / max(count - below, 1e-9)
        low, below = high, count
    return low


def _buckets(grown: Samples) -> Iterator[tuple[float, float]]:
    for (name, labels), value in grown.items():
        about = dict(labels)
        if name == "moe_request_seconds_bucket" and about["path"] == "/predict":
            yield float(about["le"].replace("+Inf", "inf")), value
