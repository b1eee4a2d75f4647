"""Continual learning: streams, the replay, penalties, growth, and whole runs with every mechanism."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from experts.continual import (
    ClosedForm,
    Expansion,
    NetworkShape,
    Penalty,
    Replay,
    Result,
    Strategy,
    Stream,
    StreamTask,
    load,
    run,
)
from experts.continual.buffer import Buffer
from experts.continual.inputs import Encoding, shifted
from experts.continual.learner import StreamLearner
from experts.continual.network import ContinualNetwork
from experts.continual.penalties import Importance, shared
from experts.data import DataError

SMALL = NetworkShape(trunk="linear", d_model=8, d_ff=4, num_experts=2, k=2)
QUICK = Strategy(epochs=1, batch_size=16, learning_rate=1e-2)
EVERYTHING = replace(
    QUICK, replay=Replay("balanced", 30, batch_size=8, logits=0.1), regularizer=Penalty("ewc", 1.0, samples=4),
    expansion=Expansion(3, similarity=1.0, merge=True), distillation=0.5, freezing=0.1, gate="domain", asymmetric=True,
    balance="sampling", shift=1, side=8, bits=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def blobs() -> Stream:
    """Four tasks of two Gaussian classes each in six dimensions."""
    random = np.random.default_rng(0)
    centres = 3 * random.standard_normal((8, 6))

    def drawn(task: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = random.integers(2, size=count)
        return (centres[2 * task + labels] + random.standard_normal((count, 6))).astype(np.float32), labels

    return Stream.of_arrays(
        "blobs",
        [{"train": drawn(task, 96), "validation": drawn(task, 40), "test": drawn(task, 40)} for task in range(4)],
    )


@pytest.fixture(scope="module")
def digits() -> Stream:
    """A tenth of split digits."""
    whole = load("split-digits")
    tasks = [
        {split: (x[::10] if split == "train" else x, (y[::10] if split == "train" else y) - 2 * number)
         for split, (x, y) in task.splits.items()}
        for number, task in enumerate(whole.tasks)
    ]  # fmt: skip
    return Stream.of_arrays("few digits", tasks)


# streams


@pytest.mark.parametrize("name", ["split-digits", "rotated-digits", "corrupted-digits"])
def test_shipped_streams_have_the_labels_of_their_scenario(name: str) -> None:
    stream = load(name)
    assert len(stream.tasks) == 5
    assert stream.shape == (1, 28, 28)
    assert stream.scenario == ("class" if name == "split-digits" else "domain")
    assert stream.num_classes == 10
    if stream.scenario == "class":
        assert [task.classes for task in stream.tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
        assert sum(len(task["train"][1]) for task in stream.tasks) == 1200
    else:
        assert all((task["test"][1] == stream.tasks[0]["test"][1]).all() for task in stream.tasks)
        assert not (stream.tasks[1]["test"][0] == stream.tasks[0]["test"][0]).all()


def test_an_order_of_classes_is_drawn_by_its_seed() -> None:
    assert load("split-digits", order=3).tasks[0].name == load("split-digits", order=3).tasks[0].name
    names = {task.name for seed in range(4) for task in load("split-digits", order=seed).tasks}
    assert len(names) > 5
    first = load("split-digits", order=3).tasks[0]
    shown = [int(digit) for digit in first.name.removeprefix("classes ").split(", ")]
    plain = load("split-digits")
    there = np.concatenate([task["test"][0] for task in plain.tasks])
    labels = np.concatenate([task["test"][1] for task in plain.tasks])
    inputs, own = first["test"]
    assert (inputs[own == 1].sum(0) == there[labels == shown[1]].sum(0)).all()


def test_a_domain_split_has_the_same_labels_in_all_tasks() -> None:
    stream = load("split-digits", "domain")
    assert {task.classes for task in stream.tasks} == {(0, 1)}
    with pytest.raises(ValueError, match="4, 3, 3 classes"):
        load("split-fashion-mnist-433", "domain")


@pytest.mark.parametrize(
    ("name", "scenario", "message"),
    [("splt", None, "unknown stream 'splt'"), ("rotated-digits", "class", "scenario is 'domain'"),
     ("split-digits", "clas", "not one of class, task, domain")],
)  # fmt: skip
def test_streams_that_there_are_not(name: str, scenario: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(name, scenario)


def test_own_data_is_checked() -> None:
    x, y = np.zeros((4, 3), np.float32), np.array([0, 1, 0, 1])
    one = {"train": (x, y), "validation": (x, y), "test": (x, y)}
    assert Stream.of_arrays("own", [one, one]).num_classes == 4
    with pytest.raises(ValueError, match="float32"):
        Stream.of_arrays("own", [one | {"train": (x.astype(np.float64), y)}])
    with pytest.raises(ValueError, match="not finite"):
        Stream.of_arrays("own", [one | {"test": (x + np.nan, y)}])
    with pytest.raises(ValueError, match="4 inputs and 3 labels"):
        Stream.of_arrays("own", [one | {"test": (x, y[:3])}])
    with pytest.raises(ValueError, match="share a class"):
        Stream("own", "class", Stream.of_arrays("own", [one, one], "domain").tasks)


def test_cifar_and_tiny_imagenet_are_read_from_a_folder(tmp_path: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    tens, hundreds = "cifar-10-batches-bin", "cifar-100-binary"
    files = {f"{tens}/data_batch_1.bin": (1, 20), f"{tens}/test_batch.bin": (1, 5),
             f"{hundreds}/train.bin": (2, 20), f"{hundreds}/test.bin": (2, 5)}  # fmt: skip
    for path, (labels, count) in files.items():
        rows = random.integers(256, size=(count, labels + 3072), dtype=np.uint8)
        rows[:, :labels] = random.integers(10, size=(count, labels))
        (tmp_path / path).parent.mkdir(exist_ok=True)
        rows.tofile(tmp_path / path)
    pictures = tmp_path / "tiny-imagenet-200"
    for word in ("n01", "n02"):
        folder = pictures / "train" / word / "images"
        folder.mkdir(parents=True)
        for number in range(3):
            Image.fromarray(random.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (pictures / "val" / "images").mkdir(parents=True)
    Image.fromarray(np.full((64, 64), 7, np.uint8)).save(pictures / "val" / "images" / "0.png")
    (pictures / "val" / "val_annotations.txt").write_text("0.png\tn02\t0\t0\t1\t1\n")
    stream = load("cifar10-cifar100-tinyimagenet", folder=tmp_path)
    assert [task.name for task in stream.tasks] == ["CIFAR-10", "CIFAR-100", "TinyImageNet"]
    assert stream.shape == (3, 32, 32)
    images, labels = stream.tasks[2]["test"]
    assert (images == 7).all()
    assert labels.tolist() == [stream.tasks[2].classes[1]]
    (tmp_path / "cifar-100-binary/test.bin").write_bytes(b"short")
    with pytest.raises(DataError, match="cut short"):
        load("cifar10-cifar100-tinyimagenet", folder=tmp_path)
    with pytest.raises(DataError, match="binary versions"):
        load("cifar10-cifar100-tinyimagenet")


# replay


def filled(kind: Any, size: int, labels: list[int], seed: int = 0, parts: int = 3) -> Buffer:
    buffer, random = Buffer(Replay(kind, size), 10), np.random.default_rng(seed)
    for part in np.array_split(np.arange(len(labels)), parts):
        rows = part.astype(np.float32)[:, None]
        buffer.add(rows, np.array(labels)[part], 0, random)
    return buffer


def test_fifo_keeps_the_last() -> None:
    buffer = filled("fifo", 4, [0] * 11)
    assert sorted(buffer.rows[:, 0].tolist()) == [7, 8, 9, 10]


def test_a_reservoir_is_a_uniform_sample() -> None:
    kept = np.zeros(40)
    for seed in range(600):
        kept[filled("reservoir", 8, [0] * 40, seed).rows[:, 0].astype(int)] += 1
    expected = 600 * 8 / 40
    assert abs(kept - expected).max() < 5 * (expected * 0.8) ** 0.5
    statistic = ((kept - expected) ** 2 / (expected * 0.8)).sum()
    assert statistic < 80  # chi-square of 39 degrees of freedom: 73 is the 0.1 % point


@given(st.lists(st.integers(0, 9), min_size=1, max_size=120), st.integers(1, 20), st.integers(0, 5))
def test_a_balanced_replay_keeps_classes_even(labels: list[int], size: int, seed: int) -> None:
    buffer = filled("balanced", size, labels, seed)
    assert len(buffer) == min(size, len(labels))
    kept, there = (np.bincount(each, minlength=10) for each in (buffer.labels[: len(buffer)], labels))
    assert (kept <= there).all()
    assert (np.array(labels)[buffer.rows[: len(buffer), 0].astype(int)] == buffer.labels[: len(buffer)]).all()
    wanting = kept < there  # a class with inputs left over has as many places as any other, but for one
    assert not wanting.any() or kept[wanting].min() >= kept.max() - 1


def test_bytes_are_those_of_the_arrays() -> None:
    buffer = Buffer(Replay("fifo", 5, logits=1.0), 10)
    rows = Encoding((1, 28, 28), side=14, bits=4).encode(np.zeros((7, 1, 28, 28), np.uint8))
    buffer.add(rows, np.zeros(7, int), 2, np.random.default_rng(0), np.ones((7, 4), np.float32))
    assert buffer.nbytes == 5 * (98 + 2 + 2 + 4 * 10)
    assert np.isnan(buffer.logits[:, 4:]).all()
    assert (buffer.logits[:, :4] == 1).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_images_are_stored_with_few_bits(bits: int) -> None:
    images = np.random.default_rng(0).integers(256, size=(5, 3, 9, 9), dtype=np.uint8)
    encoding = Encoding((3, 9, 9), bits=bits)
    rows = encoding.encode(images)
    assert rows.shape == (5, -(-3 * 81 * bits // 8))
    error = np.abs(encoding.decode(rows).numpy() - images / 255).max()
    assert error <= 0.5 / (2**bits - 1) + 1e-3


def test_a_shift_moves_images_whole() -> None:
    x = torch.zeros(200, 1, 5, 5)
    x[:, :, 2, 2] = 1
    moved = shifted(x, 1, np.random.default_rng(0))
    assert (moved.sum((1, 2, 3)) == 1).all()
    assert (moved.sum(0)[0] > 0).sum() == 9


# growth


def network(num_experts: int = 3, k: int = 2, graph: str | None = None) -> ContinualNetwork:
    torch.manual_seed(0)
    shape = NetworkShape(trunk="linear", d_model=8, d_ff=4, num_experts=num_experts, k=k, graph=graph)
    made = ContinualNetwork((6,), 4, shape)
    made.add_task(torch.ones(8))
    return made


@pytest.mark.parametrize("graph", [None, "weighted", "sum", "conv"])
def test_outputs_stay_until_a_new_expert_is_opened(graph: str | None) -> None:
    made, x = network(graph=graph), torch.randn(50, 6)
    before, _ = made(x)
    expert = made.add_expert()
    made.add_classes(6)
    after, statistics = made(x)
    assert torch.equal(before, after[:, :4])
    assert after.shape == (50, 6)
    assert float(statistics.load[expert]) == 0
    if graph is not None:
        assert made.moe.graph.edges.shape == (4, 4)  # type: ignore[union-attr]
    made.open(expert, x)
    logits, statistics = made(x)
    assert float(statistics.load[expert]) > 0.05
    assert logits.shape == (50, 6)


def test_experts_that_are_equal_merge_into_the_same_function() -> None:
    made, x = network(3, k=3, graph="weighted"), torch.randn(20, 6)
    with torch.no_grad():
        for own, other in zip(made.moe.experts[0].parameters(), made.moe.experts[2].parameters(), strict=True):
            other.copy_(own)
    assert float(made.likeness(x)[0, 2]) == pytest.approx(1, abs=1e-5)
    kept = [weights.clone() for weights in made.moe.experts[0].parameters()]
    made.merge(0, 2, torch.tensor([0.5, 0.2, 0.3]))
    assert made.num_experts == 2
    assert all(torch.allclose(a, b) for a, b in zip(kept, made.moe.experts[0].parameters(), strict=True))
    assert made.moe.graph.edges.shape == (2, 2)  # type: ignore[union-attr]
    assert made.gate_bias.shape == (2,)
    assert made.task_bias.shape == (1, 2)


def test_the_step_of_experts_of_earlier_tasks_is_scaled(blobs: Stream) -> None:
    """SGD without momentum's history: the first step of a slow expert is a tenth of that of a free one."""
    moved = {}
    for freezing in (1.0, 0.1):
        learner = StreamLearner(blobs, replace(QUICK, optimizer="sgd", freezing=freezing, learning_rate=0.1), 0, SMALL)
        learner.begin()
        learner.slow_E = np.array([True, False])
        learner.optimizer = learner.new_optimizer()
        before = [weights.detach().clone() for weights in learner.network.moe.experts.parameters()]
        learner._learn(next(learner._batches()))
        after = learner.network.moe.experts.parameters()
        moved[freezing] = [new.detach() - old for new, old in zip(after, before, strict=True)]
    assert torch.allclose(moved[0.1][0], 0.1 * moved[1.0][0], atol=1e-6)
    assert torch.allclose(moved[0.1][2], moved[1.0][2])
    assert float(moved[1.0][0].abs().max()) > 1e-4


