"""Which rule should decide in the server of an exported model, by its times on this machine, HTTP included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agents.baselines import serving as rules
from benchmarks.programs.sender import HOST, run_loop, send_all
from benchmarks.programs.service import counted, predictions, service
from experts.data import DataError

SECONDS, WARM_UP = 2.0, 0.5  # of requests by which HTTP is timed
CONNECTIONS = 32
# How times of batches vary in a server whose requests take the same processor: those of the language model were 1.1 to
# 1.8 times what the server had measured at its start; the standard deviation of the logarithm was 0.19 to 0.21.
VARYING: dict[str, Any] = {"jitter": 0.2, "slowdown": (1.0, 1.8)}
DEADLINES, LONGEST = 4, 8.0  # length of an episode in deadlines, and at most in seconds


def tuned_rule_of_server(
    model: str, deadline: float, tries: int | None = None, report: Callable[[float], object] = lambda share: None
) -> dict[str, Any]:
    """The rule that pays best in MoEServing-v0 with this model's times, over Poisson and bursty arrivals at loads from
    0.5 to 1.1, and what it was tuned for."""
    seconds = min(LONGEST, DEADLINES * deadline)
    tuned_for = {"overhead": http_seconds(model), "deadline": deadline, "seconds": seconds, **VARYING}
    return tuned_for | rules.best_rule(tries, report, model=model, costs="machine", **tuned_for)


def http_seconds(model: str) -> float:
    """Seconds that a request of one row takes beside the model, of a server that is asked as fast as it answers."""
    asked = predictions(model)
    with service(model) as server:
        run_loop(send_all(asked, WARM_UP, HOST, server.port, connections=CONNECTIONS))
        before = run_loop(counted(server.port))
        sent = run_loop(send_all(asked, SECONDS, HOST, server.port, connections=CONNECTIONS))
        busy = run_loop(counted(server.port)) - before
    answered = int((sent.status == 200).sum())
    if not answered:
        raise DataError(f"the server of {model} answered {sorted(set(sent.status.tolist()))} instead of 200")
    return float((sent.seconds - busy) / answered)
