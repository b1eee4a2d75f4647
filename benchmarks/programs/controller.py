"""Which rule should decide in the server of an exported model, by its times on this machine, HTTP included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agents.baselines import serving as rules
from benchmarks.programs.sender import HOST, run_loop, send_all
from benchmarks.programs.service import predictions, service
from experts.serving.timing import service_of

SECONDS = 2.0  # of requests by which HTTP is timed
CONNECTIONS = 32
EPISODE = 1.0  # seconds


def tuned_controller(
    model: str, deadline: float, tries: int | None = None, report: Callable[[float], object] = lambda share: None
) -> dict[str, Any]:
    """The rule that pays best in MoEServing-v0 with this model's times, over Poisson and bursty arrivals at loads from
    0.5 to 1.1, and what it was tuned for."""
    overhead = http_seconds(model, deadline)
    env_kwargs = {"model": model, "costs": "machine", "overhead": overhead, "deadline": deadline, "seconds": EPISODE}
    return {"deadline": deadline, "http_s": overhead, **rules.best_rule(tries, report, **env_kwargs)}


def http_seconds(model: str, deadline: float) -> float:
    """Seconds that a request of one row takes beside the model, of a server that is asked as fast as it answers."""
    with service(model, "--deadline", str(deadline)) as server:
        sent = run_loop(send_all(predictions(model), SECONDS, HOST, server.port, connections=CONNECTIONS))
    answered = float((sent.status == 200).sum()) / sent.seconds
    of_model = float(service_of(model, "machine").table(CONNECTIONS)[0, -1]) / CONNECTIONS
    return max(0.0, 1 / answered - of_model)