# penalties


@pytest.mark.parametrize("kind", ["ewc", "mas"])
def test_importance_is_positive_where_weights_matter(kind: Any) -> None:
    made, x = network(), torch.randn(30, 6)
    x[:, 0] = 0  # the first input does not matter
    importance = Importance(Penalty(kind, 2.0, samples=30))
    importance.update(made, x, None, torch.Generator().manual_seed(0))
    found = importance.importance
    assert not any(name.startswith("moe.experts") for name in found)
    assert float(found["trunk.1.weight"][:, 0].abs().max()) == 0
    assert float(found["trunk.1.weight"][:, 1:].mean()) > 0
    assert float(found["moe.gate.weight"].mean()) > 0
    assert (found["head.weight"] >= 0).all()
    assert float(importance.loss(made).detach()) == 0
    with torch.no_grad():
        made.head.bias += 0.5
    by_hand = 0.5 * 2.0 * float((found["head.bias"] * 0.25).sum())
    assert float(importance.loss(made).detach()) == pytest.approx(by_hand, rel=1e-5)


def test_the_fisher_information_of_a_linear_softmax_by_hand() -> None:
    """Without experts' outputs the bias of the head has the information p (1 - p)."""
    made, x = network(), torch.randn(4000, 6)
    with torch.no_grad():
        for expert in made.moe.experts:
            expert.w_out.zero_()  # type: ignore[operator, union-attr]
        nn.init.zeros_(made.head.weight)
        made.head.bias.copy_(torch.tensor([0.5, 0.3, 0.15, 0.05]).log())
    importance = Importance(Penalty("ewc", 1.0, samples=1500))
    importance.update(made, x, None, torch.Generator().manual_seed(0))
    share = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert torch.allclose(importance.importance["head.bias"], share * (1 - share), atol=0.03)


