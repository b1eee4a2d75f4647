"""Entry points of the commands: `moe-train` runs `train.py`, etc. User errors print one line and exit with 1."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from types import FrameType

OURS = "agents", "benchmarks", "cost", "experts", "moe_envs", "gymnasium"


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


def export() -> None:
    """Entry point of `moe-export`."""
    _run("export")


def serve() -> None:
    """Entry point of `moe-serve`."""
    _run("serve")


def dashboard() -> None:
    """Entry point of `moe-dashboard`."""
    _run("dashboard")


def language_model() -> None:
    """Entry point of `moe-lm`."""
    _run("lm")


def _run(command: str) -> None:
    """Run a command; print user errors in one line and exit with 1; exit with 130 on Ctrl-C."""
    signal.signal(signal.SIGINT, _interrupted)
    try:
        _require_our_agents()
        import_module(f"benchmarks.cli.{command}").app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not _is_users(error) or os.environ.get("MOE_ENVS_TRACE"):  # a developer wants to see where
            raise
        from rich.text import Text

        from benchmarks.cli.terminal import errors as console

        console.print(Text.assemble(("error: ", "red"), str(error)), soft_wrap=True)
        sys.exit(1)


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: libraries that are just being imported may swallow a `KeyboardInterrupt`, so that ends the process."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _is_users(error: Exception) -> bool:
    """Whether the user can mend an error: one of our own classes, of Gymnasium's, or a wrong value or file. Nothing is
    imported to find out, so that `--help` is quick."""
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, ValueError | TypeError | OSError | ImportError) or package in OURS


def _require_our_agents() -> None:
    import agents

    if getattr(agents, "DISTRIBUTION", None) != "moe-envs":
        raise ValueError(
            f"the package 'agents' found is {agents.__file__}, not moe-envs': openai-agents has the same import name; "
            "install moe-envs into a virtual environment of its own"
        )
