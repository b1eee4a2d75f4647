"""What do experts on the disk cost? Times of loads and of decoding within a budget of memory, and hit rates.

Loads are of single experts in random order, past the page cache where the file system allows it, and from it, beside
the time in which an expert of that size runs. The model decodes test text token by token, one row, always the same,
with all experts in memory and with a share of them, by several eviction rules. Hit rates are counted in a replay of
routing: the model's on test text, or that in a file of the format route_trace v1 (--set data=FILE). Run it on an
otherwise idle machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from agents.deploy.expertcache import fit_next_layer
from benchmarks.runner.setup import Arguments
from cost.timing import torch_threads
from experts.language import find, load, passages
from experts.layers import MoELayer, SwiGLU
from experts.offload import ExpertFile, OffloadedModel, Probable, replay, traces
from experts.offload.eviction import Random
from experts.offload.store import write

LOADS, DECODE, HITS = "loads", "decode", "hits"
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
POLICIES = ("lru", "sieve", "lrfu", "least-stale")
SEEDS = (0, 1, 2)
SETTINGS: dict[str, dict[str, Any]] = {LOADS: {"what": LOADS}} | {
    f"decode, {share:.0%} in memory": {"what": DECODE, "share": share} for share in (0.25, 0.375, 0.5)
} | {"hit rates": {"what": HITS}}  # fmt: skip
RULES_OF = {"layer": ("random", "lru", "sieve", "arc", "lfu", "lrfu", "belady"),
            "global": ("random", "lru", "sieve", "lfu", "lrfu", "least-stale", "belady")}  # fmt: skip
BYPASS = "belady, bypass"
QUICK = {
    "seeds": [0],
    "setups": {
        LOADS: {"what": LOADS, "sizes": ["100 kB"], "repeats": 5},
        DECODE: {"what": DECODE, "share": 0.5, "texts": 1, "tokens": 8},
        HITS: {"what": HITS, "texts": 1, "tokens": 8},
    },
}


class OffloadSetup(Arguments):
    """`repeats` loads of each of `sizes`; `texts` of `tokens` tokens decoded, a `share` of the experts in memory; hit
    rates for the model's routing of `texts` of each domain, or for that in the file `data`, by `shares` in memory."""

    what: Literal["loads", "decode", "hits"] = "loads"
    sizes: list[Size] = list(SIZES)
    repeats: int = 100
    model: str = "language"
    share: float = 0.375
    texts: int = 12
    tokens: int = 64
    data: str = "language"
    shares: list[float] = [0.1, 0.2, 0.25, 0.375, 0.4, 0.5]


Setup = OffloadSetup


def measure(setup: OffloadSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Times of loads, or of decoding, or hit rates."""
    with torch_threads(1):
        if setup.what == HITS:
            return {"hits": _hits(setup, seed)}, {}
        return _loads(setup, seed, folder) if setup.what == LOADS else _decode(setup, seed)


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """Tables of loads, of decoding, and of hit rates."""
    loads, decode, hits = [], [], list[dict[str, Any]]()
    for setup, rows in frame.groupby("setup", sort=False):
        if rows["what"].iloc[0] == LOADS:
            loads += _load_rows(rows)
        elif rows["what"].iloc[0] == DECODE:
            decode += _decode_rows(str(setup), rows)
        else:
            hits += _hit_rows(rows)
    tables = {"Loads of one expert": loads, "Decoding one row": decode, "Hit rates": hits}
    return {"tables": {name: table for name, table in tables.items() if table}, "notes": [
        "Loads: medians of a seed, means over seeds, in ms; a run is that of an expert of this size in "
        "float32 on one thread, by rows. disk: past the page cache, where the file system allows it.",
        "Decoding: ms a token, times those with all experts in memory, share of the requests found in memory, MB read.",
        "Hit rates: means over seeds, which differ in what random draws. belady knows the future; with bypass it need "
        "not keep what it loads, which is the most that is possible.",
    ]}  # fmt: skip


def _loads(setup: OffloadSetup, seed: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    random, found, bytes_of = np.random.default_rng(seed), dict[str, dict[str, float]](), dict[str, int]()
    for name in setup.sizes:
        layer = MoELayer(*SIZES[name], num_experts=8)
        path = folder / f"{name}.bin"
        write(path, [layer])
        order = random.integers(8, size=setup.repeats).tolist()
        times: dict[str, float] = {}
        for direct in (True, False):
            with ExpertFile(path, direct) as file:
                bytes_of[name] = file.size(0, 0)
                kind = "disk" if file.direct else ("page cache, disk not possible" if direct else "page cache")
                times[kind] = _median([_timed(lambda expert=expert: file.read(0, expert)) for expert in order])  # type: ignore[misc]
        path.unlink()
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
    if setup.data == "language":
        texts = passages.load(find(setup.model), "test")
        chosen = [np.flatnonzero(texts.domain == each)[: setup.texts] for each in np.unique(texts.domain)]
        trace = traces.record(load(setup.model), texts.ids[np.concatenate(chosen), : setup.tokens].tolist())
    else:
        trace = traces.read(setup.data)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for scope, names in RULES_OF.items():
        rules: dict[str, Any] = {name: name for name in names} | {"random": lambda size, events: Random(size, seed)}
        for share in setup.shares:
            rates = {name: replay(trace, rule, share, scope=scope).rate for name, rule in rules.items()}
            rates[BYPASS] = replay(trace, "belady", share, scope=scope, bypass=True).rate
            found.setdefault(scope, {})[f"{share:g}"] = rates
    return found


def _hit_rows(rows: pd.DataFrame) -> list[dict[str, Any]]:
    every = [*dict.fromkeys(name for names in RULES_OF.values() for name in names), BYPASS]
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
    times, losses, counts = dict[str, float](), dict[str, float](), dict[str, dict[str, float]]()
    chances = fit_next_layer(load(setup.model), passages.load(find(setup.model), "rl_train").ids[::15, :-1])
    for name in (ALL, *POLICIES, "lrfu, prefetch last", "lrfu, prefetch probable"):
        model = load(setup.model)
        if name == ALL:
            times[name], losses[name] = decoded(model, ids)
            continue
        own, block = model.settings, model.network.blocks[0]
        each = sum(weight.nbytes for weight in block.moe.experts[0].parameters())  # type: ignore[union-attr, index]
        memory = round(setup.share * own.layers * own.num_experts) * each
        policy, _, ahead = name.partition(", prefetch ")
        prefetch = {"": None, "last": "last", "probable": Probable(chances)}[ahead]
        with OffloadedModel(model, memory, policy, prefetch=prefetch) as offloaded:
            times[name], losses[name] = decoded(model, ids)
            counts[name] = offloaded.statistics()
            del counts[name]["wait_s"], counts[name]["wait_s_per_token"]
    whole = {name: found for name, found in counts.items() if "prefetch" not in name}  # the others depend on timing
    rest = {name: found for name, found in counts.items() if "prefetch" in name}
    return {"losses": losses, "counts": whole}, {"times": times, "prefetched": rest}


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
