"""Leaderboard of MoEMetaOpt-v0: decisions to the target accuracy, from random rates and from a tuned rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from agents.baselines.metaopt import (
    BY_GROUP,
    DECAY,
    ROUNDS,
    SCHEDULES,
    Heuristic,
    RandomActions,
    Rates,
    Round,
    search,
    trainings,
)
from benchmarks.leaderboards.board import LEARNERS, SEEDS, Leaderboard, Problem
from benchmarks.results.scores import Verdict
from benchmarks.runner.kept import found_once, policy_of

STARTS = "random rate", "tuned rate"
# Separate gate and expert settings: 6,784 trainings of 30 decisions, as many decisions as a PPO training.
GROUP_ROUNDS = (Round(480, 8), Round(60, 32), Round(8, 128))
SEARCHED = {name: (name, False, ROUNDS) for name in SCHEDULES} | {BY_GROUP: ("constant", True, GROUP_ROUNDS)}
FIRST_TEST_SEED = 10**6
BEAM, SEARCHED_CONTEXTS = 2, 16


class MetaOpt(Problem):
    """Two tasks per training, one per start; the score is the negative mean number of decisions."""

    learners = {name: each for name, each in LEARNERS.items() if name != "REINFORCE"}
    looks = 5  # each evaluation takes 256 trainings
    episodes = {"validation": 128, "test": 256}
    settable = False  # starts and searches are the board's own
    bound_is = f"found by a search, {SEARCHED_CONTEXTS} trainings"
    about = (
        "Scores are minus the mean decisions until the target, one more than the 30 allowed where it is not reached, "
        "over {test} held-out trainings. From the tuned rate, which is the searched constant schedule's, schedules "
        "have settings searched on validation. In the place of a bound is what a beam search that sees the future "
        "finds on the first 16 of them, setting out from a policy: more may be possible. Normalised scores compare all "
        "on these 16, which are few, and their intervals do not say how few."
    )

    def watched(self, policy: Any, split: str, episodes: int | None, folder: Path) -> float:
        """Mean validation score over both starts."""
        seeds = range(episodes or self.episodes["validation"])
        return -float(np.mean([
            trainings(policy, seeds, "validation", **self.splits[split], **start)["steps"].mean()
            for start in self._starts(split, episodes, folder).values()
        ]))  # fmt: skip

    def judged(self, policy: Any, split: str, episodes: int | None, folder: Path) -> dict[str, Verdict]:
        """Evaluate from both starts; quality is the share that arrives, cost the mean number of decisions."""
        starts = self._starts(split, episodes, folder)
        return {f"{split}, {name}": self._verdict(policy, split, start, episodes) for name, start in starts.items()}

    def baselines(self, split: str, episodes: int | None, folder: Path) -> dict[str, dict[str, Verdict]]:
        """Schedules from the random rate and with settings tuned on validation, our rules, and random actions.

        The constant schedule is also tuned with separate settings for gate and experts.
        """
        found: dict[str, dict[str, Verdict]] = {}
        for start, arguments in self._starts(split, episodes, folder).items():
            rules: dict[str, Any] = {"random actions": RandomActions(), "rules": Heuristic()}
            if start == STARTS[0]:
                rules |= {name: make(None) for name, make in SCHEDULES.items()}
            else:
                rules |= {
                    name: SCHEDULES[schedule](self._settings(name, split, episodes, folder))
                    for name, (schedule, _, _) in SEARCHED.items()
                }
            for name, rule in rules.items():
                verdict = self._verdict(rule, split, arguments, episodes)
                found.setdefault(name, {})[f"{split}, {start}"] = verdict
        return found

    def bound(self, split: str, episodes: int | None, folder: Path) -> dict[str, Verdict]:
        """Result of a beam search with look-ahead on the first test contexts, started from a policy; of a beam of one
        with `episodes`."""
        from agents.baselines.metaopt_bound import beam_search

        few, width = (None, BEAM) if episodes is None else (1024, 1)
        policy = policy_of(folder / f"guide-{split}-{few}", self.env_id, self.splits[split], SEEDS[0], few)
        contexts = min(episodes or SEARCHED_CONTEXTS, SEARCHED_CONTEXTS)
        seeds, found = range(FIRST_TEST_SEED, FIRST_TEST_SEED + contexts), {}
        for name, start in self._starts(split, episodes, folder).items():
            best = [beam_search(seed, "test", width, policy, **self.splits[split], **start) for seed in seeds]
            steps = float(np.mean([len(actions) + (not arrives) for actions, arrives in best]))
            arrived = float(np.mean([arrives for _, arrives in best]))
            found[f"{split}, {name}"] = Verdict(None, -steps, arrived, steps)
        return found

    def group(self, task: str) -> str:
        """Each task has its own cost-quality plane."""
        return task

    def _verdict(self, policy: Any, split: str, start: dict[str, Any], episodes: int | None) -> Verdict:
        steps = {}
        for on, first in (("validation", 0), ("test", FIRST_TEST_SEED)):
            seeds = range(first, first + (episodes or self.episodes[on]))
            frame = trainings(policy, seeds, on, **self.splits[split], **start)
            steps[on] = frame["steps"]
        first_ones = -float(steps["test"][:SEARCHED_CONTEXTS].mean())
        means = {on: float(each.mean()) for on, each in steps.items()}
        return Verdict(-means["validation"], -means["test"], float(frame["arrived"].mean()), means["test"], first_ones)

    def _starts(self, split: str, episodes: int | None, folder: Path) -> dict[str, dict[str, Any]]:
        rate = float(self._settings("constant", split, episodes, folder).rates.mean())
        return {STARTS[0]: {"initial_decay": DECAY}, STARTS[1]: {"initial_decay": DECAY, "initial_rate": rate}}

    def _settings(self, name: str, split: str, episodes: int | None, folder: Path) -> Rates:
        """Settings of a schedule, searched once for all runs; with `episodes`, a short search on as many contexts."""
        schedule, by_group, rounds = SEARCHED[name]
        path = folder / f"schedule-{split}-{name.replace(', ', '-')}-{episodes or 'all'}.json"

        def settings() -> dict[str, Any]:
            few = rounds if episodes is None else (Round(4, episodes),)
            found = search(SCHEDULES[schedule], by_group, few, **self.splits[split]).settings
            return {"rates": found.rates.tolist(), "ladder": found.ladder.tolist()}

        kept = found_once(path, settings)
        return Rates(np.array(kept["rates"]), np.array(kept["ladder"]))


BOARD = Leaderboard(MetaOpt("MoEMetaOpt-v0"))
BOARD.QUICK["setups"] = {name: each for name, each in BOARD.SETTINGS.items() if name != "SB3 PPO"}
