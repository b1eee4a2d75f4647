"""The command `moe-serve`: a model as a web service."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.cli.terminal import _version, errors, pairs
from experts.serving.control import DEADLINE, RequestClass

app = typer.Typer(pretty_exceptions_enable=False)
KEYS = "MOE_SERVE_KEYS"


@app.command()
def _serve(
    model: Annotated[
        str,
        typer.Argument(
            help="Bundle, reference model, language model, folder of moe-export (ONNX), or run folder of MoERouting-v0."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any that is free.")] = 8000,
    controller: Annotated[
        str | None,
        typer.Option(
            help="What decides when a batch is sent, how large, at which level: plan, slackfit, thresholds, by-class, "
            "fixed, "
            "regression or adaptive, with parameters as fixed:cap=16,timeout=0.005, or policy:RUN_DIR of "
            "MoEServing-v0. Default: the rule that moe-export --measured tuned for this deadline on this machine, else "
            "slackfit."
        ),
    ] = None,
    request_class: Annotated[
        list[str] | None,
        typer.Option(
            "--class", help='Class of requests as "name:deadline=0.1,value=1,size=1,care=1"; can be repeated.'
        ),
    ] = None,
    deadline: Annotated[
        float, typer.Option(help="Seconds until an answer is worth nothing, without --class.")
    ] = DEADLINE,
    queue: Annotated[int, typer.Option(min=1, help="Rows that may wait; more are answered 429.")] = 1024,
    rate: Annotated[float, typer.Option(min=0, help="Requests a second of a client; 0 for any number.")] = 0.0,
    burst: Annotated[
        float | None, typer.Option(min=1, help="Requests of a client at once (default: the rate).")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help=f"File of API keys, one a line (or the variable {KEYS}, by commas).")
    ] = None,
    body_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a body; larger ones are answered 413.")] = 4_000_000,
    connections: Annotated[int, typer.Option(min=1, help="Connections at once; more are answered 503.")] = 2000,
    workers: Annotated[int, typer.Option(min=1, help="Processes, by Ray Serve (extra ray) if more than one.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="No line for each request.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Serve a model: POST /predict, /generate, /v1/completions, /reload; GET /health, /metrics, /model, /docs.

    Example: moe-serve fashion-mnist --port 8000 --controller fixed:cap=32,timeout=0.002
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"moe-serve needs {error.name}: pip install 'moe-envs[serve]'") from error
    named = [_class_of(each) for each in request_class or ()] or [RequestClass(deadline=deadline)]
    limits: dict[str, Any] = {
        "classes": tuple(named), "queue_size": queue, "rate": rate, "burst": burst, "body_bytes": body_bytes,
        "keys": _keys(keys),
    }  # fmt: skip
    _log(quiet)
    if workers > 1:
        from agents.deploy.replicas import serve_replicas

        serve_replicas(model, controller, limits, host, port, workers)
        return
    from agents.deploy.serving import controller_of, load
    from experts.serving.app import create_app
    from experts.serving.http import run

    made = None if controller is None else controller_of(controller)
    service = create_app(model, made, load, **limits)
    server = service.state.server
    levels = ", ".join(
        f"{name} ({share:.1%})" for name, share in zip(server.served.levels, server.served.quality, strict=True)
    )
    errors.print(f"{model} {server.version}: levels {levels}; {controller or server.rule} decides", soft_wrap=True)
    run(service, host, port, connections)


def _class_of(text: str) -> RequestClass:
    """The request class of "name:deadline=0.1,value=2"; raises `ValueError` where a part is not known."""
    name, _, rest = text.partition(":")
    given = pairs([part for part in rest.split(",") if part], "--class")
    known = set(RequestClass.__dataclass_fields__) - {"name"}
    if not name or not set(given) <= known:
        raise ValueError(f"--class {text!r}: write name:{'=,'.join(sorted(known))}=")
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in given.values()):
        raise ValueError(f"--class {text!r}: values must be numbers")
    return RequestClass(name, **given)


def _keys(path: Path | None) -> tuple[str, ...]:
    lines = path.read_text().splitlines() if path is not None else os.environ.get(KEYS, "").split(",")
    found = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if path is not None and not found:
        raise ValueError(f"{path} holds no key")
    return found


def _log(quiet: bool) -> None:
    """Lines for people and one JSON object for each request, on standard error."""
    handler = logging.StreamHandler()
    for name, level in (("moe_envs.serve", logging.INFO), ("uvicorn.error", logging.INFO)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
    if quiet:
        logging.getLogger("moe_envs.serve.requests").setLevel(logging.WARNING)
