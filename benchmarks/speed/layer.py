"""How fast is our MoE layer compared with Hugging Face's Mixtral block and with its bare matrix products?

Median milliseconds of alternating runs: CPU time of one thread, or GPU time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import nn

from benchmarks.runner.setup import Arguments
from cost.timing import torch_threads
from experts.layers import MoELayer, _linear, _times

D_MODEL, D_FF, EXPERTS, K = 256, 1024, 8, 2
TOKENS = {1: (30, 10), 32: (12, 5), 512: (12, 1), 4096: (6, 1)}  # inputs -> (rounds, consecutive runs)
SEEDS = (0,)
SETTINGS = {f"{tokens} tokens": {"tokens": tokens} for tokens in TOKENS}
QUICK = {"setups": {"1 tokens": {"tokens": 1}}}
Run = Callable[[], object]


class LayerSpeed(Arguments):
    """Number of tokens and device."""

    tokens: int
    device: Literal["cpu", "cuda"] = "cpu"


Setup = LayerSpeed


def measure(setup: LayerSpeed, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Time the eager Mixtral block, our layer with float32 and bfloat16 weights, and the bare matrix products,
    forward and with backward. Raises `ValueError` without transformers or without the device."""
    if find_spec("transformers") is None:
        raise ValueError("transformers is not installed: pip install 'moe-envs[hf]'")
    if setup.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("no GPU that torch can use: leave out --set device=cuda")
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": D_MODEL, "intermediate_size": D_FF, "num_local_experts": EXPERTS, "num_experts_per_tok": K,
    }  # fmt: skip
    config = MixtralConfig(**sizes)
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config).to(setup.device)  # type: ignore[no-untyped-call]
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.05)
    ours = MoELayer.from_block(block, statistics=True)
    half = MoELayer.from_block(block).to(torch.bfloat16)
    x = torch.randn(setup.tokens, D_MODEL, device=setup.device)
    with torch_threads(1):
        row = _row(block, ours, half, x, TOKENS.get(setup.tokens, (12, 1)), setup.device)
    return {"difference": row.pop("difference")}, {"row": row}


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """Tables of forward times and of forward plus backward times."""
    forward, backward = [], []
    for tokens, row in zip(frame["tokens"].tolist(), frame["row"], strict=True):
        names = {"block": "block, ms", "ours": "ours, ms", "ours_bf16": "ours bf16, ms", "products": "products, ms"}
        forward.append({"tokens": tokens} | {title: row[f"{name}_ms"] for name, title in names.items()} | {
            "block / ours": row["forward_ratio"], "block / ours bf16": row["bf16_ratio"],
            "ours / products": row["over_products"],
        })  # fmt: skip
        names.pop("ours_bf16")
        backward.append({"tokens": tokens} | {title: row[f"{name}_backward_ms"] for name, title in names.items()} | {
            "block / ours": row["backward_ratio"], "ours / products": row["backward_over_products"],
        })  # fmt: skip
    notes = [f"{D_MODEL} wide, {EXPERTS} experts of {D_FF:,}, top-{K}. Outputs differ by at most "
             f"{frame['difference'].max():.1e}."]  # fmt: skip
    return {"tables": {"Forward": forward, "With backward": backward}, "notes": notes}


def _row(
    block: Any, ours: MoELayer, half: MoELayer, x: torch.Tensor, turns: tuple[int, int], device: str
) -> dict[str, Any]:
    rough, counts = x.to(torch.bfloat16), ours(x)[1].members.sum(0).tolist()
    forward: dict[str, Run] = {
        "block": lambda: block(x[None]),
        "ours": lambda: ours(x),
        "ours_bf16": lambda: half(rough),
        "products": _products(ours, counts, device),
    }
    with torch.inference_mode():
        difference = float((block(x[None])[0] - ours(x)[0]).abs().max())
        found = {f"{name}_ms": value for name, value in _by_turns(forward, *turns, device).items()}
    backward: dict[str, Run] = {
        "block": _training(lambda given: block(given[None]), block, x),
        "ours": _training(lambda given: ours(given)[0], ours, x),
        "products": _products(ours, counts, device, backward=True),
    }
    both = _by_turns(backward, *turns, device)
    found |= {f"{name}_backward_ms": value for name, value in both.items()}
    return {
        **found, "difference": difference,
        "forward_ratio": found["block_ms"] / found["ours_ms"], "bf16_ratio": found["block_ms"] / found["ours_bf16_ms"],
        "backward_ratio": both["block"] / both["ours"], "over_products": found["ours_ms"] / found["products_ms"],
        "backward_over_products": both["ours"] / both["products"],
        "products_ratio": found["block_ms"] / found["products_ms"],
        "products_backward_ratio": both["block"] / both["products"],
    }  # fmt: skip


def _training(run: Callable[[torch.Tensor], torch.Tensor], module: nn.Module, x: torch.Tensor) -> Run:
    given = x.clone().requires_grad_()

    def both() -> None:
        module.zero_grad()
        given.grad = None
        run(given).sum().backward()

    return both


def _products(layer: MoELayer, counts: list[int], device: str, backward: bool = False) -> Run:
    """Matrix products of the experts on their assigned rows, without routing."""
    parts = []
    for expert, count in zip(layer.experts, counts, strict=True):
        if count:
            sides = (torch.randn(count, size, device=device) for size in (D_MODEL, D_FF, 2 * D_FF))
            parts.append((expert.w_in.detach(), expert.w_out.detach(), *sides))  # type: ignore[operator]

    def run() -> None:
        for w_in, w_out, narrow, active, hidden in parts:
            _linear(narrow, w_in)
            _linear(active, w_out)
            if backward:
                _times(narrow, w_out)
                narrow.T @ active
                hidden.T @ narrow
                _times(hidden, w_in)

    return run


def _by_turns(runs: dict[str, Run], rounds: int, in_a_row: int, device: str) -> dict[str, float]:
    """Median milliseconds per run, alternating after `in_a_row` runs of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            taken = _milliseconds(run, in_a_row, device)
            if number >= 2:
                times[name].append(taken)
    return {name: statistics.median(each) for name, each in times.items()}


def _milliseconds(run: Run, times: int, device: str) -> float:
    clock, wait = (time.process_time_ns, int) if device == "cpu" else (time.perf_counter_ns, torch.cuda.synchronize)
    wait()
    begun = clock()
    for _ in range(times):
        run()
    wait()
    return (clock() - begun) / 1e6 / times
