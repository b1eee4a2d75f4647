"""Does a policy set the learning rate of real torch trainings better than schedules, rules and other optimisers?

The trainings are of models, sizes and data that the policy never saw: Mixtures of Experts, perceptrons, a convolutional
network and a transformer, by AdamW and SGD, on inputs of several scales. All keep the state with the lowest of 45
validation losses, and are compared by its test loss with a cosine from the best of eight rates, which was chosen by
validation on another seed. Four of the trainings were held back: nothing was chosen by them. "Random start" draws
the rate from 1e-5 to 1, which a range test makes no use of. Further setups change the data or the batch in mid-run.
To evaluate your own policy: --set 'policy="RUN_DIR"'.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import nn

from agents.deploy.autorate import AutoRate
from benchmarks.loops import CHANGING, CHECKS, HELD_OUT, LOOPS, Drive, Driver, Loop, run
from benchmarks.results.statistics import mean_interval, seeds_interval
from benchmarks.runner.kept import found_once
from benchmarks.runner.setup import Arguments
from cost.timing import torch_threads
from moe_envs.autorate.signals import KEEP, cosine

SEEDS = (1000, 1001, 1002, 1003, 1004)
TUNING_SEED = 100
GRID = {"adamw": np.geomspace(1e-4, 0.3, 8).tolist(), "sgd": np.geomspace(1e-3, 3.0, 8).tolist()}
DEFAULTS = {"adamw": 1e-3, "sgd": 0.1}
RANDOM = 1e-5, 1.0
HYPER = 0.02  # of the multiplicative rule of Baydin et al. 2018
TUNED = "cosine, tuned"
PEERS = (
    *(TUNED, "cosine, default rate", "constant, default rate", "range test, cosine", "hypergradient, default rate"),
    *("D-Adaptation, cosine", "Prodigy, cosine", "Schedule-Free, defaults"),
    *("rule", "AutoRate", "AutoRate over Schedule-Free"),
)
SEEN = "Excess test loss over the tuned cosine"
STARTED = ("cosine", "constant", "hypergradient", "rule, no range test", "AutoRate")
SETTINGS: dict[str, dict[str, Any]] = (
    {f"{loop}: {peer}": {"loop": loop, "peer": peer} for loop in LOOPS | HELD_OUT for peer in PEERS}
    | {
        f"{loop}, random start: {peer}": {"loop": loop, "peer": peer, "start": "random"}
        for loop in ("MLP, Fashion-MNIST x 0.1, AdamW", "MLP, Fashion-MNIST, SGD") for peer in STARTED
    }
    | {
        f"{loop}: {peer}": {"loop": loop, "peer": peer}
        for loop in CHANGING
        for peer in (TUNED, "range test, cosine", "Schedule-Free, defaults", "rule", "AutoRate")
    }
)  # fmt: skip
QUICK = {
    "seeds": [0, 1],
    "setups": {f"MoE, digits, SGD: {peer}": {"loop": "MoE, digits, SGD", "peer": peer} for peer in (TUNED, "AutoRate")},
    "settings": {"steps": 40, "grid": 2},
}


class AutoRateSetup(Arguments):
    """`steps` replaces the number of a loop, `grid` limits the number of rates searched; `policy` is that of
    `agents.deploy.metaopt.AutoRate`."""

    loop: str
    peer: str
    start: Literal["own", "random"] = "own"
    policy: str = "default"
    steps: int | None = None
    grid: int = 8


Setup = AutoRateSetup


def check(setups: dict[str, AutoRateSetup], splits: list[str]) -> None:
    """Raise `ValueError` if an optimiser is requested but not installed."""
    foreign = ("D-Adaptation", "Prodigy", "Schedule-Free")
    wanted = any(name in setup.peer for setup in setups.values() for name in foreign)
    if wanted and find_spec("pytorch_optimizer") is None:
        raise ValueError("pytorch_optimizer is not installed: pip install 'moe-envs[bench]'")


def measure(setup: AutoRateSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train once; D-Adaptation and Prodigy are of Adam's kind, and trained in AdamW's loops only."""
    loop = (LOOPS | HELD_OUT | CHANGING)[setup.loop]
    loop = loop._replace(steps=setup.steps or loop.steps)
    if loop.optimizer == "sgd" and setup.peer.startswith(("D-Adaptation", "Prodigy")):
        return {}, {}
    with torch_threads(1):
        rate = None
        if setup.start == "random":
            rate = float(np.exp(np.random.default_rng(seed).uniform(*np.log(RANDOM))))
        elif setup.peer == TUNED:
            rate = _tuned(setup, loop, folder)
        found = run(loop, drive_of(setup, loop, rate), seed)
    seconds = {name: found.pop(name) for name in ("seconds", "in_validation", "in_driver")}
    return {"rate": rate, **found}, seconds