# runs


def test_a_stream_is_learned_and_not_forgotten_with_replay(blobs: Stream) -> None:
    plain, kept = (run(blobs, replace(QUICK, epochs=8, replay=replay), 0, shape=SMALL) for replay in (None, Replay()))
    assert plain.final < 0.5
    assert plain.forgetting > 0.6
    assert kept.final > 0.75
    assert kept.forgetting < 0.3
    assert np.isnan(kept.accuracy[0, 1:]).all()
    assert kept.online[0] > 0.55


@pytest.mark.parametrize(
    "change",
    [
        {"regularizer": Penalty("ewc", 1.0, samples=8)}, {"regularizer": Penalty("mas", 0.1, samples=8)},
        {"distillation": 1.0}, {"replay": Replay("fifo", 40)}, {"replay": Replay("balanced", 40, logits=0.2)},
        {"replay": Replay("reservoir", 40, weight=0.0, logits=0.5)}, {"replay": Replay("balanced", 40, only=True)},
        {"replay": Replay("balanced", None, only=True)}, {"expansion": Expansion(4, 1.0), "freezing": 0.0},
        {"expansion": Expansion(2, 1.0, merge=True)}, {"expansion": Expansion(6, -1.0), "freezing": 0.1},
        {"gate": "domain"}, {"asymmetric": True, "replay": Replay(size=40)}, {"balance": "weights"},
        {"balance": "sampling", "replay": Replay(size=40)}, {"optimizer": "sgd", "learning_rate": 0.05},
        {"precision": "bfloat16"}, {"all_classes": True, "replay": Replay(size=40, logits=0.5)},
    ],
    ids=str,
)  # fmt: skip
def test_each_mechanism_alone_repeats(blobs: Stream, change: dict[str, Any]) -> None:
    strategy = replace(QUICK, **change)
    first, again = (run(blobs, strategy, 3, shape=SMALL, split="validation") for _ in range(2))
    np.testing.assert_array_equal(first.accuracy, again.accuracy)
    assert first.summary() | {"seconds": 0} == again.summary() | {"seconds": 0}
    assert (first.accuracy[np.tril_indices(4)] >= 0).all()


