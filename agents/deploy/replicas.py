"""Several processes that serve one model, by Ray Serve: each has its own queue and controller."""

from __future__ import annotations

from typing import Any

ONGOING = 4096  # requests that a replica holds; its own limits refuse those too many


def serve_replicas(
    model: str, controller: str | None, limits: dict[str, Any], host: str, port: int, workers: int, *,
    blocking: bool = True,
) -> None:  # fmt: skip
    """Serve a model in `workers` processes on this machine until Ctrl-C; Ray is started if it does not run.

    Rates, queues and metrics are each process's own.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise ImportError("--workers needs Ray Serve: pip install 'moe-envs[ray]'") from error

    def build() -> Any:
        from agents.deploy.serving import controller_of, load
        from experts.serving.app import create_app

        made = None if controller is None else controller_of(controller)
        return create_app(model, made, load, **limits)

    class Replica:
        """One process; the application has all endpoints."""

    made: Any = serve.ingress(build)(Replica)
    deployed: Any = serve.deployment(num_replicas=workers, max_ongoing_requests=ONGOING)(made)
    serve.start(http_options={"host": host, "port": port})
    serve.run(deployed.bind(), name="moe-serve", route_prefix="/", blocking=blocking)
