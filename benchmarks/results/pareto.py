"""Pareto fronts of quality against cost and their hypervolume, computed by moocore."""

from pathlib import Path

import moocore
import numpy as np
import pandas as pd


def front(points: np.ndarray) -> np.ndarray:
    """Mask of the Pareto-optimal points among (cost, quality) `[n, 2]`."""
    return np.asarray(moocore.is_nondominated(points, maximise=[False, True]))


def hypervolume(points: np.ndarray, reference: tuple[float, float]) -> float:
    """Hypervolume of the points of (cost, quality) relative to the reference point."""
    return float(moocore.hypervolume(points, ref=reference, maximise=[False, True]))


def tied(costs: np.ndarray, share: float) -> np.ndarray:
    """Costs `[n]`, each group within a relative tolerance set to its smallest cost."""
    found, least = costs.copy(), -np.inf
    for place in np.argsort(costs, kind="stable"):
        least = least if costs[place] <= (1 + share) * least else costs[place]
        found[place] = least
    return found


def recommended(points: np.ndarray) -> dict[str, int]:
    """Indices of the best, the cheapest and the most balanced point of the front of (cost, quality) `[n, 2]`, the last
    being nearest to the ideal point after scaling by the range of the front."""
    on = front(points).nonzero()[0]
    cost, quality = points[on].T
    spans = [max(float(np.ptp(each)), 1e-12) for each in (cost, quality)]
    away = np.hypot((cost - cost.min()) / spans[0], (quality.max() - quality) / spans[1])
    chosen = {"quality": quality.argmax(), "balanced": away.argmin(), "thrifty": cost.argmin()}
    return {name: int(on[place]) for name, place in chosen.items()}


def plot(rows: pd.DataFrame, path: Path, title: str) -> None:
    """Plot quality against cost: learned policies by cost weight, baselines with Pareto front, and the bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    styles = {"baseline": ("tab:gray", "o", 18), "bound": ("tab:green", "^", 50), "learned": ("tab:red", "D", 42)}
    for kind, (colour, marker, size) in styles.items():
        chosen = rows[(rows["kind"] == kind) & (rows["policy"] != "random")]
        points = chosen[["cost", "quality"]].to_numpy()
        axes.scatter(points[:, 0], points[:, 1], s=size, c=colour, marker=marker, label=kind, alpha=0.8, zorder=3)
        best = points[front(points)]
        best = best[np.argsort(best[:, 0])]
        axes.step(best[:, 0], best[:, 1], where="post", color=colour, linewidth=1, zorder=2)
    for _, row in rows[rows["policy"].isin(["gate top-1", "gate top-2"])].drop_duplicates("policy").iterrows():
        axes.annotate(row["policy"], (row["cost"], row["quality"]), textcoords="offset points", xytext=(5, -12))
    learned = rows[rows["kind"] == "learned"].drop_duplicates("cost_weight")
    for _, row in learned.iterrows():
        where = (row["cost"], row["quality"])
        axes.annotate(
            f"cost weight {row['cost_weight']:g}", where, textcoords="offset points", xytext=(8, -14), color="tab:red"
        )
    axes.set(xlabel="cost (1 = the model's own top-2 gate)", ylabel="quality (accuracy)", title=title, xlim=(0, 1.3))
    floor = rows.loc[(rows["policy"] != "random") & (rows["cost"] < 1.3), "quality"].min()
    axes.set_ylim(floor - 0.02, None)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