def test_expansion_adds_up_to_its_budget_and_uses_similar_experts_again(blobs: Stream) -> None:
    grown = run(blobs, replace(QUICK, expansion=Expansion(4, 1.0)), 0, shape=SMALL)
    assert grown.experts == [2, 3, 4, 4]
    merged = run(blobs, replace(QUICK, expansion=Expansion(3, 1.0, merge=True)), 0, shape=SMALL)
    assert merged.experts == [2, 3, 3, 3]
    same = run(blobs, replace(QUICK, expansion=Expansion(8, -1.0)), 0, shape=SMALL)
    assert same.experts == [2, 2, 2, 2]
    assert grown.parameters[2] > grown.parameters[1] > same.parameters[1]


def test_a_known_task_is_easier(blobs: Stream) -> None:
    given = Stream(blobs.name, "task", blobs.tasks)
    strategy = replace(QUICK, epochs=3, gate="task", replay=Replay(size=30))
    found, unknown = run(given, strategy, 0, shape=SMALL), run(blobs, replace(strategy, gate="input"), 0, shape=SMALL)
    assert found.final > max(0.9, unknown.final)


def test_transfer_compares_with_a_new_network(blobs: Stream) -> None:
    found = run(blobs, QUICK, 0, shape=SMALL, scratch=True)
    assert found.scratch is not None
    assert found.scratch.shape == (4, 2)
    assert found.scratch[0, 0] == pytest.approx(found.online[0])  # the first task starts from scratch itself
    assert found.transfer == pytest.approx(float((found.online[1:] - found.scratch[1:, 0]).mean()))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"gate": "task"}, "needs the task at test"), ({"side": 8}, "side=8"), ({"bits": 4}, "bits=4 is for images")],
)
def test_strategies_that_do_not_fit_the_stream(blobs: Stream, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(blobs, replace(QUICK, **change), shape=SMALL)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Replay("lifo"), lambda: Replay(size=0), lambda: Replay(size=None), lambda: Replay(weight=float("nan")),
        lambda: Penalty("l2"), lambda: Penalty(weight=-1), lambda: Expansion(0), lambda: Expansion(similarity=2),
        lambda: Strategy(bits=3), lambda: Strategy(freezing=2), lambda: Strategy(balance="sampling"),
        lambda: Strategy(gate="x"), lambda: NetworkShape(k=5), lambda: ClosedForm("lda"), lambda: ClosedForm(size=0),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="="):
        make()


