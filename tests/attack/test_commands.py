"""The commands with bad files and options: one line, never a traceback. Code that a file names is never run unasked."""

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from agents import runs
from agents.checkpoints import save as save_checkpoint
from agents.ppo import PPO
from benchmarks.cli import main
from benchmarks.runner import runner, validate
from benchmarks.runner.experiments import find, shipped
from benchmarks.runner.matrix import Job
from benchmarks.runner.rows import Row
from cost.files import save_json
from moe_envs import SPECS
from tests.attack.conftest import SCALE, Outcomes, arguments_of, some
from tests.attack.kinds import KINDS
from tests.processes import running

PAYLOAD = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
SETTINGS, Setup, measure, score = {{}}, None, None, None
def policy(env_id, seed, **kwargs):
    pathlib.Path({mark!r}).write_text("ran")
"""


def call(name: str, *arguments: str) -> tuple[int, str]:
    """Exit status and output of a command in this process; what it raises would be a traceback."""
    before, output = sys.argv, io.StringIO()
    sys.argv = [f"moe-{name}", *arguments]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                getattr(main, name)()
            except SystemExit as ended:
                return int(ended.code or 0), output.getvalue()
        return 0, output.getvalue()
    finally:
        sys.argv = before


def refused(attack: Outcomes, case: str, name: str, *arguments: str, says: str = "") -> None:
    """A command that must end with an error in few lines."""
    try:
        status, said = call(name, *arguments)
    except Exception as error:
        attack.add("traceback", case, error)
        return
    lines = [line for line in said.splitlines() if line.strip(" ─╭╮╰╯│")]
    good = (
        status in (1, 2)
        and "Traceback" not in said
        and len(lines) <= 6
        and len(said) < 2500
        and says in " ".join(said.split())
    )
    attack.add("clear" if good else ("silent" if status == 0 else "unclear"), case, said[:300])


DEEP = "[" * 50_000
CONTENTS = {
    "empty": "", "text": "hello", "deep": DEEP, "deep dict": '{"a":' * 50_000, "list": "[]", "number": "1",
    "null": "null", "nan": '{"experiment": NaN}',
    "wrong experiment": '{"experiment": "nothing"}', "experiment with dots": '{"experiment": "..."}',
    "experiment of spaces": '{"experiment": "  "}',
    "empty experiment": '{"experiment": ""}', "experiment with colon": '{"experiment": ":"}',
    "experiment of module": '{"experiment": "os:path"}',
    "relative": '{"experiment": ".runner"}', "nul": '{"experiment": "a\\u0000b.c"}',
    "number of experiment": '{"experiment": 5}',
    "unregistered": '{"experiment": "MoENothing-v0"}', "version": '{"experiment": "MoERouting-v99"}',
    "odd": '{"experiment": "a b.c:d e"}',
    "20,000 keys": json.dumps({"experiment": "tau"} | {f"key{number}": 1 for number in range(20_000)}),
    "20,000 setups": json.dumps({"experiment": "tau", "setups": {f"s{number}": {"x": 1} for number in range(20_000)}}),
    "merge": "a: &a {experiment: tau}\n<<: *a\nnothing: 1", "merge of text": "<<: text\nexperiment: tau",
    "merge of list": "<<: [1, 2]\nexperiment: tau",
    "anchor of itself": "a: &a [*a]\nexperiment: tau", "tag": "!!python/object/apply:os.system ['true']",
    "binary": "experiment: !!binary x",
    "date": "experiment: 2020-13-45", "seed -1": '{"experiment": "tau", "seeds": [-1]}',
    "seed text": '{"experiment": "tau", "seeds": ["x"]}',
    "seed huge": '{"experiment": "tau", "seeds": [1e400]}', "no seeds": '{"experiment": "tau", "seeds": []}',
    "key of list": "? [1]\n: 2\nexperiment: tau",
    "billion": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands write into a folder of their own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def test_matrices(attack: Outcomes, tmp_path: Path) -> None:
    for suffix in (".json", ".yaml"):
        for case, content in some(CONTENTS.items(), 1 if suffix == ".json" else 3):
            file, folder = tmp_path / f"matrix{suffix}", tmp_path / "out"
            file.write_text(content)
            refused(attack, f"run {case}{suffix}", "benchmark", "run", str(file), "--out", str(folder), "--dry-run")
            folder.mkdir(exist_ok=True)
            (folder / "matrix.json").write_text(content)
            refused(attack, f"report {case}", "benchmark", "report", str(folder))
            (folder / "raw.jsonl").write_text(content + "\n")
            refused(attack, f"validate {case}", "benchmark", "validate", str(folder / "raw.jsonl"))


def test_files_of_other_kinds(attack: Outcomes, tmp_path: Path) -> None:
    for case, content in some(CONTENTS.items(), 3):
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        for name in ("run.json", "started.json"):
            (run / name).write_text(content)
            refused(attack, f"eval {name} {case}", "evaluate", str(run))
            refused(attack, f"compare {name} {case}", "compare", str(run), "--out", str(tmp_path / "c"))
            refused(attack, f"resume {name} {case}", "train", "--resume", str(run))
            (run / name).unlink()
        (tmp_path / "file").write_text(content)
        refused(attack, f"profile {case}", "profile", "show", str(tmp_path / "file"))
        refused(
            attack,
            f"apply {case}",
            "compress",
            "apply",
            str(tmp_path / "file"),
            str(tmp_path / "file"),
            "--out",
            str(tmp_path / "o"),
        )
        refused(
            attack, f"normaliser {case}", "train", "-k", f"normalizer={tmp_path / 'file'}", "--out", str(tmp_path / "r")
        )
        (tmp_path / "logs").mkdir(exist_ok=True)
        for name in ("monitor.json", "batches.csv", "epochs.csv"):
            (tmp_path / "logs" / name).write_text(content)
        refused(attack, f"logs {case}", "profile", "logs", str(tmp_path / "logs"), "--out", str(tmp_path / "report"))


def test_runs_with_other_settings(attack: Outcomes, tmp_path: Path) -> None:
    plain: dict[str, Any] = {
        "env": "moe_envs:MoERouting-v0", "env_kwargs": {"bundle": "digits"}, "algo": "ppo", "backend": "own", "seed": 0,
        "settings": {"total_timesteps": 512, "n_envs": 4},
    }  # fmt: skip
    changes: list[dict[str, Any]] = [
        {"algo": "sac"}, {"algo": 5}, {"algo": "../x"}, {"backend": "rllib"}, {"backend": None},
        {"env": "MoENothing-v0"}, {"env": 5}, {"env": ""},
        {"env": ":"}, {"env": "moe_envs:"}, {"env": "a b:c d"}, {"env_kwargs": []}, {"env_kwargs": {"bundle": 5}},
        {"env_kwargs": {"nothing": 1}},
        {"seed": -1}, {"seed": "x"}, {"settings": {}}, {"settings": {"n_envs": 10**11, "total_timesteps": 1}},
        {"settings": 5},
        {"settings": {"total_timesteps": 10, "nothing": 1}}, {"settings": {"total_timesteps": "x"}},
        {"env": "moe_envs:mo-moe-routing-v0"},
    ]  # fmt: skip
    for number, change in enumerate(changes):
        folder = tmp_path / str(number)
        save_json(folder / "started.json", plain | change)
        refused(attack, f"resume {change}", "train", "--resume", str(folder), "--no-baselines")
        sums = {"weights_sha256": "x", "episodes_sha256": "x", "cost_weight": 0.1}
        save_json(folder / "run.json", {"format": 2, **plain, **change, **sums})
        refused(attack, f"eval {change}", "evaluate", str(folder))


def test_options(attack: Outcomes, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    out = "--out", str(tmp_path / "out")
    for bad in ("/proc/nowhere/x.json", str(tmp_path / "file" / "x.json"), str(tmp_path)):
        refused(attack, f"--json {bad}", "train", "--json", bad, *out, "--timesteps", "512", "-k", "bundle=digits")
        refused(attack, f"eval --json {bad}", "evaluate", str(tmp_path), "--json", bad)
        refused(attack, f"run --json {bad}", "benchmark", "run", "tau", "--json", bad, *out)
        refused(
            attack,
            f"--out {bad}",
            "train",
            "--out",
            bad if bad != str(tmp_path) else "/proc/x",
            "--timesteps",
            "512",
            "-k",
            "bundle=digits",
        )
    assert not (tmp_path / "out").exists(), "a training began"
    for seed in ("-1", "1.5", "x", "99999999999999999999"):
        refused(attack, f"--seed {seed}", "train", "--seed", seed, *out, "--timesteps", "512", "-k", "bundle=digits")
    for name, options in {
        "train": (["--timesteps", "0"], ["--timesteps", "-5"], ["--algo", ""], ["--env", ""], ["--env", "a:b"],
        ["-k", "="], ["-k", "=1"], ["-k", "a=NaN"],
                  ["-k", "cost_weight=NaN"], ["-k", "cost_weight=Infinity"], ["-k", f"x={DEEP}"], ["-k",
                  "cost_weight=1e999"], ["-k", "bundle=" + "x" * 5000]),
        "evaluate": ([str(tmp_path / "nothing")], [str(tmp_path / "file")], [str(tmp_path), "--episodes", "1"],
        ["/dev/null"], [""], ["x.zip"], ["x.zip", "--trust"],
                     [str(tmp_path / "x.zip"), "--trust", "--env", "MoERouting-v0"]),
        "benchmark": (["run", "nothing", *out], ["run", "..", *out], ["run", "a b", *out], ["run", "tau", "--set",
        "x", *out], ["run", "tau", "--set", "x=1", *out],
                      ["run", "tau", "--part", "5/2", *out], ["run", "tau", "--part", "x", *out], ["run", "tau",
                      "--seeds", "0", *out], ["run", "tau", "--only", "x", *out],
                      ["leaderboard", "nothing", *out], ["leaderboard", "a.b:C-v0", *out], ["report", str(tmp_path)],
                      ["validate", "/dev/null"], ["validate", str(tmp_path)]),
        "bundle": (["check", "nothing"], ["check", ""], ["check", str(tmp_path)], ["check", "/"], ["rebuild",
        "nothing"], ["check", "../../etc"], ["check", "x" * 5000]),
        "profile": (["show", "nothing"], ["show", str(tmp_path)], ["show", "/dev/null"], ["model", "nothing:x"],
        ["model", ""], ["model", "os:getcwd"], ["model", "json:dumps"],
                    ["compare", "nothing", "digits"], ["logs", str(tmp_path)], ["bundle", "nothing"]),
        "compare": ([str(tmp_path), *out], [str(tmp_path / "nothing"), *out], ["", *out]),
        "compress": (["export", "--model", "nothing", "--out", str(tmp_path / "m")], ["plan", str(tmp_path)],
        ["apply", str(tmp_path / "file"), "/dev/null"]),
    }.items():  # fmt: skip
        for arguments in options:
            refused(attack, f"{name} {' '.join(arguments)[:80]}", name, *arguments)


def test_a_foreign_bundle_does_not_break_the_list(attack: Outcomes, own_cache: Path) -> None:
    for case, content in some(CONTENTS.items(), 2):
        folder = own_cache / "bundles" / "strange"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bundle.json").write_text(content)
        (folder / "SHA256SUMS").write_text(content)
        status, said = call("bundle", "list")
        attack.add("clear" if status == 0 and "strange" in said and "digits" in said else "unclear", case, said)


@pytest.fixture
def payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """A package `evilrun.payload` that can be imported; returns whether it has run."""
    package, mark = tmp_path / "evilrun", tmp_path / "mark"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "payload.py").write_text(PAYLOAD.format(mark=str(mark)))
    monkeypatch.syspath_prepend(tmp_path)

    def ran() -> bool:
        sys.modules.pop("evilrun.payload", None)
        there = mark.exists()
        mark.unlink(missing_ok=True)
        return there

    return ran


def test_no_file_runs_code_unasked(attack: Outcomes, payload: Callable[[], bool], tmp_path: Path) -> None:
    evil = "evilrun.payload:X-v0"
    KINDS["checkpoint"].write(tmp_path)
    content = PPO.load(tmp_path / "agent")._content()
    save_checkpoint(tmp_path / "evil", content | {"env": evil})
    plain = {
        "env_kwargs": {},
        "algo": "ppo",
        "backend": "own",
        "seed": 0,
        "settings": {"total_timesteps": 9, "n_envs": 1},
    }
    run, inner = tmp_path / "run", tmp_path / "inner"
    for folder, more in (
        (run, {"env": evil}),
        (inner, {"env": "moe_envs:mo-moe-routing-v0", "env_kwargs": {"env_id": evil}}),
    ):
        save_json(folder / "started.json", plain | more)
        save_json(
            folder / "run.json",
            {"format": 2, **plain, **more, "weights_sha256": "x", "episodes_sha256": "x", "cost_weight": 0.1},
        )
    out = tmp_path / "out"
    out.mkdir()
    matrices = {
        "experiment": {"experiment": "evilrun.payload"}, "member": {"experiment": "evilrun.payload:policy"},
        "board": {"experiment": evil},
        "policy": {"experiment": "MoERouting-v0", "setups": {"mine": {"policy": "evilrun.payload:policy"}}},
        "settings": {"experiment": "MoERouting-v0", "setups": {"mine": {}},
        "settings": {"policy": "evilrun.payload:policy"}},
        "system": {"experiment": "MoERouting-v0", "setups": {"mine": {"policy": "os:system"}}},
    }  # fmt: skip

    def a_row(experiment: str, arguments: dict[str, Any]) -> Path:
        job = Job(experiment, "mine", arguments, 17, "digits, cost weight 0.4")
        about = {"config_hash": job.key, **job._asdict(), "commit": None, "fingerprint": {}, "versions": {}}
        (out / "raw.jsonl").write_bytes(Row.made(metrics={"a": 1}, measured={}, attempts=1, **about).line)
        return out / "raw.jsonl"

    def rebuilt(content: dict[str, Any]) -> object:
        (out / "matrix.json").write_text(json.dumps(content))
        return runner.rebuild(out)

    attempts: dict[str, Callable[[], object]] = {
        "load a checkpoint": lambda: PPO.load(tmp_path / "evil"),
        "resume a checkpoint": lambda: PPO.resume(tmp_path / "evil"),
        "load a run": lambda: runs.load(run), "resume a run": lambda: runs.resume(run),
        "an id inside": lambda: runs.resume(inner),
        **{f"report {name}": lambda each=each: rebuilt(each) for name, each in matrices.items()},
        "validate a row": lambda: validate.validate(a_row("evilrun.payload", {}), 1, 0, 0),
        "validate a policy": lambda: validate.validate(a_row("MoERouting-v0", {"policy": "evilrun.payload:policy",
        "timesteps": None, "episodes": 9}), 1, 0, 0),
        "validate an interpreter": lambda: validate.validate(
            a_row("dacbench", {"steps": 1, "images": True, "python": "/bin/true"}), 1, 0, 0
        ),
        "validate an environment": lambda: validate.validate(
            a_row("ppo", {"env": evil, "rows": 1, "steps": 1, "batch_size": 1, "timesteps": 1, "rounds": 1}), 1, 0, 0
        ),
        "validate a call": lambda: validate.validate(a_row("MoERouting-v0", {"policy": "subprocess:run",
        "timesteps": None, "episodes": 9}), 1, 0, 0),
    }  # fmt: skip
    for case, action in attempts.items():
        (run / "run.json").exists() and case == "resume a run" and (run / "run.json").unlink()
        case == "an id inside" and (inner / "run.json").unlink()
        attack.attempt(case, action, lambda done: "accepted", (ValueError, RuntimeError))
        if payload():
            attack.add("silent", f"{case} ran code")
    commands = {
        "eval": ("evaluate", str(run)), "resume": ("train", "--resume", str(run)), "plan": ("compress", "plan",
        str(tmp_path / "evil")),
        "report": ("benchmark", "report", str(out)), "validate": ("benchmark", "validate", str(out / "raw.jsonl")),
        "run": ("benchmark", "run", str(out / "matrix.json"), "--out", str(tmp_path / "o")),
    }  # fmt: skip
    for case, (name, *arguments) in commands.items():
        refused(attack, f"moe-{case}", name, *arguments)
        if payload():
            attack.add("silent", f"moe-{case} ran code")
    for action in (lambda: PPO.load(tmp_path / "evil", allow_import=True), lambda: runs.resume(run, allow_import=True)):
        with contextlib.suppress(Exception):
            action()
        attack.add("right" if payload() else "silent", "what is trusted is imported")


def test_ctrl_c_at_any_time_is_quiet(attack: Outcomes, tmp_path: Path) -> None:
    code = "from benchmarks.cli.main import train; train()"
    arguments = [sys.executable, "-c", code, "-k", "bundle=digits", "--no-baselines", "--timesteps", "100000000"]
    for number in range(3 * SCALE):
        seconds = 0.1 + 3.5 * number / (3 * SCALE)
        command = [*arguments, "--out", str(tmp_path / str(number))]
        with running(command, stderr=subprocess.PIPE) as process:
            time.sleep(seconds)
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[1]
        quiet = process.returncode in (130, -signal.SIGINT, 1) and "Traceback" not in said
        attack.add(
            "clear" if quiet or seconds < 0.2 else "traceback",
            f"Ctrl-C after {seconds:.2f} s",
            f"{process.returncode} {said}",
        )


def test_a_foreign_agents_package_is_named_in_one_line(attack: Outcomes, tmp_path: Path) -> None:
    (tmp_path / "agents").mkdir()
    for case, content in {
        "empty": "",
        "other": "DISTRIBUTION = 'openai'",
        "broken": "import nothing_of_that_name",
        "raises": "raise ValueError('x')",
    }.items():
        (tmp_path / "agents" / "__init__.py").write_text(content)
        code = (
            f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from benchmarks.cli.main import evaluate; evaluate()"
        )
        done = subprocess.run([sys.executable, "-c", code, "x"], capture_output=True, text=True)
        attack.add(
            "clear"
            if done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.count("\n") <= 2
            else "traceback",
            case,
            done.stderr,
        )


def test_what_a_setup_names_is_trusted_or_harmless() -> None:
    """Each text in a setup of a shipped experiment is a name of ours, or among what the setup says that it imports."""
    harmless = {
        "network", "model", "policy", "bundle", "policies", "data", "method", "level", "gate_level", "run", "task",
        "trained_on", "optimizer", "plans", "loop", "peer",
        "env",  # arguments of an environment, see the test below
    }  # fmt: skip
    for name in shipped():
        experiment = find(name)
        first = next(iter(experiment.settings.values()))
        for field, about in experiment.setup_class.model_fields.items():
            if "str" not in str(about.annotation) or "Literal" in str(about.annotation) or field in harmless:
                continue
            setup = experiment.setup_class.model_construct(**first | {field: "evilrun.payload:x"})
            assert "evilrun.payload:x" in setup.imports, f"{name}: {field}"


@pytest.mark.parametrize("env_id", list(SPECS))
def test_no_argument_of_an_environment_is_imported(env_id: str, payload: Callable[[], bool]) -> None:
    """So a matrix may give a leaderboard's environment any arguments (`env`) without being trusted."""
    for argument in arguments_of(env_id):
        with contextlib.suppress(ValueError, RuntimeError):
            gymnasium.make(env_id, disable_env_checker=True, **SPECS[env_id].small | {argument: "evilrun.payload:x"})
        assert not payload(), argument
