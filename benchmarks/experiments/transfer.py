"""A policy of MoEMetaOpt-v0 where it was not trained: on unseen data, wider models, under other optimisers.

Each policy is trained on trainings of several data sets, widths and scales of the inputs side by side, one only on the
digits as they are; the schedules' settings are searched where they are judged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from agents.baselines.metaopt import SCHEDULES, Round
from agents.ppo import PPO
from benchmarks import policies, torch_training
from benchmarks.experiments import metaopt
from benchmarks.runner import processes as jobs
from cost.files import write_text
from cost.machine import provenance
from experts import tasks

ROUNDS = (Round(16, 8), Round(4, 32), Round(2, 64))  # 384 trainings for each schedule
MIXED = {"widths": (8, 12, 16, 24, 32), "scales": (0.25, 4.0)}
TRAINED_ON: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "digits alone": (("digits",), {}),
    "digits, fashion-mnist": (("digits", "fashion-mnist"), MIXED),
    "digits, breast-cancer": (("digits", "breast-cancer"), MIXED),
    "fashion-mnist, breast-cancer": (("fashion-mnist", "breast-cancer"), MIXED),
}
# Where each is judged.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("digits alone", "unseen data", {"task": "fashion-mnist"}),
    ("digits, breast-cancer", "unseen data", {"task": "fashion-mnist"}),
    ("fashion-mnist, breast-cancer", "unseen data", {"task": "digits"}),
    ("digits, fashion-mnist", "unseen data", {"task": "breast-cancer"}),
    ("digits, fashion-mnist", "wider model", {"task": "digits", "widths": (64,)}),
    ("digits, fashion-mnist", "wider model", {"task": "fashion-mnist", "widths": (64,)}),
]
SEARCH = ((24, 1), (6, 4), (3, 8))  # 72 trainings for each scheduler under another optimiser
FIRST_JUDGED_SEED = 1000
SMALL = ("digits", "fashion-mnist")  # what other optimisers are judged on
Maker = Callable[[float, float], Callable[[Any], torch.optim.Optimizer]]


def optimizers() -> dict[str, Maker]:
    """Makers of the other optimisers, of a learning rate and a weight decay; LAMB is pytorch_optimizer's."""
    from pytorch_optimizer import Lamb

    return {
        "SGD, momentum 0.9": lambda rate, decay: partial(torch.optim.SGD, lr=rate, momentum=0.9, weight_decay=decay),
        "LAMB": lambda rate, decay: partial(Lamb, lr=rate, weight_decay=decay),
    }


def learn(name: str, seed: int, timesteps: int | None, out: Path) -> policies.Record:
    """Train a policy on a mixture."""
    of, kwargs = TRAINED_ON[name]
    path = out / "policies" / f"{name.replace(', ', '+').replace(' ', '-')}-{seed}"
    return policies.learn({"task": list(of), **kwargs, **_costs(of)}, seed, timesteps, path)


def _costs(of: Iterable[str]) -> dict[str, str]:
    """Tasks that come without measured costs have this machine's."""
    return {} if set(of) <= set(tasks.SHIPPED) else {"costs": "machine"}