def _tuned(setup: AutoRateSetup, loop: Loop, folder: Path) -> float:
    """The rate whose cosine has the lowest validation loss on another seed."""

    def search() -> dict[str, Any]:
        grid = GRID[loop.optimizer][:: -(-len(GRID[loop.optimizer]) // setup.grid)]
        losses = [run(loop, by_cosine(rate), TUNING_SEED)["validation"] for rate in grid]
        return {"rate": grid[int(np.argmin(losses))], "losses": losses}

    name = "".join(letter if letter.isalnum() else "-" for letter in setup.loop)
    return float(found_once(folder / f"tuned-{name}-{loop.steps}-{setup.grid}.json", search)["rate"])


def drive_of(setup: AutoRateSetup, loop: Loop, rate: float | None) -> Drive:
    """What sets the rate, by the name of the peer."""
    peer, default = setup.peer, DEFAULTS[loop.optimizer] if rate is None else rate
    if peer.startswith(("rule", "AutoRate")):
        policy = setup.policy if peer.startswith("AutoRate") else peer.partition(",")[0]
        return by_autorate(policy, "Schedule-Free" in peer, rate if "no range test" in peer else None)
    drives: dict[str, Callable[[], Drive]] = {
        "cosine": lambda: by_cosine(default),
        "constant": lambda: by_shape(default, lambda share: 1.0),
        "range test": by_range_test,
        "hypergradient": lambda: by_hypergradient(default),
        "D-Adaptation": lambda: by_foreign("DAdaptAdam", 1.0),
        "Prodigy": lambda: by_foreign("Prodigy", 1.0),
        "Schedule-Free": lambda: by_schedule_free,
    }
    return drives[peer.partition(",")[0]]()


def optimizer_of(model: nn.Module, loop: Loop, rate: float) -> torch.optim.Optimizer:
    """AdamW without weight decay, or SGD with momentum 0.9."""
    if loop.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)


def by_shape(rate: float, shape: Callable[[float], float]) -> Drive:
    """A schedule: the rate times `shape` of the share of the steps."""

    def drive(model: nn.Module, loop: Loop, validation: Callable[[], float]) -> Driver:
        optimizer = optimizer_of(model, loop, rate)
        return scheduled(optimizer, loop.steps, shape)

    return drive


def scheduled(optimizer: torch.optim.Optimizer, steps: int, shape: Callable[[float], float]) -> Driver:
    """torch's LambdaLR."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shape(step / steps))
    return Driver(optimizer, lambda loss: scheduler.step())


def by_cosine(rate: float) -> Drive:
    """A cosine to 1 %."""
    return by_shape(rate, lambda share: float(cosine(np.array(share))))


def by_range_test() -> Drive:
    """A range test of 60 steps, then a cosine over the steps that are left."""

    def drive(model: nn.Module, loop: Loop, validation: Callable[[], float]) -> Driver:
        optimizer = optimizer_of(model, loop, 1.0)
        kept = AutoRate(optimizer, _Keep(), validation=validation, steps=loop.steps, decisions=CHECKS)
        return Driver(optimizer, kept.step, kept.finish, keeps_best=True)

    return drive


class _Keep:
    """A policy that keeps the rate: with `AutoRate`, a range test and a cosine."""

    def predict(self, observation: np.ndarray, deterministic: bool = True) -> tuple[np.ndarray, None]:
        """Keep."""
        return np.full(len(observation), KEEP), None


def by_autorate(policy: str, free: bool, rate: float | None) -> Drive:
    """`AutoRate`, from a range test, or from this rate without one."""

    def drive(model: nn.Module, loop: Loop, validation: Callable[[], float]) -> Driver:
        optimizer = schedule_free(model, loop, rate or 1.0) if free else optimizer_of(model, loop, rate or 1.0)
        auto = AutoRate(
            optimizer, policy, validation=validation, steps=loop.steps, decisions=CHECKS, range_test=rate is None
        )
        return Driver(optimizer, auto.step, auto.finish, keeps_best=True)

    return drive


def by_foreign(name: str, rate: float) -> Drive:
    """An optimiser of pytorch_optimizer that finds its rate, at its defaults, under a cosine."""

    def drive(model: nn.Module, loop: Loop, validation: Callable[[], float]) -> Driver:
        import pytorch_optimizer

        optimizer = getattr(pytorch_optimizer, name)(model.parameters(), lr=rate)
        return scheduled(optimizer, loop.steps, lambda share: float(cosine(np.array(share))))

    return drive


def schedule_free(model: nn.Module, loop: Loop, rate: float | None = None) -> torch.optim.Optimizer:
    """Schedule-Free AdamW or SGD (Defazio et al. 2024) of pytorch_optimizer, at its defaults unless a rate is given."""
    import pytorch_optimizer

    made = getattr(pytorch_optimizer, "ScheduleFreeAdamW" if loop.optimizer == "adamw" else "ScheduleFreeSGD")
    optimizer: torch.optim.Optimizer = made(model.parameters(), **({} if rate is None else {"lr": rate}))
    optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def by_schedule_free(model: nn.Module, loop: Loop, validation: Callable[[], float]) -> Driver:
    """Schedule-Free at its default rate, 0.0025 for AdamW and 1 for SGD."""
    return Driver(schedule_free(model, loop), lambda loss: None)


def by_hypergradient(rate: float) -> Drive:
    """The rate grows or falls with the cosine between the gradient and the last step (Baydin et al. 2018, the
    multiplicative rule)."""

    def drive(model: nn.Module, loop: Loop, validation: Callable[[], float]) -> Driver:
        optimizer = optimizer_of(model, loop, rate)
        weights = list(model.parameters())
        last = [[each.detach().clone() for each in weights], [torch.zeros_like(each) for each in weights]]

        def after_step(loss: torch.Tensor) -> None:
            gradients = [each.grad for each in weights if each.grad is not None]
            product = sum(float((one * other).sum()) for one, other in zip(gradients, last[1], strict=True))
            norms = [float(nn.utils.get_total_norm(each)) for each in (gradients, last[1])]
            share = product / max(norms[0] * norms[1], 1e-12)
            if np.isfinite(share):
                for group in optimizer.param_groups:
                    group["lr"] *= 1 - HYPER * share
            now = [each.detach().clone() for each in weights]
            last[1] = [new - old for new, old in zip(now, last[0], strict=True)]
            last[0] = now

        return Driver(optimizer, after_step)

    return drive


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """Excess test loss over the tuned cosine, by seed, loop and peer."""
    rows = frame.dropna(subset=["test"]) if "test" in frame else frame.iloc[:0]
    tuned = rows[rows["peer"] == TUNED].groupby("loop")["test"].mean()
    rows = rows.assign(excess=rows["test"] / rows["loop"].map(tuned) - 1)
    own, random = rows[rows["start"] == "own"], rows[rows["start"] == "random"]
    tables: dict[str, Any] = {}
    for title, part in (
        ("Excess test loss over the tuned cosine, trainings held back", own[own["loop"].isin(list(HELD_OUT))]),
        (SEEN, own[own["loop"].isin(list(LOOPS))]),
        ("Changes in mid-run", own[own["loop"].isin(list(CHANGING))]),
    ):
        if len(part):
            tables[title] = _compared(part)
            tables[f"{title}, by loop"] = _by_loop(part)
    if len(random):
        tables["From random rates, 1e-5 .. 1"] = [
            {"peer": peer, "kind": kind_of(str(peer)), "median": float(part["excess"].median()),
             "90 %": float(part["excess"].quantile(0.9)), "worst": float(part["excess"].max()), "runs": len(part)}
            for peer, part in random.groupby("peer", sort=False)
        ]  # fmt: skip
    learned = own[own["peer"] == "AutoRate"]
    if len(learned):
        share = (learned["in_driver"] - learned["in_validation"]) / (learned["seconds"] - learned["in_driver"])
        tables["What AutoRate adds to the CPU time of a training, validation apart"] = [
            {"median": float(share.median()), "worst": float(share.max()), "runs": len(share)}
        ]
    return {"tables": tables}


def kind_of(peer: str) -> str:
    """Learned or baseline."""
    return "learned" if peer.startswith("AutoRate") else "baseline"


def _compared(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Mean and worst excess over the loops that a peer runs in, and AutoRate's minus its on these."""
    means = rows.groupby(["peer", "seed"], sort=False)["excess"].mean()
    table = rows.pivot_table(index=["loop", "seed"], columns="peer", values="excess")
    found = []
    for peer, part in rows.groupby("peer", sort=False):
        name = str(peer)
        row: dict[str, Any] = {
            "peer": name, "kind": kind_of(name), "mean": float(part["excess"].mean()),
            "95 %": seeds_interval(means[peer].to_numpy()),
            "worst loop": float(part.groupby("loop")["excess"].mean().max()),
            "failed": int(part["failed"].astype(bool).sum()), "loops": int(part["loop"].nunique()),
        }  # fmt: skip
        if name != "AutoRate" and "AutoRate" in table:
            pairs = (table["AutoRate"] - table[name]).dropna().unstack("seed").dropna(axis=1)
            row |= {"AutoRate's minus this": float(pairs.to_numpy().mean())}
            row |= {"its 95 %": mean_interval(pairs.to_numpy().T) if pairs.shape[0] > 1 else (float("nan"),) * 2}
        found.append(row)
    return sorted(found, key=lambda row: float(row["mean"]))


def _by_loop(rows: pd.DataFrame) -> list[dict[str, Any]]:
    table = rows.pivot_table(index="loop", columns="peer", values="excess", sort=False)
    return [
        {"loop": loop, **{str(name): float(value) for name, value in row.items()}} for loop, row in table.iterrows()
    ]


def plot(frame: pd.DataFrame, result: dict[str, Any], out: Path) -> list[str]:
    """Excess of each peer in each loop, one point a loop."""
    from matplotlib.figure import Figure

    rows = result["tables"].get(f"{SEEN}, by loop", [])
    if not rows:
        return []
    table = pd.DataFrame(rows).set_index("loop")
    order = table.mean().sort_values().index
    figure = Figure((9, 0.4 * len(order) + 1.5), layout="constrained")
    panel = figure.subplots()
    for place, peer in enumerate(order):
        values = 100 * table[peer].dropna().clip(upper=1)
        panel.plot(values, np.full(len(values), place), "o", color="C1" if kind_of(str(peer)) == "learned" else "C0")
        panel.plot([values.mean()], [place], "|", ms=16, color="black")
    xlabel = "excess test loss over the tuned cosine, at most 100 %"
    panel.set(yticks=range(len(order)), yticklabels=list(order), xlabel=xlabel)
    panel.axvline(0, color="grey", lw=0.8)
    panel.grid(alpha=0.3)
    figure.savefig(out / "autorate.png", dpi=120)
    return ["autorate.png"]
