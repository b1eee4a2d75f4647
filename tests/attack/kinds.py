"""Every kind of file that we write and read again: how to write one, how to use it, and how to seal an altered one.

`test_each_writer_is_attacked` fails for a module that writes files and is neither here nor in `REPORTS`.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from safetensors.numpy import load as arrays_in
from safetensors.numpy import save as to_bytes

from agents import checkpoints, runs, training
from agents.baselines import rollout_classifier
from agents.baselines.rollout_classifier import RolloutClassifier, RolloutSettings
from agents.checkpoints import CheckpointError
from agents.ppo import PPO
from agents.rollouts import NotFiniteError
from agents.runs import RunError
from benchmarks.runner import kept, matrix, rows
from benchmarks.runner.experiments import RunnerError
from cost.files import save_json, sealed, sha256_of, sums_of
from cost.normalize import CostNormalizer, NormalizerError
from cost.profile import Profile, ProfileError, parse
from experts import bundle, continual, language, reference_models, tasks
from experts import checkpoints as networks
from experts.bundle import BundleError
from experts.compression import shared_core
from experts.compression.plan import Plan, PlanError, load_compressed
from experts.continual.running import RESULT
from experts.data import DataError
from experts.language import corpus, passages, pretraining
from experts.language.transformer import ModelSettings
from experts.layers import MoELayer
from experts.network import MoENetwork
from experts.offload import store
from experts.serving.export import export, load_exported
from experts.serving.runners import Source
from experts.training import TrainingSettings
from moe_envs.autorate import estimator, references

Reseal = Callable[[Path], bytes]
ENV, CACHE = "moe_envs:MoERouting-v0", "moe_envs:MoEExpertCache-v0"
SHORT: dict[str, Any] = {"total_timesteps": 512, "n_envs": 4, "n_steps": 32, "batch_size": 128, "n_epochs": 1}


@dataclass(frozen=True)
class Kind:
    """`write` makes one in an empty folder; `use` reads and uses it, and returns what it holds.

    `modules` write it; `refused` is what is raised for an altered one; `free` are files in which any text is allowed.
    """

    modules: tuple[str, ...]
    write: Callable[[Path], object]
    use: Callable[[Path], Any]
    refused: tuple[type[Exception], ...]
    reseal: Callable[[Path], None] = lambda path: None
    free: tuple[str, ...] = ()
    slow: bool = False  # to use: fewer cases in the short attack
    skipped: tuple[str, ...] = ("tensorboard", ".lock")

    def files(self, folder: Path) -> list[Path]:
        """The files of an artefact that are read again."""
        there = sorted(path for path in folder.rglob("*") if path.is_file())
        return [path for path in there if not any(each in str(path.relative_to(folder)) for each in self.skipped)]


def weights_of(agent: Any) -> Any:
    network = agent.network.weights if hasattr(agent, "network") else agent.policy.state_dict()
    return {name: np.asarray(value).tolist() for name, value in network.items()}


def tensors_of(model: torch.nn.Module) -> Any:
    return {name: value.tolist() for name, value in model.state_dict().items()}


def _checkpoint(folder: Path) -> None:
    PPO("MlpPolicy", "CartPole-v1", n_envs=2, n_steps=8, batch_size=8, n_epochs=1).learn(16).save(folder / "agent")


def _use_checkpoint(folder: Path) -> Any:
    agent = PPO.load(folder / "agent")
    agent.predict(np.zeros((1, 4), dtype=np.float32))
    PPO.resume(folder / "agent").learn(agent.num_timesteps + 16, reset_num_timesteps=False)
    return weights_of(agent), vars(agent.settings), agent.num_timesteps


def _classifier(folder: Path) -> None:
    settings = RolloutSettings(streams=6, networks=2)
    rollout_classifier.trained(CACHE, 0, settings, tokens=2, passages=1).save(folder / "classifier")


def _use_classifier(folder: Path) -> Any:
    rule = RolloutClassifier.load(folder / "classifier")
    env: Any = gymnasium.make_vec(CACHE, 2, vectorization_mode="vector_entry_point", tokens=2, passages=1).unwrapped
    rule.watch(env)
    observation, _ = env.reset(seed=0)
    logits = rule.logits_of(observation, observation[:, env.observation_layout["weights"].slice], np.zeros(2, np.int64))
    if not np.isfinite(logits).all():
        raise ArithmeticError(f"logits {logits}")
    env.step(rule.predict(observation)[0])
    return rule.thresholds.tolist(), [tensors_of(each) for each in rule.networks], rule.env_kwargs, rule.made


def _run(backend: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        before = training.validation_episodes
        training.validation_episodes = lambda env_id: 10  # a look is quick
        try:
            runs.train(ENV, "ppo", 3, folder / "run", {"bundle": "digits"}, SHORT, backend=backend)
        finally:
            training.validation_episodes = before

    return write


def _use_run(folder: Path) -> Any:
    policy: Any
    policy, config = runs.load(folder / "run")
    env = gymnasium.make_vec(config["env"], 2, vectorization_mode="vector_entry_point", **config["env_kwargs"])
    env.step(policy.predict(env.reset(seed=config["seed"])[0])[0])
    curve = training.load_curve(folder / "run")
    return weights_of(policy), config, runs.episodes(folder / "run").to_numpy().tolist(), curve


def row(seed: int, value: float = 0.5) -> rows.Row:
    job = matrix.Job("tau", "one", {"a": 1}, seed, "all")
    about: dict[str, Any] = {"config_hash": job.key, **job._asdict(), "commit": None, "fingerprint": {}, "versions": {}}
    return rows.Row.made(metrics={"value": value, "list": [1, 2.5]}, measured={"s": 1.0}, attempts=1, **about)


def _rows(folder: Path) -> None:
    for seed in range(4):
        rows.append(folder / "raw.jsonl", row(seed))


def _use_rows(folder: Path) -> Any:
    found = rows.read(folder / "raw.jsonl")
    if not found:
        raise RunnerError("raw.jsonl holds no rows")
    return [each.model_dump() for each in found]


def _seal_rows(path: Path) -> None:
    found = []
    for line in path.read_text().splitlines():
        content = json.loads(line)
        content.pop("sha256", None)
        key = [content.get(name) for name in ("experiment", "setup", "arguments", "seed", "split")]
        content["config_hash"] = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        found.append(json.dumps(content | {"sha256": digest}))
    path.write_text("\n".join(found) + "\n")


def inputs(count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.integers(3, size=count)
    return generator.normal(size=(count, 6)) + labels[:, None], labels


def build(folder: Path, count: int = 200) -> None:
    """A small bundle with a profile, in place of one that may be there."""
    from experts.reference_bundles import Shipped
    from experts.zoo import ASSETS

    class Three(Shipped):
        def model_dump(self, *, mode: str) -> dict[str, Any]:
            content = super().model_dump(mode=mode)
            return content | {"operations": dict(list(content["operations"].items())[:3])}

    profile = Three(ASSETS / "digits" / "profile.json")
    bundle.build("small", *inputs(count), settings=TrainingSettings(widths=(2, 3, 4), epochs=1, batch_size=32),
                 profile=lambda model, inputs: profile, folder=folder, overwrite=True, progress=False)  # fmt: skip


def _use_bundle(folder: Path) -> Any:
    found = bundle.load(folder / "small")
    env = gymnasium.make(ENV, bundle=str(folder / "small"), batch_size=4)
    env.reset(seed=0)
    _, reward, *_ = env.step(0)
    if not np.isfinite(reward):  # type: ignore[arg-type]
        raise AssertionError("the reward is not finite")
    tables = [getattr(found.split(name), table).tolist() for name in bundle.SPLITS for table in vars(found.split(name))]
    return tensors_of(found.model()), found.metadata, found.profile, tables


def _seal_bundle(path: Path) -> None:
    members = {each.name: each.read_bytes() for each in path.parent.iterdir() if each.name != "SHA256SUMS"}
    (path.parent / "SHA256SUMS").write_bytes(sums_of(members))


def _seal_checkpoint(path: Path) -> None:
    """Seal a folder of `agents.checkpoints` again; its arrays may have been altered, too."""
    folder = path.parent
    text = (folder / "manifest.json").read_bytes()
    content = json.loads(text[:-66] if text[-66:-65] == b"\n" and text.endswith(b"\n") else text)
    for arrays in folder.glob("arrays-*.safetensors"):
        content["arrays"]["sha256"] = hashlib.sha256(arrays.read_bytes()).hexdigest()
    (folder / "manifest.json").write_bytes(checkpoints._seal(json.dumps(content).encode()))


def _seal_run(path: Path) -> None:
    if path.name in ("run.json", "validation.json"):
        return _seal_json(path)
    run = path.parent if path.parent.name != "best" else path.parent.parent
    if path.parent.name == "best":
        _seal_checkpoint(path)
    config = json.loads((run / "run.json").read_text())
    weights = run / "policy.safetensors"
    weights = weights if weights.exists() else run / "best" / "manifest.json"
    config["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    config["episodes_sha256"] = hashlib.sha256((run / "episodes.csv").read_bytes()).hexdigest()
    config.pop("sha256")
    return save_json(run / "run.json", config)


def _seal_json(path: Path) -> None:
    content = json.loads(path.read_text())
    content.pop("sha256", None)
    save_json(path, content)


def _seal_arrays(path: Path) -> None:
    raw = path.read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__", {})
    arrays = arrays_in(raw)
    path.write_bytes(to_bytes(arrays, sealed(arrays, metadata.get("settings", ""))))


def _profile(folder: Path) -> None:
    parse(bundle.load("digits").profile, "digits").save(folder / "profile.json")


def _use_profile(folder: Path) -> Any:
    profile = Profile.load(folder / "profile.json", any_machine=True)
    costs = [profile.cost(name, 4) for name in profile.operations]
    if not np.isfinite([[each.time, each.memory, each.energy] for each in costs]).all():
        raise AssertionError("a cost is not finite")
    return profile.model_dump(mode="json")


def _normalizer(folder: Path) -> None:
    made = CostNormalizer(("reward/cost", "cost/time"), reservoir=128)
    made(np.random.default_rng(0).random((50, 2)))
    made.save(folder / "normalizer.json")


def _use_normalizer(folder: Path) -> Any:
    found = CostNormalizer.load(folder / "normalizer.json")
    if not np.isfinite(found(np.full((2, len(found.names)), 0.5))).all():
        raise AssertionError("a normalised cost is not finite")
    return CostNormalizer.load(folder / "normalizer.json").state_dict()


def _model() -> Any:
    return reference_models.load("digits-mlp")


def _compressed(folder: Path) -> None:
    plan = Plan.of(_model(), 1)
    plan.save(folder / "plan.json")
    (folder / "model.safetensors").write_bytes(plan.compress(_model())[0])


def _use_plan(folder: Path) -> Any:
    plan = Plan.load(folder / "plan.json")
    plan.check(_model())
    return plan.levels, tensors_of(load_compressed(folder / "model.safetensors", _model()))


def _network(folder: Path) -> None:
    networks.save_model(MoENetwork(6, 3, d_model=8, d_ff=4, num_experts=3), folder / "network.safetensors")


def _core(folder: Path) -> None:
    weights = np.random.default_rng(0).normal(size=(3, 6, 5)).astype(np.float32)
    (folder / "core.safetensors").write_bytes(shared_core.fit(weights, 2, steps=1).to_bytes())


def _use_core(folder: Path) -> Any:
    found = shared_core.SharedCore.from_bytes((folder / "core.safetensors").read_bytes()).weights()
    if not np.isfinite(found).all():
        raise AssertionError("a weight is not finite")
    return found.tolist()


def _experts(folder: Path) -> None:
    torch.manual_seed(0)
    store.write(folder / "experts.bin", [MoELayer(4, 3, 2) for _ in range(2)], "bfloat16")


def _use_experts(folder: Path) -> Any:
    with store.ExpertFile(folder / "experts.bin") as opened:
        opened.check()
        own = opened.header
        places = [(layer, expert) for layer in range(own.layers) for expert in range(own.num_experts)]
        return [[weight.tolist() for weight in opened.weights(opened.read(*place))] for place in places]


def _exported(folder: Path) -> None:
    torch.manual_seed(0)
    examples = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    export(Source(torch.nn.Linear(3, 2), examples, {"kind": "classifier"}), folder / "exported", "onnx")


def _use_exported(folder: Path) -> Any:
    return load_exported(folder / "exported").run(np.ones((2, 3), dtype=np.float32)).tolist()


def with_header(raw: bytes, content: Any = None) -> tuple[Any, bytes]:
    """The header of a file of experts, and the file with another one under a right seal."""
    magic, numbers, rest = raw.split(b"\n", 2)
    length, begin = int(numbers.split()[0]), len(magic) + len(numbers) + 2
    said = rest[:length] if content is None else json.dumps(content).encode()
    head = magic + b"\n%d %s\n" % (len(said), sha256_of(said).encode()) + said
    body = raw[-(-(begin + length) // store.ALIGNED) * store.ALIGNED :]
    return json.loads(rest[:length]), head + bytes(-len(head) % store.ALIGNED) + body


def _use_task(folder: Path) -> Any:
    before, tasks.FOLDER = tasks.FOLDER, folder
    try:
        return [hashlib.sha256(tasks._verified(name)).hexdigest() for name in tasks.SHIPPED]
    finally:
        tasks.FOLDER = before


def _tasks(folder: Path) -> None:
    for path in tasks.FOLDER.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


def _own_task(folder: Path) -> None:
    tasks.build("mine", *inputs())
    shutil.copy(tasks._own_folder() / "mine.safetensors", folder)


def _use_own_task(folder: Path) -> Any:
    tasks._own_folder().mkdir(parents=True, exist_ok=True)  # each test has its own
    shutil.copy(folder / "mine.safetensors", tasks._own_folder())
    found = tasks.load("mine")
    env: Any = gymnasium.make("moe_envs:MoEMetaOpt-v0", task="mine", target=0.9, max_actions=2)
    env.reset(seed=0)
    if not np.isfinite(env.step(env.action_space.sample())[1]):
        raise AssertionError("the reward is not finite")
    return found.sha256


def _references(folder: Path) -> None:
    shutil.copy(references.shipped_path("digits"), folder / "references.safetensors")


def _use_references(folder: Path) -> Any:
    path, settings = folder / "references.safetensors", references._settings(tasks.load("digits"), 10, 32)
    found = references._read.__wrapped__(path, settings)
    return {split: [each.tolist() for each in found[split]] for split in found}


def _estimator(folder: Path) -> None:
    estimator.save(estimator.load(), folder / "estimator.json")


def _use_estimator(folder: Path) -> Any:
    before, estimator.PATH = estimator.PATH, folder / "estimator.json"
    try:
        found = estimator.load.__wrapped__()
    finally:
        estimator.PATH = before
    estimates = found(np.ones((4, 30), dtype=np.float32), np.arange(4))
    if not np.isfinite(estimates).all():
        raise AssertionError("an estimate is not finite")
    return [each.tolist() for each in found]


def _matrix(folder: Path) -> None:
    content = matrix.Matrix(experiment="tau", seeds=[1, 2], settings={"model": "digits-mlp"})
    (folder / "matrix.json").write_text(content.model_dump_json(indent=1))


def _use_matrix(folder: Path) -> Any:
    return matrix.jobs_of(matrix.trusted_matrix(folder / "matrix.json"))


def _seal_sums(path: Path) -> None:
    members = {name: (path.parent / name).read_bytes() for name in ("metadata.json", "model.safetensors",
               "tokenizer.json")}  # fmt: skip
    (path.parent / "SHA256SUMS").write_bytes(sums_of(members))


def _corpus(folder: Path) -> Path:
    for number in range(60):
        place = folder / "corpus" / "one"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.txt").write_text(f"one {number}: " + "some words " * 40)
    return folder / "corpus"


def _pretrain(folder: Path, steps: int = 2) -> None:
    size = ModelSettings(vocabulary=300, d_model=16, layers=2, heads=2, num_experts=3, d_ff=8, k=2, context=16)
    settings = pretraining.PretrainingSettings(steps=steps, batch_size=2, parts=1, threads=1, precision="float32")
    pretraining.train(_corpus(folder), folder / "run", size, settings, save_every=1, validate_every=1)


def _language(folder: Path) -> None:
    _pretrain(folder)
    model = language.load(folder / "run" / pretraining.MODEL)
    shutil.rmtree(folder / "run")
    model.save(folder / "model", "int8")
    passages.save(folder / "model", corpus.read(folder / "corpus"), model.tokenizer)
    shutil.rmtree(folder / "corpus")


def _use_language(folder: Path) -> Any:
    model = language.load(folder / "model")
    loss = model.bits_per_byte("some words")
    if not np.isfinite(loss):
        raise AssertionError("the loss is not finite")
    found = passages.load(folder / "model", "test")
    return tensors_of(model.network), model.metadata, model.encode("some words"), found.ids.tolist(), found.domains


def _use_pretraining(folder: Path) -> Any:
    found = pretraining.resume(folder / "run")
    return tensors_of(found.network), found.metadata["training"]


def _stream() -> continual.Stream:
    random = np.random.default_rng(0)
    inputs, labels = random.random((20, 3), dtype=np.float32), random.integers(2, size=20)
    task = {split: (inputs, labels) for split in ("train", "validation", "test")}
    return continual.Stream.of_arrays("tiny", [task, task])


def learn_stream(folder: Path) -> continual.Result:
    strategy = continual.Strategy(
        replay=continual.Replay("balanced", 6, batch_size=4, logits=0.1), epochs=1, batch_size=8, distillation=0.1,
        regularizer=continual.Penalty(samples=2), expansion=continual.Expansion(3, 1.0, merge=True),
    )  # fmt: skip
    shape = continual.NetworkShape(trunk="linear", d_model=4, d_ff=2, num_experts=2)
    return continual.run(_stream(), strategy, shape=shape, folder=folder / "run")


def _use_learned(folder: Path) -> Any:
    kept = continual.Result.load(folder / "run" / RESULT)
    predicted = continual.predictor(folder / "run")(np.zeros((2, 3), np.float32)).tolist()
    again = learn_stream(folder)
    return again.accuracy.tolist(), kept.accuracy.tolist(), kept.bytes, kept.seconds, kept.tasks, predicted


def _solve_stream(folder: Path) -> continual.Result:
    shape = continual.NetworkShape(trunk="linear", d_model=4, d_ff=2, num_experts=2)
    return continual.ClosedForm("ridge", "trunk").run(_stream(), shape=shape, folder=folder / "run")


def _use_solved(folder: Path) -> Any:
    return continual.predictor(folder / "run")(np.zeros((2, 3), np.float32)).tolist()


KINDS: dict[str, Kind] = {
    "classifier": Kind(
        ("agents.checkpoints",), _classifier, _use_classifier, (CheckpointError, ValueError), _seal_checkpoint,
    ),
    "checkpoint": Kind(
        ("agents.checkpoints", "agents.resumable", "agents.episodes"), _checkpoint, _use_checkpoint,
        (CheckpointError, ValueError, NotFiniteError), _seal_checkpoint,
    ),
    "own run": Kind(
        ("agents.runs", "agents.training"), _run("own"), _use_run, (RunError, CheckpointError, ValueError), _seal_run,
        skipped=("tensorboard", ".lock", "checkpoint-", "started.json"), slow=True,
    ),
    "SB3's run": Kind(
        ("agents.runs",), _run("sb3"), _use_run, (RunError, CheckpointError, ValueError), _seal_run,
        skipped=("tensorboard", ".lock", "started.json"), slow=True,
    ),
    "rows": Kind(
        ("benchmarks.runner.rows",), _rows, _use_rows,
        (RunnerError,), _seal_rows,
    ),
    "matrix": Kind(("benchmarks.runner.runner",), _matrix, _use_matrix, (RunnerError,), free=("matrix.json",)),
    "kept search": Kind(
        ("benchmarks.runner.kept",), lambda folder: kept.found_once(folder / "kept.json", lambda: {"rate": 0.5}),
        lambda folder: kept.found_once(folder / "kept.json", lambda: {"rate": 0.5}), (RunnerError,), _seal_json,
    ),
    "bundle": Kind(
        ("experts.bundle.build",), build, _use_bundle, (BundleError, ProfileError, ValueError), _seal_bundle,
    ),
    "profile": Kind(("cost.profile",), _profile, _use_profile, (ProfileError,), _seal_json),
    "normaliser": Kind(("cost.normalize",), _normalizer, _use_normalizer, (NormalizerError,), _seal_json),
    "plan and compressed model": Kind(
        ("experts.compression.plan", "experts.compression.workbench"), _compressed, _use_plan, (PlanError,),
        lambda path: _seal_json(path) if path.suffix == ".json" else None,
    ),
    "reference model": Kind(
        ("experts.reference_models",), lambda folder: reference_models.save(_model(), "digits-mlp",
        folder / "model.safetensors"),
        lambda folder: (lambda found: (tensors_of(found[0]),
        found[1]))(reference_models.read(folder / "model.safetensors")),
        (DataError,), _seal_arrays,
    ),
    "network": Kind(
        ("experts.checkpoints",), _network,
        lambda folder: tensors_of(networks.load_model(folder / "network.safetensors", MoENetwork)), (DataError,),
        _seal_arrays,
    ),
    "shared core": Kind(("experts.compression.shared_core",), _core, _use_core, (ValueError,), _seal_arrays),
    "task": Kind(("experts.tasks",), _tasks, _use_task, (DataError,), skipped=("autorate", ".profile")),
    "own task": Kind(("experts.tasks",), _own_task, _use_own_task, (DataError, ValueError), _seal_arrays),
    "references": Kind(("moe_envs.autorate.references",), _references, _use_references, (DataError,), _seal_arrays),
    "language model": Kind(
        ("experts.language.model", "experts.language.passages"), _language, _use_language,
        (DataError,), lambda path: _seal_arrays(path) if path.name == passages.FILE else _seal_sums(path),
    ),
    "training of a language model": Kind(
        ("experts.language.pretraining",), _pretrain, _use_pretraining, (DataError, ValueError),
        lambda path: _seal_json(path) if path.suffix == ".json" else _seal_arrays(path),
        skipped=("corpus", "monitor", "curve.csv", "model/", ".lock"), slow=True,
    ),
    "file of experts": Kind(("experts.offload.store",), _experts, _use_experts, (DataError,)),
    "exported model": Kind(("experts.serving.export",), _exported, _use_exported, (DataError,), _seal_json),
    "stream of tasks": Kind(
        ("experts.continual.checkpoint", "experts.continual.result"), learn_stream, _use_learned, (DataError,),
        lambda path: _seal_json(path) if path.suffix == ".json" else _seal_arrays(path),
    ),
    "closed form of a stream": Kind(
        ("experts.continual.closed_form",), _solve_stream, _use_solved, (DataError,), _seal_arrays,
    ),
    "estimator": Kind(("moe_envs.autorate.estimator",), _estimator, _use_estimator, (DataError,), _seal_json),
}  # fmt: skip
# Modules whose files are for people, or are made anew where they are damaged: no number of ours is read from them.
REPORTS = {
    "agents.tuning", "benchmarks.cli.benchmark", "benchmarks.cli.bundle", "benchmarks.cli.compare",
    "benchmarks.cli.terminal", "benchmarks.experiments.monitor.report", "cost.logbook", "benchmarks.speed.dacbench",
    "cost.monitor", "experts.language.debian",
    "experts.compression.sensitivity", "benchmarks.experiments.load",
}  # fmt: skip
