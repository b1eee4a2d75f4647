"""Bundles: built from arrays or from a model of one's own, whole or refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from cost.profile import measure_experts
from experts import bundle, data, reference_bundles, zoo
from experts.bundle import BundleError, tabulate
from experts.training import TrainingSettings

QUICK = TrainingSettings(widths=(2, 3, 4), epochs=2, batch_size=32)
MEMBERS = ["bundle.json", "model.safetensors", "profile.json", "rl_train.safetensors", "SHA256SUMS", "test.safetensors"]
MEMBERS += ["validation.safetensors"]


class OwnMoE(nn.Module):
    """A user's module: trunk, gate, experts of different kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Tanh()
        self.gate = nn.Linear(6, 2)
        self.experts = nn.ModuleList([nn.Linear(6, 3), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))])


def arrays(count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.integers(3, size=count)
    return generator.normal(size=(count, 2, 3)) + labels[:, None, None], labels


@pytest.fixture
def digits_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(zoo.ASSETS / "digits", tmp_path / "digits"))


def test_built_from_arrays_it_drives_the_environment() -> None:
    built = bundle.build("mine", *arrays(), settings=QUICK, progress=False)
    assert zoo.names() == ["digits", "fashion-mnist", "mine"]
    env = gymnasium.make("moe_envs:MoERouting-v0", bundle="mine", split="validation")
    env.reset(seed=0)
    assert env.action_space == gymnasium.spaces.Discrete(3)
    quality = [env.step(2)[4]["reward/quality"] for _ in range(32)]
    assert set(quality) <= {0, 1 / 32}
    assert bundle.load("mine").sha256 == built.sha256 == bundle.load(built.path).sha256


def test_built_from_a_model_of_ones_own() -> None:
    inputs, labels = arrays()
    with pytest.raises(ValueError, match="measure_experts"):
        bundle.build("own", inputs, labels, model=OwnMoE())
    model = OwnMoE()
    built = bundle.build("own", inputs, labels, model=model, profile=measure_experts)
    gymnasium.make("moe_envs:MoERouting-v0", bundle="own").reset(seed=0)
    with pytest.raises(ValueError, match="YourModule"):
        built.model()
    again = built.model(OwnMoE())
    assert torch.equal(again.gate(torch.ones(1, 6)), model.gate(torch.ones(1, 6)))


def test_without_epochs_it_trains_until_a_linear_model_is_no_better(recwarn: pytest.WarningsRecorder) -> None:
    inputs, labels = arrays(400)
    built = bundle.build("mine", 1000 * inputs + 7, labels, progress=False)
    accuracy = built.metadata["accuracy"]
    assert accuracy["rl_train/top-2"] > accuracy["rl_train/linear"] - 0.03
    assert not len(recwarn)
    with pytest.warns(UserWarning, match="a linear model is better than this mixture of experts"):
        bundle.build("few", inputs, labels, settings=QUICK, progress=False)


def test_estimates_are_calibrated_and_leave_an_input_s_own_outcome_out() -> None:
    """Outcomes at random, 0.8 and 0.3: the estimates know the means only, also of the inputs they are fitted on."""
    from experts.bundle.estimates import Estimator

    generator = np.random.default_rng(0)
    points, gate = generator.normal(size=(600, 4)), generator.normal(size=(600, 2))
    outcomes = (generator.random((600, 2)) < [0.8, 0.3]).astype(np.uint8)
    estimator, of_known = Estimator.fit(points, gate, outcomes, generator.integers(3, size=600))
    np.testing.assert_allclose(of_known.mean(0), outcomes.mean(0), atol=0.02)
    assert np.abs([np.corrcoef(of_known[:, e], outcomes[:, e])[0, 1] for e in (0, 1)]).max() < 0.15
    new = estimator.estimates(generator.normal(size=(200, 4)), generator.normal(size=(200, 2)))
    assert new.std(0).max() < 0.1
    np.testing.assert_allclose(new.mean(0), [0.8, 0.3], atol=0.06)


def test_the_batch_tells_what_its_inputs_are() -> None:
    """An input without features is right at expert c if its class is c; a batch of one class gives it away."""
    from experts.bundle import context, estimates
    from experts.bundle.estimates import Estimator

    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=2000)
    points = (labels[:, None] + generator.normal(scale=2, size=(2000, 1))).astype(np.float32)
    outcomes = np.eye(2, dtype=np.uint8)[labels]
    estimator, of_known = Estimator.fit(points, np.zeros((2000, 2)), outcomes, labels)
    deck = np.stack([generator.choice((labels == k).nonzero()[0], 32) for k in [0] * 40 + [1] * 40])
    weights = {name: value.numpy() for name, value in estimator.context.items()}
    parts = of_known, np.full((2000, 2), 0.5), points, deck
    found = context.in_batches(weights, *parts, folds=estimator.fold_N.numpy())
    assert 0.45 < of_known[deck[:40], 0].mean() < 0.65 < found[:40, :, 0].mean()
    assert 0.45 < of_known[deck[40:], 1].mean() < 0.65 < found[40:, :, 1].mean()
    logits = generator.normal(size=(2000, 2), scale=20)  # many are beyond the bound of the gate
    centred = estimates.centred(torch.from_numpy(logits)).float()
    averaged = context.in_batches(weights, of_known, context.gate_parts(logits)[1], points, deck)
    seen = torch.from_numpy(of_known[deck]), centred[torch.from_numpy(deck)], torch.from_numpy(points[deck])
    np.testing.assert_allclose(estimator.in_batches(*seen).detach().numpy(), averaged, atol=1e-5)


