"""Leaderboards: scores worked out by hand, the best weights kept, and each board as it is run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import moe_envs
from benchmarks.cli import benchmark
from benchmarks.cli.benchmark import app
from benchmarks.leaderboards import board_of, report
from benchmarks.leaderboards.board import SEEDS
from benchmarks.results.scores import score
from benchmarks.runner import runner
from benchmarks.runner.experiments import RunnerError, require_trusted
from benchmarks.runner.matrix import Matrix, jobs_of
from benchmarks.runner.rows import Row, read
from tests.processes import Here

BOARD = board_of("MoERouting-v0")


def verdicts(**tasks: tuple[float, float]) -> dict[str, dict[str, float]]:
    """By task: scores on validation and test; quality is that on test, cost 1."""
    return {
        task: {"validation": validation, "test": test, "quality": test, "cost": 1.0}
        for task, (validation, test) in tasks.items()
    }


def frame() -> pd.DataFrame:
    curve = [{"steps": steps, "validation": mean} for steps, mean in ((100, 0.4), (200, 0.65), (300, 0.8))]
    rows: list[dict[str, Any]] = [
        {"setup": "PPO", "policy": "PPO", "seed": seed,
         "policies": {"PPO": verdicts(easy=(0.8, easy), hard=(0.8, hard))},
         "curve": curve[: 3 - late], "train_s": [1.0 + seed, 2.0 + seed, 3.0 + seed][: 3 - late],
         "train_wall_s": [2.0, 4.0, 6.0][: 3 - late]}
        for seed, late, easy, hard in ((0, 0, 0.8, 0.5), (1, 0, 0.9, 0.4), (2, 2, 0.7, 0.6))
    ]  # fmt: skip
    rules = {"good": verdicts(easy=(0.7, 0.6), hard=(0.4, 0.3)), "lucky": verdicts(easy=(0.5, 0.7), hard=(0.5, 0.2))}
    rows += [
        {"setup": "baselines", "policy": "baselines", "seed": 0, "policies": rules},
        {"setup": "bound", "policy": "bound", "seed": 0, "policies": {"bound": verdicts(easy=(1, 1.0), hard=(1, 0.8))}},
    ]
    return pd.DataFrame([{"split": "both", **row} for row in rows])


def test_scores_by_hand(tmp_path: Path) -> None:
    result = BOARD.score(frame())
    assert [(task["task"], task["best_baseline"], task["bound"]) for task in result["tasks"]] == [
        ("easy", "good", 1.0), ("hard", "lucky", 0.8),
    ]  # fmt: skip
    (row,) = result["rows"]
    easy, hard = np.array([0.5, 0.75, 0.25]), np.array([0.5, 1 / 3, 2 / 3])  # of 0.6 to 1.0, and of 0.2 to 0.8
    assert row["normalized"] == pytest.approx([easy.mean(), hard.mean()])
    both = np.sort(np.concatenate([easy, hard]))
    assert row["iqm"] == pytest.approx(both[1:5].mean())
    assert row["iqm_ci95"][0] < row["iqm"] < row["iqm_ci95"][1]
    assert (row["over_baseline"], row["over"], row["seeds"]) == (1.0, {}, 3)
    assert (row["scored"], row["of"]) == (["easy", "hard"], 2)
    (beats,) = row["beats"]
    about = {"split": "both", "target": 0.6, "seeds": 2, "of": 3, "whole_cpu_s": 3.0}
    assert beats == about | {"steps": 200, "cpu_s": 2.5, "wall_s": 4}
    assert result["hypervolume"]["easy"]["good"] == pytest.approx((2 - 1) * 0.6)
    assert result["hypervolume"]["hard"]["good"] == pytest.approx((2 - 1) * 0.3)
    (ppo,) = (line for line in result["tasks"][0]["policies"] if line["policy"] == "PPO")
    t, error = 4.303, 0.1 / 3**0.5  # Student's t of 2 degrees of freedom; 0.8, 0.9 and 0.7
    assert ppo["test_ci95"] == (pytest.approx(0.8 - t * error, abs=1e-3), pytest.approx(0.8 + t * error, abs=1e-3))
    text = BOARD.text(result)
    assert "| good (best on validation) | baseline | 0.6000 |" in text
    assert "| PPO | both | 2 of 3 | 200 | 2.5 | 4.0 | 3.0 |" in text
    assert BOARD.plot(frame(), result, tmp_path) == ["curves.png", "scores.png"]


@pytest.mark.parametrize("with_curves", [True, False])
def test_a_policy_without_a_curve_is_scored(with_curves: bool, tmp_path: Path) -> None:
    mine = {"mine:policy": verdicts(easy=(0.8, 0.8), hard=(0.8, 0.5))}
    rows = pd.DataFrame([{"split": "both", "setup": "mine", "policy": "mine:policy", "seed": 0, "policies": mine}])
    others = frame() if with_curves else frame().query("setup != 'PPO'").drop(columns=["curve", "train_s"])
    every = pd.concat([others, rows])
    result = BOARD.score(every)
    (row,) = (row for row in result["rows"] if row["policy"] == "mine")
    assert row["normalized"] == pytest.approx([0.5, 0.5])
    assert row["beats"] == []
    assert "| **mine** | learned | 0.8000 |" in BOARD.text(result)
    assert "scores.png" in BOARD.plot(every, result, tmp_path)


def test_seeds_that_are_missing_in_a_task_do_not_hinder() -> None:
    rows = frame()
    del rows.loc[1, "policies"]["PPO"]["hard"]
    (row,) = BOARD.score(rows)["rows"]
    assert row["normalized"] == pytest.approx([0.375, (0.5 + 2 / 3) / 2])  # of the seeds 0 and 2, which both have
    assert row["seeds"] == 2


def test_a_task_whose_baseline_is_at_the_bound_is_counted_out_and_said() -> None:
    rows = frame()
    rows.loc[4, "policies"]["bound"]["hard"]["test"] = 0.2
    result = BOARD.score(rows)
    (row,) = result["rows"]
    assert (row["scored"], row["of"]) == (["easy"], 2)
    assert "| 1 of 2, 3 |" in BOARD.text(result)


def test_what_is_compared_with_a_bound_is_of_its_episodes() -> None:
    rows = frame()
    for _, row in rows.iterrows():
        for tasks in row["policies"].values():
            tasks["easy"]["beside_bound"] = tasks["easy"]["test"] - 0.1  # all alike harder: nothing changes
    assert BOARD.score(rows)["rows"][0]["normalized"] == pytest.approx(BOARD.score(frame())["rows"][0]["normalized"])
    rows.loc[0, "policies"]["PPO"]["easy"]["beside_bound"] = 0.9
    assert BOARD.score(rows)["rows"][0]["normalized"][0] == pytest.approx((1.0 + 0.75 + 0.25) / 3)


def test_of_equal_baselines_the_stronger_rule_is_named() -> None:
    rows = frame()
    for name in ("good", "lucky"):
        rows.loc[3, "policies"][name]["easy"]["validation"] = 0.7
    assert BOARD.score(rows)["tasks"][0]["best_baseline"] == "lucky"


def test_what_has_no_bound_does_not_count() -> None:
    rows = frame()
    result = BOARD.score(rows[rows["setup"] != "bound"])
    (row,) = result["rows"]
    assert (row["scored"], "iqm" in row, row["over_baseline"], row["seeds"]) == ([], False, 1.0, 3)
    assert "no bound" in BOARD.text(result)
    alone = BOARD.score(rows[rows["setup"] == "baselines"])
    assert alone["rows"] == []
    assert "good (best on validation)" in BOARD.text(alone)


def test_baselines_and_bound_are_run_once() -> None:
    every = jobs_of(Matrix(experiment="MoERouting-v0"))
    assert {job.seed for job in every} == set(SEEDS)
    short = jobs_of(Matrix(experiment="MoERouting-v0", settings={"timesteps": 9}))
    assert {job.key for job in every} & {job.key for job in short} == {
        job.key for job in every if job.setup in ("baselines", "bound")
    }
    counts = {name: sum(job.setup == name for job in every) for name in BOARD.SETTINGS}
    assert counts == {"PPO": 40, "REINFORCE": 40, "SB3 PPO": 40, "baselines": 4, "bound": 4}


def test_what_is_run_once_goes_by_the_policy() -> None:
    named = {"rules": {"policy": "baselines"}, "bound": {"policy": "PPO"}}
    planned = jobs_of(Matrix(experiment="MoEMetaOpt-v0", seeds=[1, 2], splits=["digits"], setups=named))
    assert [(job.setup, job.seed) for job in planned] == [("rules", 1), ("bound", 1), ("bound", 2)]


@pytest.mark.parametrize("name", ["lucky", "bound"])
def test_a_learner_may_be_named_like_a_rule(name: str) -> None:
    plain, like = BOARD.score(frame()), BOARD.score(frame().assign(setup=[name] * 3 + ["baselines", "bound"]))
    (row,), (other,) = plain["rows"], like["rows"]
    assert other == {**row, "policy": f"{name}, learned"}
    assert [task["bound"] for task in like["tasks"]] == [task["bound"] for task in plain["tasks"]]


def test_tasks_of_a_unit_are_scored_by_their_mean() -> None:
    rows = frame()
    result = score(rows, "x", (2.0, 0.0), lambda task: "both", lambda task: task)
    assert [task["best_baseline"] for task in result["tasks"]] == ["good", "good"]  # 0.55 and 0.5 on validation
    (row,) = result["rows"]
    assert (row["scored"], row["of"]) == (["both"], 1)
    means = np.array([0.8 + 0.5, 0.9 + 0.4, 0.7 + 0.6]) / 2  # of 0.45, which good has, to 0.9
    assert row["normalized"] == pytest.approx([(means.mean() - 0.45) / 0.45])


def test_a_summary_has_a_line_for_each_task() -> None:
    result = json.loads(json.dumps(BOARD.score(frame())))
    lines = report.summary(result)
    assert lines[2:4] == [
        "| easy | 0.600, good | 0.800 (0.552 .. 1.048) | 1.000 |",
        "| hard | 0.200, lucky | 0.500 (0.252 .. 0.748) | 0.800 |",
    ]  # fmt: skip
    assert lines[-1].startswith(
        "3 seeds, 95 % intervals over them. Normalised scores, 0 the best baseline, 1 the bound: "
    )
    for few in (frame()[2:], frame()[:3], frame()[3:], frame()[:1]):  # one seed; no rules; no learner; one row
        result = BOARD.score(few.reset_index(drop=True))
        single = json.loads(json.dumps(runner._finite(result)))
        assert len(report.summary(single)) == 2 + 2 + 2
        assert BOARD.text(result)


def test_a_board_is_run_and_reported(tmp_path: Path) -> None:
    settings = {"timesteps": 2048, "episodes": 2}
    wanted = Matrix(experiment="MoEMetaOpt-v0", seeds=[17, 42], splits=["digits"], settings=settings)
    learners = len(board_of("MoEMetaOpt-v0").problem.learners)
    assert runner.run(wanted, tmp_path, executor=Here) == 2 * learners + 2
    assert runner.rebuild(tmp_path)
    rows = as_run(tmp_path, exact=False)  # its stand-in for a bound is a search
    first, second = (row.metrics["policies"] for row in rows if row.setup == "PPO")
    assert first != second


def as_run(folder: Path, exact: bool) -> list[Row]:
    """The rows of a board, once they and its report have been looked at."""
    rows = read(folder / "raw.jsonl")
    policies = {name: tasks for row in rows for name, tasks in row.metrics["policies"].items()}
    assert {"PPO", "bound"} < policies.keys()
    assert len(policies) > 5
    if exact:
        for task, best in policies["bound"].items():
            assert all(best["test"] >= found[task]["test"] - 1e-9 for found in policies.values())
    text = (folder / "report.md").read_text()
    assert all(f"## {task}" in text for task in policies["PPO"])
    assert {"curves.png", "scores.png"} <= {path.name for path in folder.iterdir()}
    return rows


def said(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


def test_a_board_by_its_commands(tmp_path: Path) -> None:
    out = tmp_path / "board"
    arguments = (
        "leaderboard",
        "MoECompression-v0",
        "--out",
        str(out),
        "--quick",
        "--jobs",
        "1",
        "--set",
        "timesteps=4096",
    )
    assert "saved" in said(*arguments)
    assert "nothing to do" in said(*arguments)
    assert len(as_run(out, exact=True)) == 3 + 2
    (out / "report.md").unlink()
    assert "saved" in said("report", str(out))
    assert "Not the usual settings: timesteps 4096" in (out / "report.md").read_text()
    shown = said("validate", str(out / "raw.jsonl"), "--rows", "1", "--json", str(tmp_path / "found.json"))
    assert "the same" in shown
    assert [each["differing"] for each in json.loads((tmp_path / "found.json").read_text())] == [[]]


def test_a_board_of_some_seeds_and_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Matrix]()
    monkeypatch.setattr(benchmark, "_make", lambda matrix, *_, **__: asked.append(matrix))
    said(
        "leaderboard",
        "MoEServing-v0",
        "--out",
        str(tmp_path),
        "--seeds",
        "2",
        "--split",
        "bursts, one",
        "--policy",
        "a:b",
    )
    assert (asked[0].seeds, asked[0].splits) == (list(SEEDS[:2]), ["bursts, one"])
    assert {"PPO", "a:b"} < asked[0].setups.keys()


class First:
    """A policy that always makes the first choice."""

    def predict(self, observation: np.ndarray, *rest: Any, **more: Any) -> tuple[np.ndarray, None]:
        return np.zeros(len(observation), dtype=np.int64), None


FIRST = First()


def test_a_board_in_the_user_s_own_setting(tmp_path: Path) -> None:
    board, trace = board_of("MoEServing-v0"), tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP\n" + "\n".join(f"{second}" for second in range(1000)))
    rows = []
    for env in ({"seconds": 0.5, "load": 0.5}, {"seconds": 0.5, "load": 0.5, "trace": str(trace)}):
        setup = {"policy": f"{__name__}:FIRST", "episodes": 2, "env": env}
        found, _ = board.measure(board.Setup(**setup), 0, "poisson, one", tmp_path)
        rows.append({"setup": "mine", "seed": 0, "split": "poisson, one", **setup, **found})
    scores = [each["policies"][f"{__name__}:FIRST"]["poisson, one"]["test"] for each in rows]
    assert scores[0] != scores[1]
    assert f"env seconds=0.5, load=0.5, trace={trace}" in board.text(board.score(pd.DataFrame(rows[1:])))
    assert board.score(pd.DataFrame(rows))["bound_is"] == "a server that knows the future"
    assert (
        board.score(pd.DataFrame([rows[0] | {"env": {"answers": "latency", "load": 0.5}}]))["bound_is"] == "the optimum"
    )
    assert board.problem.splits["poisson, one"] == {"trace": "poisson", "classes": "one"}


def test_what_cannot_be_compared_is_refused() -> None:
    setups = {"mine": {"policy": "PPO", "env": {"load": 0.5}}, "other": {"policy": "PPO"}}
    with pytest.raises(RunnerError, match="different arguments of the environment"):
        jobs_of(Matrix(experiment="MoEServing-v0", setups=setups))
    for env, match in (({"load": -1.0}, "poisson, one.*load"), ({"answers": "latency", "load": 0.5}, "mixed.*one cl")):
        with pytest.raises(RunnerError, match=match):
            jobs_of(Matrix(experiment="MoEServing-v0", setups={"mine": {"policy": "PPO", "env": env}}))
    for name, env, message in (
        ("MoECompression-v0", {"budget": 1}, "a setting of its own"),
        ("MoEServing-v0", {"split": "test"}, "'split' is none of"),
        ("MoEServing-v0", {"lod": 0.5}, "'lod' is none of answers"),
        ("MoEServing-v0", {"trace": "poisson"}, "are the same"),
    ):
        with pytest.raises(RunnerError, match=message):
            jobs_of(Matrix(experiment=name, settings={"env": env}))


def test_passages_are_played_once_and_are_spread_over_the_split() -> None:
    class Looking:
        env_kwargs = {"granularity": "token", "tokens": 2}

        def watch(self, env: Any) -> None:
            self.env = env

        def predict(self, observation: np.ndarray, **_: Any) -> tuple[np.ndarray, None]:
            self.passages = self.env.passage.tolist()
            return np.zeros((len(observation), self.env.layers), dtype=np.int64), None

    policy, problem = Looking(), board_of("MoELayerTopK-v0").problem
    verdict = problem.judged(policy, next(iter(problem.splits)), 3, Path())
    assert policy.passages == [0, 264, 527]  # of validation, played after test
    assert all(np.isfinite(each.test) for each in verdict.values())
    with pytest.raises(ValueError, match="split 'test' has 704 passages"):
        problem.judged(policy, next(iter(problem.splits)), 800, Path())


def test_unknown_policies_are_told_before_anything_runs() -> None:
    with pytest.raises(RunnerError, match="'DQN' of the setup 'mine' is none of PPO, SB3 PPO, base"):
        jobs_of(Matrix(experiment="MoEMetaOpt-v0", setups={"mine": {"policy": "DQN"}}))
    with pytest.raises(RunnerError, match="episodes=5: nothing is judged by episodes here"):
        jobs_of(Matrix(experiment="MoECompression-v0", settings={"episodes": 5}))


@pytest.mark.parametrize("name", sorted(moe_envs.SPECS))
def test_a_board_trusts_what_it_offers_and_nothing_else(name: str, tmp_path: Path) -> None:
    require_trusted(name, board_of(name).SETTINGS.values(), tmp_path, ())
    with pytest.raises(RunnerError, match="--trust os:getcwd"):
        require_trusted(name, [{"policy": "os:getcwd"}], tmp_path, ())