def test_a_control_chooses_for_each_task_but_not_what_is_kept(blobs: Stream) -> None:
    strategy, seen = replace(QUICK, replay=Replay(size=20)), list[int]()

    def control(task: int, given: Strategy) -> Strategy:
        seen.append(task)
        return replace(given, learning_rate=0.0) if task else given

    found = run(blobs, strategy, 0, shape=SMALL, control=control)
    assert seen == [0, 1, 2, 3]
    assert found.final < 0.5  # only the first task was learned
    with pytest.raises(ValueError, match="changed what is kept in task 0"):
        run(blobs, strategy, shape=SMALL, control=lambda task, given: replace(given, replay=Replay(size=21)))


class Killed(Exception):
    """Stands for the end of a process between two steps."""


@pytest.mark.parametrize("strategy", [EVERYTHING, replace(QUICK, replay=Replay("balanced", 20, only=True))])
def test_an_interrupted_run_goes_on_exactly(digits: Stream, strategy: Strategy, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    whole = run(digits, strategy, 5, shape=SMALL)
    learn, steps = StreamLearner._learn, [0]

    def stops(self: StreamLearner, batch: Any) -> None:
        steps[0] += 1
        if steps[0] % 4 == 0:
            raise Killed
        learn(self, batch)

    monkeypatch.setattr(StreamLearner, "_learn", stops)
    for _ in range(40):
        try:
            found = run(digits, strategy, 5, shape=SMALL, folder=tmp_path, save_every=1)
            break
        except Killed:
            continue
    np.testing.assert_array_equal(found.accuracy, whole.accuracy)
    np.testing.assert_array_equal(found.online, whole.online)
    assert steps[0] > 8
    again = Result.load(tmp_path / "result.json")
    np.testing.assert_array_equal(again.accuracy, whole.accuracy)
    with pytest.raises(DataError, match="another stream, strategy, seed or shape"):
        run(digits, strategy, 6, shape=SMALL, folder=tmp_path)


# closed forms


@pytest.mark.parametrize("kind", ["slda", "ridge"])
@pytest.mark.parametrize("features", ["pixels", "pca", "random", "trunk"])
def test_closed_forms_learn_the_stream(blobs: Stream, kind: Any, features: Any) -> None:
    found = ClosedForm(kind, features, 40).run(blobs, strategy=QUICK, shape=SMALL)
    assert found.final > (0.5 if features in ("pca", "trunk") else 0.8)
    assert found.bytes == found.bytes_after[0]
    assert np.isnan(found.online).all()


def test_a_closed_form_does_not_depend_on_the_order(blobs: Stream) -> None:
    turned = Stream("turned", "class", blobs.tasks[::-1])
    found = [ClosedForm("ridge", "pixels").run(stream).accuracy[-1] for stream in (blobs, turned)]
    np.testing.assert_allclose(found[0], found[1][::-1])


def test_discriminant_analysis_equals_scikit_learn(blobs: Stream) -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, y = (np.concatenate(parts) for parts in zip(*(task["train"] for task in blobs.tasks), strict=True))
    peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1, priors=np.full(8, 1 / 8)).fit(x, y)
    wanted = [float((peer.predict(task["test"][0]) == task["test"][1]).mean()) for task in blobs.tasks]
    found = ClosedForm("slda", "pixels", shrinkage=0.1).run(blobs).accuracy[-1]
    np.testing.assert_allclose(found, wanted, atol=0.026)  # one input of 40: theirs scales features first


