"""Tables and paired differences, by hand."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.results import tables
from benchmarks.results.paired import less_decisions


def test_differences_by_hand() -> None:
    rows = [
        {"start": "s", "policy": policy, "seed": seed, "episode": episode, "steps": steps, "arrived": steps < 31}
        for policy, seed, table in (("PPO", 0, [4, 6]), ("PPO", 1, [6, 8]), ("constant", 0, [10, 31]))
        for episode, steps in enumerate(table)
    ]
    ours, theirs = less_decisions(pd.DataFrame(rows))
    assert (ours["policy"], ours["decisions"], ours["arrived"], ours["kind"]) == ("PPO", 6, 1, "learned")
    assert (theirs["decisions"], theirs["arrived"], theirs["kind"]) == (20.5, 0.5, "baseline")
    assert theirs["PPO less"] == np.mean([-6, -25, -4, -23])
    assert theirs["PPO less, 95 %"][0] < theirs["PPO less"] < theirs["PPO less, 95 %"][1]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, ""), (float("nan"), ""), (True, "yes"), (False, ""), (0.12345, "0.1235"), (123456.7, "123,457"),
     (12345, "12,345"), ([0.5, 1.5], "0.5 .. 1.5"), ([1, 2, 3], "1, 2, 3"), ("text", "text")],
)  # fmt: skip
def test_a_cell(value: object, shown: str) -> None:
    assert tables.cell(value) == shown


def test_a_report_has_all_tables_as_markdown() -> None:
    rows = [{"policy": "PPO", "kind": "learned", "score": 0.5}, {"policy": "rule", "kind": "baseline", "more": 1}]
    text = tables.text("name", "What it asks.", {"tables": {"On test": rows}, "notes": ["Said last."]})
    lines = text.splitlines()
    assert lines[0] == "# name"
    assert "| policy | score | more |" in lines
    assert "| **PPO** | 0.5 |  |" in lines
    assert "| rule |  | 1 |" in lines
    assert lines[-1] == "Said last."
