"""How well does a policy of MoEMetaOpt-v0 transfer to unseen data, wider models and other optimisers?

Each policy is trained on several data sets, model widths and input scales, except one that is trained on the original
digits only. The settings of the schedules are searched on the evaluated case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from agents.baselines.metaopt import DECAY, SCHEDULES, Round, search, trainings
from benchmarks import torch_training
from benchmarks.results.paired import less_decisions
from benchmarks.runner.kept import policy_of
from benchmarks.runner.setup import Arguments
from cost.timing import torch_threads
from experts import tasks

ENV = "moe_envs:MoEMetaOpt-v0"
FIRST_TEST_SEED, FIRST_JUDGED_SEED = 10**6, 1000
MIXED = {"widths": (8, 12, 16, 24, 32), "scales": (0.25, 4.0)}
TRAINED_ON: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "digits alone": (("digits",), {}),
    "digits, fashion-mnist": (("digits", "fashion-mnist"), MIXED),
    "digits, breast-cancer": (("digits", "breast-cancer"), MIXED),
    "fashion-mnist, breast-cancer": (("fashion-mnist", "breast-cancer"), MIXED),
}
SEARCH = ((24, 1), (6, 4), (3, 8))  # 72 trainings per scheduler with another optimiser
SEEDS = (0, 1, 2)
BOTH = "digits, fashion-mnist"
SETTINGS: dict[str, Any] = {
    "unseen: digits alone": {"trained_on": "digits alone", "task": "fashion-mnist"},
    "unseen: digits, breast-cancer": {"trained_on": "digits, breast-cancer", "task": "fashion-mnist"},
    "unseen: fashion-mnist, breast-cancer": {"trained_on": "fashion-mnist, breast-cancer", "task": "digits"},
    "unseen: breast-cancer": {"trained_on": BOTH, "task": "breast-cancer"},
    "wider: digits": {"trained_on": BOTH, "task": "digits", "width": 64},
    "wider: fashion-mnist": {"trained_on": BOTH, "task": "fashion-mnist", "width": 64},
} | {
    f"{optimizer}: {task}": {"trained_on": BOTH, "task": task, "optimizer": optimizer}
    for optimizer in ("SGD, momentum 0.9", "LAMB") for task in ("digits", "fashion-mnist")
}  # fmt: skip
QUICK = {
    "seeds": [0, 1],
    "setups": {name: SETTINGS[name] for name in ("unseen: digits alone", "SGD, momentum 0.9: digits")},
    "settings": {"timesteps": 1024, "contexts": 4, "rounds": [[2, 2]], "search": [[2, 1]]},
}
Maker = Callable[[float, float], Callable[[Any], torch.optim.Optimizer]]


class TransferSetup(Arguments):
    """`contexts` trainings evaluate each policy; `rounds` define the search of schedule settings in the environment,
    `search` the one in plain torch with another optimiser."""

    trained_on: str
    task: str
    width: int | None = None
    optimizer: str | None = None
    contexts: int = 256
    timesteps: int | None = None
    rounds: list[tuple[int, int]] = [(16, 8), (4, 32), (2, 64)]  # 384 trainings per schedule
    search: list[tuple[int, int]] = list(SEARCH)


Setup = TransferSetup


def check(setups: dict[str, TransferSetup], splits: list[str]) -> None:
    """Raise `ValueError` if LAMB is requested but not installed."""
    if any(setup.optimizer == "LAMB" for setup in setups.values()) and find_spec("pytorch_optimizer") is None:
        raise ValueError("pytorch_optimizer is not installed: pip install 'moe-envs[bench]'")


def optimizers() -> dict[str, Maker]:
    """Constructors of other optimisers from learning rate and weight decay; LAMB is from pytorch_optimizer."""

    def lamb(rate: float, decay: float) -> Callable[[Any], torch.optim.Optimizer]:
        from pytorch_optimizer import Lamb

        return partial(Lamb, lr=rate, weight_decay=decay)

    return {
        "SGD, momentum 0.9": lambda rate, decay: partial(torch.optim.SGD, lr=rate, momentum=0.9, weight_decay=decay),
        "LAMB": lamb,
    }


def measure(setup: TransferSetup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluate a policy and the schedules on an unseen case, from random rates and from searched settings."""
    of, kwargs = TRAINED_ON[setup.trained_on]
    path = folder / f"{setup.trained_on.replace(', ', '+').replace(' ', '-')}-{seed}-{setup.timesteps or 'all'}"
    agent = policy_of(path, ENV, {"task": list(of), **kwargs, **_costs(of)}, seed, setup.timesteps)
    with torch_threads(1):
        frame = _in_environment(setup, agent) if setup.optimizer is None else _in_torch(setup, agent)
    return {"trainings": frame.assign(seed=frame["policy"].eq("PPO") * seed).to_dict("records")}, {}