def judge(case: int, paths: Sequence[Path], contexts: int) -> pd.DataFrame:
    """The policies of a case and the schedules on its test contexts, from random rates and from searched settings."""
    torch.set_num_threads(1)
    name, kind, kwargs = CASES[case]
    kwargs = kwargs | _costs([kwargs["task"]])
    found = {each: metaopt.tune(each, False, ROUNDS, kwargs).settings for each in SCHEDULES}
    rate = float(found["constant"].rates.mean())
    starts: dict[str, dict[str, Any]] = {
        "random rate": {"initial_decay": metaopt.DECAY},
        "tuned rate": {"initial_decay": metaopt.DECAY, "initial_rate": rate},
    }
    frames = []
    for seed, path in enumerate(paths):
        agent = PPO.load(path)
        frames += [f.assign(policy="PPO", seed=seed) for f in metaopt.judge(agent, contexts, starts, **kwargs)]
    first = {"random rate": starts["random rate"]}
    for each, make in SCHEDULES.items():
        frames += [f.assign(policy=each, seed=0) for f in metaopt.judge(make(None), contexts, first, **kwargs)]
        searched = metaopt.judge(make(found[each]), contexts, {"tuned rate": starts["tuned rate"]}, **kwargs)
        frames += [f.assign(policy=each, seed=0) for f in searched]
    width = f", {kwargs['widths'][0]} units" if "widths" in kwargs else ""
    return pd.concat(frames).assign(trained_on=name, kind=kind, judged_on=kwargs["task"] + width)


def judge_optimizer(optimizer: str, task: str, paths: Sequence[Path], seeds: Sequence[int]) -> pd.DataFrame:
    """Trainings in plain torch under another optimiser by the policies and by torch's schedulers, from random rates and
    from rates and decays that were searched, each scheduler's its own, the policies' the constant's."""
    torch.set_num_threads(1)
    problem, make = torch_training.small(task), optimizers()[optimizer]
    drives = {name: [drive] for name, drive in torch_training.SCHEDULERS.items()}
    found = {name: torch_training.search(problem, make, drive, SEARCH) for name, (drive,) in drives.items()}
    drives["PPO"] = [torch_training.by_policy(PPO.load(path)) for path in paths]
    rows = []
    for name, each in drives.items():
        for number, drive in enumerate(each):
            for seed in seeds:
                starts = {"random rate": (torch_training.drawn_rate(seed), metaopt.DECAY)}
                starts["tuned rate"] = found.get(name, found["constant"])
                for start, settings in starts.items():
                    trained = torch_training.train(problem, make(*settings), drive, seed)
                    kept = {key: trained[key] for key in ("steps", "arrived", "seconds")}
                    rows.append(kept | {"policy": name, "seed": number, "episode": seed, "start": start})
    return pd.DataFrame(rows).assign(kind=optimizer, judged_on=task, trained_on="digits, fashion-mnist")


def run(
    seeds: int, contexts: int, timesteps: int | None, processes: int, out: Path,
    add_task: Callable[[str], Callable[[float], object]],
) -> dict[str, Any]:  # fmt: skip
    """Train, judge; writes results.json, trainings.csv and the policies."""
    with jobs.pool(processes) as pool:
        names = [(name, seed) for name in TRAINED_ON for seed in range(seeds)]
        report = add_task(f"{len(names)} trainings of PPO")
        paths = dict(
            zip(names, jobs.gather([pool.submit(learn, *each, timesteps, out) for each in names], report), strict=True)
        )
        of = {name: [Path(paths[name, seed]["path"]) for seed in range(seeds)] for name in TRAINED_ON}
        futures = [pool.submit(judge, place, of[case[0]], contexts) for place, case in enumerate(CASES)]
        both, judged = of["digits, fashion-mnist"], range(FIRST_JUDGED_SEED, FIRST_JUDGED_SEED + contexts // 8)
        futures += [
            pool.submit(judge_optimizer, optimizer, task, both, judged) for optimizer in optimizers() for task in SMALL
        ]
        frame = pd.concat(jobs.gather(futures, add_task("judging them")), ignore_index=True)
    rows = []
    for (kind, judged_on, trained_on), group in frame.groupby(["kind", "judged_on", "trained_on"], sort=False):
        names_of = {"kind": kind, "judged_on": judged_on, "trained_on": trained_on}
        rows += [names_of | row for row in metaopt.summarise(group)]
    result = {
        "rows": rows,
        "policies": list(paths.values()),
        **provenance(),
    }
    frame.to_csv(out / "trainings.csv", index=False)
    write_text(out / "results.json", json.dumps(result, indent=1))
    return result
