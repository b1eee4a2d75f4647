"""What do experts on the disk cost? Times of loads and of decoding within a budget of memory, and hit rates.

Loads are of single experts in random order, past the page cache where the file system allows it, and from it, beside
the time in which an expert of that size runs. The model decodes test text token by token, one row, always the same,
with all experts in memory and with a share of them, by several eviction rules. Hit rates are counted in a replay of
routing: the model's on test text, or that in a file of the format route_trace v1 (--set data=FILE). Growth is that of
the process while it decodes 100,000 tokens. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import psutil
import torch
from pydantic import Field

from agents.deploy.expertcache import fit_next_layer, fit_static
from benchmarks.runner.setup import Arguments
from cost.timing import torch_threads
from experts.language import find, load, passages
from experts.layers import MoELayer, SwiGLU
from experts.offload import ExpertFile, OffloadedModel, Probable, replay, traces
from experts.offload.eviction import Random
from experts.offload.store import write

LOADS, DECODE, HITS, GROWTH = "loads", "decode", "hits", "growth"
Size = Literal["100 kB", "600 kB", "3 MB", "13 MB", "40 MB"]
SIZES: dict[Size, tuple[int, int]] = {
    "100 kB": (96, 88),
    "600 kB": (192, 256),
    "3 MB": (512, 512),
    "13 MB": (1024, 1024),
    "40 MB": (2048, 1664),
}
ROWS = (1, 4, 16, 64)
ALL = "all in memory"
POLICIES = ("lru", "sieve", "lrfu", "least-stale", "lrfu-per-layer")
SEEDS = (0, 1, 2)
SETTINGS: dict[str, dict[str, Any]] = {LOADS: {"what": LOADS}} | {
    f"decode, {share:.0%} in memory": {"what": DECODE, "share": share} for share in (0.25, 0.375, 0.5)
} | {"hit rates": {"what": HITS}, GROWTH: {"what": GROWTH}}  # fmt: skip
PARTS = 10  # of the tokens, after each of which memory is read
RULES_OF = {"layer": ("random", "lru", "sieve", "arc", "lfu", "lrfu", "belady"),
            "global": ("random", "lru", "sieve", "lfu", "lrfu", "least-stale", "belady")}  # fmt: skip
BYPASS, STATIC = "belady, bypass", "static"
QUICK = {
    "seeds": [0],
    "setups": {
        LOADS: {"what": LOADS, "sizes": ["100 kB"], "repeats": 5},
        DECODE: {"what": DECODE, "share": 0.5, "texts": 1, "tokens": 8},
        HITS: {"what": HITS, "texts": 1, "tokens": 8},
        GROWTH: {"what": GROWTH, "total": 40, "tokens": 5},
    },
}


class OffloadSetup(Arguments):
    """`repeats` loads of each of `sizes`; `texts` of `tokens` tokens decoded, a `share` of the experts in memory; hit
    rates for the model's routing of `texts` of each domain, or for that in the file `data`, by `shares` in memory;
    the growth of the process in `total` tokens."""

    what: Literal["loads", "decode", "hits", "growth"] = "loads"
    sizes: list[Size] = list(SIZES)
    repeats: int = 100
    model: str = "language"
    share: float = 0.375
    texts: int = 12
    tokens: int = Field(default=64, ge=2)
    data: str = "language"
    shares: list[float] = [0.1, 0.2, 0.25, 0.375, 0.4, 0.5]
    total: int = Field(default=100_000, ge=PARTS)


Setup = OffloadSetup


def once(setup: OffloadSetup) -> bool:
    """Growth is measured with one seed."""
    return setup.what == GROWTH


def measure(setup: OffloadSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Times of loads, or of decoding, or hit rates, or growth."""
    with torch_threads(1):
        if setup.what == HITS:
            return {"hits": _hits(setup, seed)}, {}
        if setup.what == GROWTH:
            return {}, {"growth": _growth(setup, seed)}
        return _loads(setup, seed, folder) if setup.what == LOADS else _decode(setup, seed)


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """Tables of loads, of decoding, of hit rates, and of growth."""
    loads, decode, hits, growth = [], [], [], list[dict[str, Any]]()
    for setup, rows in frame.groupby("setup", sort=False):
        if rows["what"].iloc[0] == LOADS:
            loads += _load_rows(rows)
        elif rows["what"].iloc[0] == DECODE:
            decode += _decode_rows(str(setup), rows)
        elif rows["what"].iloc[0] == GROWTH:
            growth += [{"seed": row["seed"], **each} for _, row in rows.iterrows() for each in row["growth"]]
        else:
            hits += _hit_rows(rows)
    tables = {"Loads of one expert": loads, "Decoding one row": decode, "Hit rates": hits, "Growth": growth}
    return {"tables": {name: table for name, table in tables.items() if table}, "notes": [
        "Loads: medians of a seed, means over seeds, in ms; a run is that of an expert of this size in "
        "float32 on one thread, by rows. disk: past the page cache, where the file system allows it.",
        "Decoding: ms a token, times those with all experts in memory, share of the requests found in memory or on "
        "their way there, MB read. All take turns, a text each.",
        "Hit rates: means over seeds, which differ in what random draws. static keeps what other texts ask for most; "
        "belady knows the future; with bypass it need not keep what it loads, which is the most that is possible.",
        "Growth: memory of the process, its open files and threads after so many tokens (lrfu, prefetch).",
        *not_from_disk(frame),
    ]}  # fmt: skip