def test_a_known_task_helps_a_closed_form(blobs: Stream) -> None:
    given = Stream(blobs.name, "task", blobs.tasks)
    found = ClosedForm("slda", "trunk").run(given, strategy=QUICK, shape=SMALL)
    assert found.final > ClosedForm("slda", "trunk").run(blobs, strategy=QUICK, shape=SMALL).final


def test_images_go_through_convolutions_and_components(digits: Stream) -> None:
    strategy = replace(QUICK, epochs=6, replay=Replay(size=60))
    for stream in (digits, digits.pca(12)):
        found = run(stream, strategy, shape=NetworkShape(d_model=16, d_ff=8))
        assert found.final > 0.4  # of ten classes, from 24 images each
    assert digits.pca(12).shape == (12,)
    with pytest.raises(ValueError, match="trunk='conv' is for images"):
        run(digits.pca(12), strategy, shape=NetworkShape(trunk="conv"))


@pytest.mark.needs_data
def test_data_sets_follow_each_other() -> None:
    stream = load("digits-fashion-mnist")
    assert [task.classes for task in stream.tasks] == [tuple(range(10)), tuple(range(10, 15)), tuple(range(15, 20))]
    assert load("split-fashion-mnist-433").classes_until(1) == 7


# what a reviewer found


def test_test_data_do_not_steer_what_is_learned(blobs: Stream) -> None:
    """Merging weights experts by their load; that is of training inputs."""
    turned = [StreamTask(task.name, task.classes, {**task.splits, "test": (-task["test"][0], task["test"][1])})
              for task in blobs.tasks]  # fmt: skip
    strategy = replace(QUICK, expansion=Expansion(3, 1.0, merge=True), replay=Replay(size=20))
    found = [run(stream, strategy, 1, shape=SMALL).online for stream in (blobs, Stream("x", "class", tuple(turned)))]
    np.testing.assert_array_equal(*found)