def _costs(of: Iterable[str]) -> dict[str, str]:
    """Measure costs on this machine for tasks without measured costs."""
    return {} if set(of) <= set(tasks.SHIPPED) else {"costs": "machine"}


def _in_environment(setup: TransferSetup, agent: Any) -> pd.DataFrame:
    kwargs: dict[str, Any] = {"task": setup.task, **_costs([setup.task])}
    kwargs |= {} if setup.width is None else {"widths": (setup.width,)}
    rounds = [Round(*each) for each in setup.rounds]
    found = {name: search(make, False, rounds, **kwargs).settings for name, make in SCHEDULES.items()}
    rate = float(found["constant"].rates.mean())
    starts = {"random rate": {"initial_decay": DECAY}, "tuned rate": {"initial_decay": DECAY, "initial_rate": rate}}
    policies: list[tuple[str, str, Any]] = [("PPO", start, agent) for start in starts]
    for name, make in SCHEDULES.items():
        policies += [(name, "random rate", make(None)), (name, "tuned rate", make(found[name]))]
    seeds = range(FIRST_TEST_SEED, FIRST_TEST_SEED + setup.contexts)
    frames = [
        trainings(policy, seeds, "test", **kwargs, **starts[start]).assign(policy=name, start=start)
        for name, start, policy in policies
    ]
    return pd.concat(frames)[["policy", "start", "episode", "steps", "arrived"]]


def _in_torch(setup: TransferSetup, agent: Any) -> pd.DataFrame:
    """Train in plain torch with another optimiser; the policy starts from the settings of the constant schedule."""
    problem, make = torch_training.small(setup.task), optimizers()[str(setup.optimizer)]
    drives = dict(torch_training.SCHEDULERS)
    found = {name: torch_training.search(problem, make, drive, setup.search) for name, drive in drives.items()}
    drives["PPO"] = torch_training.by_policy(agent)
    rows = []
    for name, drive in drives.items():
        for seed in range(FIRST_JUDGED_SEED, FIRST_JUDGED_SEED + max(2, setup.contexts // 8)):
            starts = {"random rate": (torch_training.drawn_rate(seed), DECAY)}
            starts["tuned rate"] = found.get(name, found["constant"])
            for start, settings in starts.items():
                trained = torch_training.train(problem, make(*settings), drive, seed)
                kept = {key: trained[key] for key in ("steps", "arrived")}
                rows.append(kept | {"policy": name, "episode": seed, "start": start})
    return pd.DataFrame(rows)


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """Compare the policy with the best schedule for each case and start."""
    rows, every = [], {}
    for name, group in frame.groupby("setup", sort=False):
        trained = pd.DataFrame([row for several in group["trainings"] for row in several])
        rules = trained[trained["policy"] != "PPO"].drop_duplicates(["policy", "start", "episode"])
        found = less_decisions(pd.concat([trained[trained["policy"] == "PPO"], rules]))
        every[str(name)] = found
        for start in dict.fromkeys(row["from the"] for row in found):
            of = [row for row in found if row["from the"] == start]
            learned = next(row for row in of if row["policy"] == "PPO")
            best = min((row for row in of if row is not learned), key=lambda row: row["decisions"])
            rows.append({
                "case": name, "from the": start, "PPO": learned["decisions"], "PPO arrives": learned["arrived"],
                "best schedule": best["policy"], "its decisions": best["decisions"], "it arrives": best["arrived"],
                "PPO less it, 95 %": best["PPO less, 95 %"],
            })  # fmt: skip
    return {"tables": {"Decisions until the target; trained elsewhere, judged here": rows} | every}