def not_from_disk(frame: pd.DataFrame) -> list[str]:
    """A note where experts were not read from the disk in some run, whose rows say so by `direct`."""
    some = "direct" in frame and frame["direct"].eq(False).any()
    return ["In some runs the disk could not be read past the page cache: experts came from there."] if some else []


def _loads(setup: OffloadSetup, seed: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    random, found, bytes_of = np.random.default_rng(seed), dict[str, dict[str, float]](), dict[str, int]()
    folder.mkdir(parents=True, exist_ok=True)
    for name in setup.sizes:
        layer = MoELayer(*SIZES[name], num_experts=8)
        order = random.integers(8, size=setup.repeats).tolist()
        times: dict[str, float] = {}
        with tempfile.TemporaryDirectory(dir=folder) as own:  # other seeds may run beside
            path = Path(own) / "experts.bin"
            write(path, [layer])
            for direct in (True, False):
                with ExpertFile(path, direct) as file:
                    bytes_of[name] = file.size(0, 0)
                    kind = "disk" if file.direct else ("page cache, disk not possible" if direct else "page cache")
                    times[kind] = _median([_timed(lambda expert=expert: file.read(0, expert)) for expert in order])  # type: ignore[misc]
        expert: Any = layer.experts[0]
        times |= {f"run, {rows} rows": _running(expert, rows, setup.repeats) for rows in ROWS}
        found[name] = times
    return {"bytes": bytes_of}, {"times": found}


def _running(expert: SwiGLU, rows: int, repeats: int) -> float:
    x_ND = torch.randn(rows, expert.w_in.shape[1])

    def run() -> None:
        with torch.inference_mode():
            expert(x_ND)

    run()
    return _median([_timed(run) for _ in range(repeats)])


def _hits(setup: OffloadSetup, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Hit rates by scope, share in memory and rule."""
    own: dict[str, Any] = {"random": lambda size, events: Random(size, seed)}
    if setup.data == "language":
        texts = passages.load(find(setup.model), "test")
        chosen = [np.flatnonzero(texts.domain == each)[: setup.texts] for each in np.unique(texts.domain)]
        trace = traces.record(load(setup.model), texts.ids[np.concatenate(chosen), : setup.tokens].tolist())
        static = fit_static(load(setup.model), _like_them(setup.model))
        own[STATIC] = lambda size, events: static(size)
    else:
        trace = traces.read(setup.data)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for scope, names in RULES_OF.items():
        rules = {**dict(zip(names, names, strict=True)), **own}
        for share in setup.shares:
            rates = {name: replay(trace, rule, share, scope=scope).rate for name, rule in rules.items()}
            rates[BYPASS] = replay(trace, "belady", share, scope=scope, bypass=True).rate
            found.setdefault(scope, {})[f"{share:g}"] = rates
    return found


def _hit_rows(rows: pd.DataFrame) -> list[dict[str, Any]]:
    every = [*dict.fromkeys(name for names in RULES_OF.values() for name in names), STATIC, BYPASS]
    return [
        {"trace": Path(rows["data"].iloc[0]).name, "cache": "of each layer" if scope == "layer" else "of all layers",
         "in memory": float(share)}
        | {name: float(np.mean([each[scope][share][name] for each in rows["hits"]])) if name in rates else None
           for name in every}
        for scope, of_share in rows["hits"].iloc[0].items() for share, rates in of_share.items()
    ]  # fmt: skip


def _decode(setup: OffloadSetup, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    texts = passages.load(find(setup.model), "test").ids
    chosen = np.random.default_rng(seed).permutation(len(texts))[: setup.texts]
    ids = torch.from_numpy(texts[chosen, : setup.tokens])
    chances = fit_next_layer(load(setup.model), _like_them(setup.model))
    probable, models = Probable(chances), {ALL: load(setup.model)}
    ahead = {"": None, "last": "last", "probable": probable}
    times, losses = dict[str, list[float]](), dict[str, list[float]]()
    with ExitStack() as opening:
        pools = dict[str, OffloadedModel]()
        for name in (*POLICIES, "lrfu, prefetch last", "lrfu, prefetch probable"):
            models[name] = model = load(setup.model)
            policy, _, what = name.partition(", prefetch ")
            made = OffloadedModel(model, _share_of(model, setup.share), policy, prefetch=ahead[what])
            pools[name] = opening.enter_context(made)
        for turn, text in enumerate(ids):
            probable.forget()
            for name in np.roll(list(models), -turn).tolist():
                seconds, loss = decoded(models[name], text[None])
                times.setdefault(name, []).append(seconds)
                losses.setdefault(name, []).append(loss)
        counts = {name: pool.statistics() for name, pool in pools.items()}
    for each in counts.values():
        del each["wait_s"], each["wait_s_per_token"]
    whole = {name: found for name, found in counts.items() if "prefetch" not in name}  # the others depend on timing
    rest = {name: found for name, found in counts.items() if "prefetch" in name}
    means = [{name: float(np.mean(found[name])) for name in models} for found in (losses, times)]
    direct = all(pool.direct for pool in pools.values())
    return {"losses": means[0], "counts": whole}, {"times": means[1], "prefetched": rest, "direct": direct}


def _growth(setup: OffloadSetup, seed: int) -> list[dict[str, float]]:
    """Memory, open files and threads of this process, after each part of the tokens."""
    texts = passages.load(find(setup.model), "test").ids[:, : setup.tokens + 1]
    order, model, process = np.random.default_rng(seed).permutation(len(texts)), load(setup.model), psutil.Process()
    found = list[dict[str, float]]()
    with OffloadedModel(model, _share_of(model, setup.share), "lrfu", prefetch="last") as offloaded:
        for number in cycle(order):
            if (tokens := offloaded.statistics()["tokens"]) >= setup.total * (len(found) + 1) / PARTS:
                found.append({"tokens": tokens, "MB": process.memory_info().rss / 1e6,
                              "files": process.num_fds(), "threads": process.num_threads()})  # fmt: skip
            if len(found) == PARTS:
                break
            decoded(model, torch.from_numpy(texts[number, None]))
    return found


def _share_of(model: Any, share: float) -> int:
    """Bytes of this share of the experts."""
    own, block = model.settings, model.network.blocks[0]
    each = sum(weight.nbytes for weight in block.moe.experts[0].parameters())
    return int(round(share * own.layers * own.num_experts) * each)


def _like_them(model: str) -> np.ndarray:
    """Texts of another split, ids `[n, T]`."""
    found: np.ndarray = passages.load(find(model), "rl_train").ids[::15, :-1]
    return found


def decoded(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Mean seconds a token, and mean loss in nats, of a model that reads texts `[n, T]` one after the other, token by
    token."""
    seconds, losses = [], []
    for row in ids:
        cache = model.network.cache(1, size=len(row))
        for place in range(len(row) - 1):
            begun = time.perf_counter()
            with torch.inference_mode():
                logits = model.network(row[None, place : place + 1], None, cache).logits[0, -1]
            seconds.append(time.perf_counter() - begun)
            losses.append(float(torch.nn.functional.cross_entropy(logits, row[place + 1])))
    return float(np.mean(seconds)), float(np.mean(losses))


def _load_rows(rows: pd.DataFrame) -> list[dict[str, Any]]:
    names = rows["times"].iloc[0]
    return [
        {"size": name, "bytes": rows["bytes"].iloc[0][name]}
        | {kind: 1e3 * float(np.mean([times[name][kind] for times in rows["times"]])) for kind in names[name]}
        for name in names
    ]


def _decode_rows(setup: str, rows: pd.DataFrame) -> list[dict[str, Any]]:
    found = []
    for name in rows["times"].iloc[0]:
        own = [(counts | more).get(name, {}) for counts, more in zip(rows["counts"], rows["prefetched"], strict=True)]
        times = [each[name] for each in rows["times"]]
        row: dict[str, Any] = {
            "setup": setup, "policy": name, "ms a token": 1e3 * float(np.mean(times)),
            "times all in memory": float(np.mean([each[name] / each[ALL] for each in rows["times"]])),
            "nats": float(np.mean([each[name] for each in rows["losses"]])),
        }  # fmt: skip
        if own[0]:
            row["in memory"] = float(np.mean([each["hit_rate"] for each in own]))
            row["MB a token"] = float(np.mean([each["bytes_per_token"] for each in own])) / 1e6
        found.append(row)
    return found


def _timed(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _median(times: list[float]) -> float:
    return float(np.median(times))