def test_online_accuracy_is_of_the_first_epoch(blobs: Stream) -> None:
    learner = StreamLearner(blobs, replace(QUICK, epochs=3), 0, SMALL)
    seen = list[int]()
    learner.curves.count = lambda logits, labels: seen.append(len(labels))  # type: ignore[method-assign]
    learner.run(lambda share, text: None, lambda: None, 1000)
    assert sum(seen) == sum(len(task["train"][1]) for task in blobs.tasks)


def test_a_small_task_is_kept_whole() -> None:
    random = np.random.default_rng(0)
    task = {
        split: (random.random((23, 3), dtype=np.float32), np.arange(23) % 2)
        for split in ("train", "validation", "test")
    }
    stream = Stream.of_arrays("small", [task, task])
    learner = StreamLearner(stream, replace(QUICK, replay=Replay("balanced", None, only=True)), 0, SMALL)
    learner.run(lambda share, text: None, lambda: None, 1000)
    assert learner.buffer is not None
    assert len(learner.buffer) == 46


def test_a_control_that_changed_is_refused_and_one_with_a_state_goes_on(blobs: Stream, tmp_path: Path) -> None:
    def rising() -> Any:
        count = [0]

        def control(task: int, given: Strategy) -> Strategy:
            count[0] += 1
            return replace(given, learning_rate=0.01 * count[0])

        return control

    def stops(share: float, text: str) -> None:
        if share >= 0.5:
            raise Killed

    whole = run(blobs, QUICK, 0, shape=SMALL, control=rising())
    with pytest.raises(Killed):
        run(blobs, QUICK, 0, shape=SMALL, control=rising(), folder=tmp_path, progress=stops)
    with pytest.raises(DataError, match="chose other strategies"):
        run(blobs, QUICK, 0, shape=SMALL, folder=tmp_path)
    found = run(blobs, QUICK, 0, shape=SMALL, control=rising(), folder=tmp_path)
    np.testing.assert_array_equal(found.accuracy, whole.accuracy)


def test_a_control_cannot_give_the_task_away(blobs: Stream) -> None:
    with pytest.raises(ValueError, match="needs the task at test"):
        run(blobs, QUICK, shape=SMALL, control=lambda task, given: replace(given, gate="task"))


