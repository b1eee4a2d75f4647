"""Execute each run of a matrix once and store it as one line of `raw.jsonl`.

The process of a run appends its line under a lock, so finished runs survive a kill and interrupted runs are repeated.
When all runs are finished, the lines are sorted in matrix order, so that the file does not depend on the number of
processes, apart from times. Reports use these lines only.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import shutil
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.runner.experiments import RunnerError, Trust, find
from benchmarks.runner.matrix import Job, Matrix, jobs_of, load_matrix, trusted_matrix
from benchmarks.runner.processes import Executor, Local
from benchmarks.runner.rows import RAW, Row, append, read, sort
from cost.files import alone, load_json, save_json, write_text
from cost.machine import provenance

MATRIX, RESULTS, REPORT, WORK = "matrix.json", "results.json", "report.md", "work"
RUNNING = ".running-{}-of-{}.lock"
ATTEMPTS = 3
MOST_FAILED = 0.05


class FailedRuns(RunnerError):
    """Runs failed on every attempt; finished runs are kept."""


def run(
    matrix: Matrix, out: Path, processes: int = 1, part: tuple[int, int] = (0, 1), only: Collection[str] = (),
    report: Callable[[float], object] = lambda share: None, say: Callable[[str], object] = lambda line: None,
    executor: Callable[[int], Executor] | None = None,
) -> int:  # fmt: skip
    """Execute the missing runs in parallel processes, or in the given executor; returns the number of runs executed.

    `part` (i, n) selects the i-th of n parts, `only` selects setups. `report` receives the finished share, `say` the
    headlines of finished runs. A failed run is retried twice. Raises `FailedRuns` as soon as more than 5 % have failed
    for good, or at the end if any has, with an overview in `failed-I-of-N.json`; finished runs are kept, and the same
    call resumes. Raises `RunnerError` for a folder of another experiment.
    """
    executor = executor or (lambda count: Local(min(processes, count)))
    every, failed = jobs_of(matrix), out / f"failed-{part[0]}-of-{part[1]}.json"
    with alone(out, RunnerError, RUNNING.format(*part)):
        todo = left(matrix, out, part, only)
        prepare(matrix, out)
        failed.unlink(missing_ok=True)
        failures = _work(todo, out, executor(len(todo)), MOST_FAILED * len(todo), failed, report, say) if todo else []
        sort(out / RAW, every)
    if failures:
        raise FailedRuns(_overview(failures, len(todo), failed))
    return len(todo)


def clear(out: Path) -> None:
    """Delete rows, report and shared results in a folder of `run`; raises `RunnerError` for any other folder."""
    if not out.exists():
        return
    if not (out / MATRIX).exists() and any(out.iterdir()):
        raise RunnerError(f"{out} is no folder of moe-benchmark run: nothing is deleted")
    with ExitStack() as stack:
        for lock in out.glob(RUNNING.format("*", "*")):
            stack.enter_context(alone(out, RunnerError, lock.name))
        for name in (RAW, RESULTS, REPORT, MATRIX):
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / WORK, ignore_errors=True)


def prepare(matrix: Matrix, out: Path) -> None:
    """Write the matrix to its folder; raises `RunnerError` for an invalid matrix or a folder of another experiment."""
    jobs_of(matrix)
    if (out / MATRIX).exists() and (other := load_matrix(out / MATRIX).experiment) != matrix.experiment:
        raise RunnerError(f"{out} is a folder of {other}, not of {matrix.experiment}: another --out")
    write_text(out / MATRIX, matrix.model_dump_json(indent=1))


def left(matrix: Matrix, out: Path, part: tuple[int, int] = (0, 1), only: Collection[str] = ()) -> list[Job]:
    """Runs that `run` would execute; raises `RunnerError` for an unknown setup."""
    every = jobs_of(matrix)
    names = dict.fromkeys(job.setup for job in every)
    if unknown := [name for name in only if name not in names]:
        raise RunnerError(f"no setup {unknown[0]!r}; there are {', '.join(names)}")
    there = {row.config_hash for row in read(out / RAW, cut=True)}
    mine = [job for job, place in zip(every, _places(every, part[1]), strict=True) if place == part[0]]
    return [job for job in mine if job.key not in there and (not only or job.setup in only)]


def _places(every: list[Job], parts: int) -> list[int]:
    """Part of each run. All runs of a setup and seed go to one part, since they share results such as a trained model;
    parts with the fewest runs are filled first."""
    groups = Counter((job.setup, job.seed) for job in every)
    loads, places = [0] * parts, dict[tuple[str, int], int]()
    for name in dict.fromkeys(job.setup for job in every):
        order: list[int] = []
        for group in (group for group in groups if group[0] == name):
            order = order or sorted(range(parts), key=loads.__getitem__)
            places[group] = order.pop(0)
            loads[places[group]] += groups[group]
    return [places[job.setup, job.seed] for job in every]


def rebuild(out: Path, trust: Trust = ()) -> bool:
    """Write the report of a folder of `run` from its rows; False if it is up to date with rows and code.

    Raises `RunnerError` for rows that are damaged or do not fit the experiment, and for a folder whose experiment would
    be imported and is not in `trust`.
    """
    matrix = trusted_matrix(out / MATRIX, trust)
    wanted = {job.key: number for number, job in enumerate(jobs_of(matrix))}
    rows = sorted((row for row in read(out / RAW) if row.config_hash in wanted), key=lambda r: wanted[r.config_hash])
    if not rows:
        raise RunnerError(f"{out} holds no row of its matrix: moe-benchmark run {out / MATRIX} --out {out}")
    source = {
        "rows": len(rows), "of": len(wanted), "commits": sorted({str(row.commit) for row in rows}),
        "machines": sorted({row.fingerprint["cpu"] for row in rows}), **provenance(),
        "sha256": hashlib.sha256("".join(row.model_dump_json(exclude={"sha256"}) for row in rows).encode()).hexdigest(),
    }  # fmt: skip
    if (out / REPORT).exists() and _source_of(out / RESULTS) == source:
        return False
    experiment = find(matrix.experiment)
    frame = pd.DataFrame(
        [{"setup": r.setup, "seed": r.seed, "split": r.split, **r.arguments, **r.metrics, **r.measured} for r in rows]
    )
    try:
        result = experiment.score(frame)
        pictures = experiment.plot(frame, result, out)
    except (KeyError, IndexError, TypeError, AttributeError) as error:  # metrics that its own rows have
        raise RunnerError(f"{out / RAW}: its rows do not fit {matrix.experiment}: {error!r}") from error
    about = (
        f"{source['rows']} of {source['of']} runs, at commit {', '.join(source['commits'])}, on "
        f"{', '.join(source['machines'])}. `moe-benchmark report` makes this page from `{RAW}`."
    )
    drawn = "\n\n".join(f"![{name}]({name})" for name in pictures)
    write_text(out / REPORT, f"{experiment.text(result)}\n\n{about}\n\n{drawn}\n")
    save_json(out / RESULTS, json.loads(json.dumps(_finite({"source": source, **result}))))
    return True


def measure(job: Job, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Execute one run."""
    experiment = find(job.experiment)
    return experiment.measure(experiment.setup(job.arguments), job.seed, job.split, folder)


