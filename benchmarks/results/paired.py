"""Comparison of policies on the same trainings: mean decisions to the target and paired differences."""

from __future__ import annotations

from typing import Any

import pandas as pd

from benchmarks.results.statistics import mean_interval, paired_difference


def less_decisions(frame: pd.DataFrame, learned: str = "PPO") -> list[dict[str, Any]]:
    """Mean decisions with 95 % interval, share that arrived, and paired difference to the learned policy, per start and
    policy.

    Rows have `start`, `policy`, `seed` (of the policy), `episode`, `steps` and `arrived`."""
    rows = []
    for start, group in frame.groupby("start", sort=False):
        tables = {
            name: part.pivot(index="seed", columns="episode", values="steps").to_numpy()
            for name, part in group.groupby("policy", sort=False)
        }
        for name, table in sorted(tables.items(), key=lambda item: item[1].mean()):
            row: dict[str, Any] = {
                "from the": start, "policy": name, "kind": "learned" if name == learned else "baseline",
                "decisions": float(table.mean()), "95 %": mean_interval(table),
                "arrived": float(group[group["policy"] == name]["arrived"].mean()),
            }  # fmt: skip
            if name != learned:
                difference, interval = paired_difference(tables[learned], table[0])
                row |= {f"{learned} less": difference, f"{learned} less, 95 %": interval}
            rows.append(row)
    return rows
