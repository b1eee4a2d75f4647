"""Live costs: the experts that a batch is routed to are run and timed, step by step."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

import numpy as np

from cost.operations import routed
from cost.timing import torch_threads
from experts.bundle import Bundle
from moe_envs.routing.tables import RoutingTables

WARM_UP = 3


class LiveExperts:
    """Times a bundle's experts as a routed layer runs them, on one thread, for each batch of inputs.

    The inputs are the bundle's examples, as many as an expert has inputs in the batch so far: an expert's time depends
    on their number only. Its time in a batch is that of its last run: a step is charged what that run took more, or
    less, than the expert's run before. Memory and energy stay those of the profile.
    """

    def __init__(self, bundle: Bundle, tables: RoutingTables) -> None:
        import torch

        model = bundle.model()
        with torch.inference_mode():
            self._hidden = model.trunk(torch.from_numpy(bundle.examples))
        self._experts, self._relative, self._reference = list(model.experts), tables.relative, tables.reference
        self._runs: dict[tuple[int, int], Callable[[], object]] = {}

    def charge(self, terms: np.ndarray, codes: np.ndarray, loads: np.ndarray, seconds: np.ndarray) -> None:
        """Run the experts of `codes [n]` and put their times into `terms [n, 8]`.

        `loads` and `seconds` `[n, E]`, how many inputs an expert has in a row's batch and what it took last, move on.
        """
        import torch

        rows, experts = np.nonzero(codes[:, None] >> np.arange(loads.shape[1]) & 1)
        loads[rows, experts] += 1
        before = seconds.sum(1)
        with torch_threads(1), torch.inference_mode():
            for row, expert in zip(rows.tolist(), experts.tolist(), strict=True):
                seconds[row, expert] = self._seconds(expert, int(loads[row, expert]))
        terms[:, 1] = seconds.sum(1) - before
        terms[:, 0] = self._relative(terms[:, 1], terms[:, 2], terms[:, 3])
        terms[:, 5] = -terms[:, 1] / self._reference.time

    def _seconds(self, expert: int, load: int) -> float:
        run = self._runs.get((expert, load))
        if run is None:
            run = self._runs[expert, load] = routed(self._experts[expert], self._hidden, load)
            for _ in range(WARM_UP):
                run()
        start = perf_counter_ns()
        run()
        return (perf_counter_ns() - start) * 1e-9

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_runs": {}}  # made anew when they are needed