def slurm(path: Path, out: Path, parts: int, trust: Collection[str] = ()) -> str:
    """Slurm script that runs a matrix in parallel tasks and then writes the report."""
    trusted = "".join(f" --trust {shlex.quote(each)}" for each in trust)
    command = f"moe-benchmark run {shlex.quote(str(path))} --out {shlex.quote(str(out))}{trusted}"
    return "\n".join([
        "#!/bin/bash",
        "#SBATCH --job-name=moe-benchmark", f"#SBATCH --array=0-{parts - 1}", "#SBATCH --cpus-per-task=1",
        f"# then: moe-benchmark report {shlex.quote(str(out))}{trusted}",
        f'srun {command} --part "$SLURM_ARRAY_TASK_ID/{parts}"', "",
    ])  # fmt: skip


class _Failure(NamedTuple):
    job: Job
    error: str
    trace: str


def _work(
    todo: list[Job], out: Path, executor: Executor, most: float, failed: Path, report: Callable[[float], object],
    say: Callable[[str], object],
) -> list[_Failure]:  # fmt: skip
    waiting, running, failures = deque((job, 1) for job in todo), dict[Any, tuple[Job, int]](), list[_Failure]()
    try:
        while waiting or running:
            while waiting and len(running) < executor.slots:
                job, attempt = waiting.popleft()
                running[executor.submit(_make, job, attempt, out)] = job, attempt
            for call, line, error in executor.wait(running):
                job, attempt = running.pop(call)
                if line:
                    say(line)
                if error is not None and attempt < ATTEMPTS:
                    waiting.appendleft((job, attempt + 1))
                elif error is not None:
                    failures.append(_Failure(job, repr(error), "".join(traceback.format_exception(error))))
                    content = [{**each.job._asdict(), "error": each.error, "trace": each.trace} for each in failures]
                    write_text(failed, json.dumps(content, indent=1))
                if len(failures) > most:
                    raise FailedRuns(_overview(failures, len(todo), failed))
                report(1 - (len(waiting) + len(running)) / len(todo))
    finally:
        executor.close()
    return failures


def _make(job: Job, attempt: int, out: Path) -> str:
    """Execute one run in a process and append its row; returns its headline."""
    wall, cpu = time.perf_counter(), time.process_time()
    about = {"config_hash": job.key, **job._asdict(), **provenance()}
    metrics, measured = measure(job, out / WORK / str(about["commit"]))  # results of other commits are not reused
    measured |= {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    append(out / RAW, Row.made(metrics=metrics, measured=measured, attempts=attempt, **about))
    experiment = find(job.experiment)
    return experiment.headline(experiment.setup(job.arguments), metrics)


def _source_of(path: Path) -> Any:
    try:
        return load_json(path, RunnerError, "")["source"]
    except (RunnerError, KeyError):  # it is made anew
        return None


def _overview(failures: list[_Failure], total: int, failed: Path) -> str:
    shown = [f"{each.job.setup}, seed {each.job.seed}, {each.job.split}: {each.error}" for each in failures[:10]]
    more = [f"and {len(failures) - 10} more"] if len(failures) > 10 else []
    head = f"{len(failures)} of {total} runs failed {ATTEMPTS} times; traces are in {failed}, the same call goes on"
    return "\n  ".join([head, *shown, *more])


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by None, since JSON lacks them."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