def test_same_seed_same_bytes() -> None:
    first, second = (bundle.build(name, *arrays(), settings=QUICK, progress=False) for name in ("a", "b"))
    for member in ("model.safetensors", "rl_train.safetensors", "test.safetensors"):
        assert first.members[member] == second.members[member]


def test_outcomes_by_hand() -> None:
    """Two experts, two classes: expert 0 says class 0 weakly, expert 1 class 1 strongly; the gate prefers expert 0."""
    outputs = np.array([[[1.0, 0.0], [0.0, 3.0]]])
    for gate, correct in (([[1.0, 1.0]], 0b1100), ([[2.0, 0.0]], 0b0100)):
        # label 1: the mix is (1, 3) / 2 for an even gate, (.88, .36) for e^2 : 1
        packed = tabulate.pack_outcomes(np.array(gate), outputs, np.array([1]))
        assert packed.tolist() == [[correct]]
    assert tabulate.pack_outcomes(np.array([[2.0, 0.0]]), outputs, np.array([0])).tolist() == [[0b1010]]


def test_an_expert_far_below_the_gate_s_choice_still_answers_alone() -> None:
    outputs = np.array([[[1.0, 0.0], [0.0, 3.0]]])
    assert tabulate.pack_outcomes(np.array([[200.0, 0.0]]), outputs, np.array([1])).tolist() == [[0b0100]]


def test_a_model_is_tabulated_in_evaluation() -> None:
    class Dropping(OwnMoE):
        def __init__(self) -> None:
            super().__init__()
            self.experts[0] = nn.Sequential(nn.Dropout(0.9), nn.Linear(6, 3))

    model = Dropping().train()
    first, second = (
        bundle.build(name, *arrays(), model=model, profile=measure_experts).split("test") for name in ("a", "b")
    )
    np.testing.assert_array_equal(first.outputs, second.outputs)


def test_splits_must_be_disjoint_and_complete() -> None:
    rows = np.split(np.arange(200), 4)
    splits = dict(zip(("train", "rl_train", "validation", "test"), rows, strict=True))
    for wrong in ({**splits, "test": rows[0]}, {**splits, "test": rows[3] + 1}, {"train": rows[0]}):
        with pytest.raises(ValueError, match="splits must"):
            bundle.build("x", *arrays(), splits=wrong, settings=QUICK, progress=False)


def test_logits_are_kept_to_half_a_step() -> None:
    loaded = bundle.load("digits")
    split, model = loaded.split("validation"), loaded.model()
    single = split.logits.argmax(-1) == split.labels[:, None]
    exact = np.unpackbits(split.outcomes, axis=1, bitorder="little")[:, 1 << np.arange(8)]
    assert (single == exact).mean() > 0.98
    assert split.output_scale.item() < 0.5
    assert len(list(model.experts)) == 8


def test_features_of_new_inputs_are_the_tabulated_ones() -> None:
    from experts import data

    loaded = bundle.load("digits")
    inputs, _ = data.load("digits")["test"]
    # float16 rounds by at most 2^-11 of a value; processors add up products in another order, which may move it by one
    np.testing.assert_allclose(loaded.features(inputs), loaded.split("test").features, rtol=2**-10, atol=1e-5)


@pytest.mark.parametrize("member", MEMBERS)
def test_any_flipped_bit_is_found(digits_copy: Path, member: str) -> None:
    path = digits_copy / member
    original = path.read_bytes()
    generator = np.random.default_rng(0)
    for position in (0, len(original) - 1, *generator.integers(len(original), size=20)):
        damaged = bytearray(original)
        damaged[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(BundleError, match=str(digits_copy)):
            bundle.load(digits_copy)
        assert path.read_bytes() == bytes(damaged)
    path.write_bytes(original)
    bundle.load(digits_copy)


@pytest.mark.parametrize("member", MEMBERS)
def test_a_file_cut_short_or_absent_is_found(digits_copy: Path, member: str) -> None:
    path = digits_copy / member
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=str(digits_copy)):
        bundle.load(digits_copy)
    path.unlink()
    with pytest.raises(BundleError, match=member):
        bundle.load(digits_copy)
    assert not path.exists()


