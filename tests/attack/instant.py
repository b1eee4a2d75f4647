"""An experiment whose runs take no time."""

from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel


class Setup(BaseModel):
    """One number."""

    a: int = 1


SETTINGS: dict[str, dict[str, Any]] = {"one": {}}


def measure(setup: Setup, seed: int, split: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The seed."""
    return {"value": seed}, {}


def score(frame: pd.DataFrame) -> dict[str, Any]:
    """Its mean."""
    return {"tables": {"Mean": [{"value": float(frame["value"].mean())}]}}
