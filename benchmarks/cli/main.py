"""Entry points of the commands: `moe-train` runs `train.py`, etc. User errors print one line and exit with 1."""

from __future__ import annotations

import sys
from importlib import import_module


def train() -> None:
    """Entry point of `moe-train`."""
    _run("train")


def evaluate() -> None:
    """Entry point of `moe-eval`."""
    _run("eval")


def compare() -> None:
    """Entry point of `moe-compare`."""
    _run("compare")


def profile() -> None:
    """Entry point of `moe-profile`."""
    _run("profile")


def bundle() -> None:
    """Entry point of `moe-bundle`."""
    _run("bundle")


def benchmark() -> None:
    """Entry point of `moe-benchmark`."""
    _run("benchmark")


def compress() -> None:
    """Entry point of `moe-compress`."""
    _run("compress")


def _run(command: str) -> None:
    """Run a command; print user errors in one line and exit with 1; exit with 130 on Ctrl-C."""
    try:
        _require_our_agents()
        errors = _errors()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ImportError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    try:
        import_module(f"benchmarks.cli.{command}").app()
    except KeyboardInterrupt:
        sys.exit(130)
    except errors as error:
        from rich.text import Text

        from benchmarks.cli.terminal import errors as console

        console.print(Text.assemble(("error: ", "red"), str(error)), soft_wrap=True)
        sys.exit(1)


def _errors() -> tuple[type[Exception], ...]:
    """Exceptions that are reported as user errors, without a traceback."""
    from agents.checkpoints import CheckpointError
    from agents.rollouts import NotFiniteError
    from agents.runs import RunError
    from benchmarks.runner.experiments import RunnerError
    from cost.energy import MeterError
    from cost.normalize import NormalizerError
    from cost.profile import ProfileError
    from experts.bundle import BundleError
    from experts.data import DataError

    ours = (BundleError, CheckpointError, DataError, MeterError, NormalizerError, NotFiniteError, ProfileError)
    return (ValueError, TypeError, OSError, *ours, RunError, RunnerError)


def _require_our_agents() -> None:
    import agents

    if getattr(agents, "DISTRIBUTION", None) != "moe-envs":
        raise ValueError(
            f"the package 'agents' found is {agents.__file__}, not moe-envs': openai-agents has the same import name; "
            "install moe-envs into a virtual environment of its own"
        )