def test_another_format_and_a_foreign_folder_are_refused(digits_copy: Path, tmp_path: Path) -> None:
    import hashlib

    metadata = json.loads((digits_copy / "bundle.json").read_text()) | {"format": 1}
    (digits_copy / "bundle.json").write_text(json.dumps(metadata))
    sums = (digits_copy / "SHA256SUMS").read_text().splitlines()
    new = hashlib.sha256((digits_copy / "bundle.json").read_bytes()).hexdigest() + "  bundle.json"
    (digits_copy / "SHA256SUMS").write_text("".join(f"{new if 'bundle.json' in s else s}\n" for s in sums))
    with pytest.raises(BundleError, match=r"bundle.json is of format 1; this moe-envs reads format 2"):
        bundle.load(digits_copy)
    rewritten = json.loads((zoo.ASSETS / "digits" / "bundle.json").read_text()) | {"num_experts": 3}
    (digits_copy / "bundle.json").write_text(json.dumps(rewritten))
    new = hashlib.sha256((digits_copy / "bundle.json").read_bytes()).hexdigest() + "  bundle.json"
    (digits_copy / "SHA256SUMS").write_text("".join(f"{new if 'bundle.json' in s else s}\n" for s in sums))
    with pytest.raises(BundleError, match="not of 3 experts"):
        bundle.load(digits_copy)
    (tmp_path / "foreign").mkdir()
    with pytest.raises(BundleError, match="is not a bundle"):
        bundle.load(tmp_path / "foreign")
    with pytest.raises(BundleError, match="there are digits, fashion-mnist"):
        bundle.load("unknown")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../up"}, "letters, digits"),
        ({"name": "digits"}, "reference bundle"),
        ({"labels": np.zeros(3, dtype=int)}, "200 integers"),
        ({"labels": np.full(200, 0.5)}, "200 integers"),
        ({"inputs": np.full((200, 2), np.nan)}, "NaN"),
    ],
)
def test_wrong_arguments(change: dict[str, object], message: str, own_cache: Path) -> None:
    inputs, labels = arrays()
    with pytest.raises(ValueError, match=message):
        bundle.build(**({"name": "x", "inputs": inputs, "labels": labels, "progress": False} | change))  # type: ignore[arg-type]
    assert not own_cache.exists()


def test_an_existing_bundle_is_replaced_only_when_told() -> None:
    bundle.build("mine", *arrays(), settings=QUICK, progress=False)
    with pytest.raises(ValueError, match="overwrite=True"):
        bundle.build("mine", *arrays(), settings=QUICK, progress=False)
    replaced = bundle.build("mine", *arrays(220), settings=QUICK, progress=False, overwrite=True)
    assert sum(replaced.metadata["rows"].values()) == 220
    assert {path.name for path in zoo.user_folder().iterdir()} == {"mine", ".mine.lock"}


def test_a_model_is_loaded_without_a_random_number() -> None:
    before = torch.get_rng_state()
    bundle.load("digits").model()
    assert torch.equal(torch.get_rng_state(), before)


def test_shipped_bundles_are_small_disjoint_and_as_good_as_they_say() -> None:
    sizes = {path: path.stat().st_size for path in zoo.ASSETS.rglob("*") if path.is_file()}
    top = {path: path.relative_to(zoo.ASSETS).parts[0] for path in sizes}
    of_language = sum(size for path, size in sizes.items() if top[path] == "_language")
    of_bundles = sum(size for path, size in sizes.items() if not top[path].startswith("_"))
    assert of_language < 12_000_000
    assert of_bundles < 15_000_000
    assert sum(sizes.values()) - of_bundles - of_language < 9_000_000  # tasks, models to compress
    for name, floor in (("digits", 0.88), ("fashion-mnist", 0.8)):
        loaded = bundle.load(name)
        assert loaded.metadata["accuracy"]["test/top-2"] > floor
        split = loaded.split("test")
        top_2 = np.argsort(-split.gate_logits, axis=1, kind="stable")[:, :2]
        codes = (1 << top_2).sum(1)
        outcomes = np.unpackbits(split.outcomes, axis=1, bitorder="little")
        accuracy = outcomes[np.arange(len(codes)), codes].mean()
        assert accuracy == pytest.approx(loaded.metadata["accuracy"]["test/top-2"], abs=2e-3)


@pytest.mark.needs_data
def test_a_reference_bundle_that_is_not_shipped_is_made_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tenth of the images, as half a million outcomes of pools are tabulated."""
    whole = data.load("fashion-mnist")
    few = replace(whole, splits={split: rows[::10] for split, rows in whole.splits.items()})
    monkeypatch.setattr(reference_bundles.data, "load", lambda name: few)
    first, again = bundle.load("fashion-mnist-graph"), bundle.load("fashion-mnist-graph")
    assert first.sha256 == again.sha256
    assert [record.getMessage()[:19] for record in caplog.records] == ["training the bundle"]
    assert first.edges is not None
    others = ~np.eye(8, dtype=np.bool_)
    with pytest.raises(ValueError, match="reference bundle"):
        bundle.build("fashion-mnist-graph", *arrays())
    assert first.edges[others].std() > 1e-4  # learned, from 0.016 for each
    assert len(first.profile["operations"]) == 8  # type: ignore[index]