@pytest.mark.parametrize("kind", ["ewc", "mas"])
def test_a_merged_expert_is_held_where_it_is(kind: Any) -> None:
    made, x = network(), torch.randn(20, 6)
    importance = Importance(Penalty(kind, 1.0, samples=10))
    importance.update(made, x, torch.ones(20, 1), torch.Generator().manual_seed(0))
    both = importance.importance["gate_bias"][0] + importance.importance["gate_bias"][2]
    made.merge(0, 2, torch.tensor([0.3, 0.4, 0.3]))
    importance.merge(0, 2, made)
    assert float(importance.loss(made).detach()) == 0
    assert torch.allclose(importance.importance["gate_bias"][0], both)
    assert importance.importance["task_bias"].shape == (1, 2)


def test_a_known_task_holds_only_its_own_head(blobs: Stream) -> None:
    given = Stream(blobs.name, "task", blobs.tasks[:2])
    learner = StreamLearner(given, replace(QUICK, regularizer=Penalty(samples=30)), 0, SMALL)
    learner.run(lambda share, text: None, lambda: None, 1000)
    assert learner.importance is not None
    alone = StreamLearner(
        Stream("x", "task", blobs.tasks[:1]), replace(QUICK, regularizer=Penalty(samples=30)), 0, SMALL
    )
    alone.run(lambda share, text: None, lambda: None, 1000)
    assert alone.importance is not None
    first, both = (each.importance.importance["head.bias"] for each in (alone, learner))  # type: ignore[union-attr]
    assert torch.allclose(both[:2], first)


def test_one_input_of_each_class_has_a_closed_form() -> None:
    x, y = np.zeros((2, 3), np.float32), np.array([0, 1])
    stream = Stream.of_arrays("one", [dict.fromkeys(("train", "validation", "test"), (x, y))])
    for kind in ("slda", "ridge"):
        assert ClosedForm(kind, "pixels").run(stream).final == 0.5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y[:, None]), "whole numbers"), (lambda x, y: (x, y + 0.5), "whole numbers"),
        (lambda x, y: (np.zeros((4, 1, 8, 12), np.uint8), y), "must be square"),
    ],
)  # fmt: skip
def test_data_that_would_be_misread_are_refused(change: Any, message: str) -> None:
    splits = dict.fromkeys(
        ("train", "validation", "test"), change(np.zeros((4, 3), np.float32), np.array([0, 1, 0, 1]))
    )
    with pytest.raises(ValueError, match=message):
        Stream.of_arrays("own", [splits])


def test_what_a_replay_alone_would_ignore_is_refused() -> None:
    only = Replay(only=True)
    for change in ({"freezing": 0.1}, {"asymmetric": True}, {"balance": "weights"}, {"gate": "domain"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            Strategy(replay=only, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budget=1"):
        run(load("split-digits"), Strategy(expansion=Expansion(1)), shape=SMALL)
    with pytest.raises(ValueError, match="have one order"):
        load("digits-fashion-mnist", order=1)


def test_forgetting_by_hand() -> None:
    accuracy = np.array([[0.9, np.nan, np.nan], [0.5, 0.8, np.nan], [0.6, 0.3, 0.7]])
    found = Result(
        "x", "class", 0, "test", ["a", "b", "c"], accuracy, np.ones(3), np.ones((3, 1)), [1], [2], [1], [0.0]
    )
    assert found.forgetting == pytest.approx((0.3 + 0.5) / 2)
    assert found.final == pytest.approx(1.6 / 3)
    assert found.average == pytest.approx((0.9 + 0.65 + 1.6 / 3) / 3)
    assert found.transfer is None


def test_only_shared_weights_are_held() -> None:
    assert {name.split(".")[0] for name in shared(network(graph="weighted"))} == {
        "trunk", "norm", "moe", "gate_bias", "task_bias", "head",
    }  # fmt: skip
    assert not any("experts" in name or "graph" in name for name in shared(network(graph="weighted")))
