"""Whole runs: every mechanism, controls, interruptions, results."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
    predictor,
    run,
)
from experts.continual.learner import StreamLearner
from experts.data import DataError
from tests.experts.continual.conftest import EVERYTHING, QUICK, SMALL


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
        lambda: Replay(only=True, logits=0.1), lambda: Replay(weight=0), lambda: Replay(only=True, late=True),
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


INTERRUPTED = [
    EVERYTHING,
    replace(QUICK, replay=Replay("balanced", 20, only=True)),
    replace(QUICK, epochs=2, replay=Replay("reservoir", 20, logits=0.1, late=True, confident=0.4)),
    replace(QUICK, epochs=2, replay=Replay("fifo", 20, late=True)),
]


@pytest.mark.parametrize("strategy", INTERRUPTED)
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
    for _ in range(80):
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


def test_a_trained_network_predicts(digits: Stream, tmp_path: Path) -> None:
    found = run(digits, EVERYTHING, 1, shape=SMALL, folder=tmp_path)
    predict = predictor(tmp_path)
    right = [(predict(task["test"][0]).argmax(1) == task["test"][1]).mean() for task in digits.tasks]
    np.testing.assert_allclose(right, found.accuracy[-1])
    assert predict(digits.tasks[0]["test"][0][:0]).shape == (0, 10)
    for wrong in (np.zeros((2, 784), np.uint8), np.zeros((2, 3, 28, 28), np.uint8), np.zeros((2, 1, 28, 28))):
        with pytest.raises(ValueError, match="is needed"):
            predict(wrong)
    with pytest.raises(DataError, match="checkpoint"):
        predictor(tmp_path / "elsewhere")


def test_a_gate_that_needs_the_task_predicts_nothing_alone(blobs: Stream, tmp_path: Path) -> None:
    run(Stream("given", "task", blobs.tasks), replace(QUICK, gate="task"), shape=SMALL, folder=tmp_path)
    with pytest.raises(DataError, match="needs the task"):
        predictor(tmp_path)


def test_a_control_keeps_tasks_out_of_the_replay(blobs: Stream) -> None:
    def control(task: int, given: Strategy) -> Strategy:
        return replace(given, replay=replace(given.replay, keep=task != 1))  # type: ignore[type-var]

    learner = StreamLearner(blobs, replace(QUICK, replay=Replay("balanced", 400)), 0, SMALL, control=control)
    learner.run(lambda share, text: None, lambda: None, 1000)
    assert learner.buffer is not None
    assert set(learner.buffer.tasks[: len(learner.buffer)].tolist()) == {0, 2, 3}


def test_late_logits_are_of_a_network_that_has_learned(blobs: Stream) -> None:
    right = []
    for late in (False, True):
        replay = Replay("balanced", 400, logits=0.1, late=late)
        learner = StreamLearner(blobs, replace(QUICK, epochs=4, replay=replay), 0, SMALL)
        learner.run(lambda share, text: None, lambda: None, 1000)
        buffer = learner.buffer
        assert buffer is not None
        assert len(buffer) == sum(len(task["train"][1]) for task in blobs.tasks)
        right.append((np.nan_to_num(buffer.logits, nan=-9).argmax(1) == buffer.labels)[: len(buffer)].mean())
    assert right[1] > right[0] + 0.1


def test_a_confident_replay_leaves_wrong_labels_out(blobs: Stream) -> None:
    random, tasks = np.random.default_rng(1), list[StreamTask]()
    for task in blobs.tasks:
        x, y = task["train"]
        wrong = random.random(len(y)) < 0.3
        labels = np.where(wrong, sum(task.classes) - y, y)
        tasks.append(StreamTask(task.name, task.classes, {**task.splits, "train": (x, labels)}))
    noisy = Stream("noisy", "class", tuple(tasks))
    shares = []
    for confident in (0.0, 0.5):
        strategy = replace(QUICK, epochs=8, replay=Replay("balanced", 400, confident=confident))
        learner = StreamLearner(noisy, strategy, 0, SMALL)
        learner.run(lambda share, text: None, lambda: None, 1000)
        assert learner.buffer is not None
        kept = {row.tobytes(): label for row, label in zip(learner.buffer.rows, learner.buffer.labels, strict=True)}
        true = {row.tobytes(): label for task in blobs.tasks for row, label in zip(*task["train"], strict=True)}
        shares.append(np.mean([true[row] != label for row, label in kept.items() if row in true]))
        assert len(kept) > 200
    assert shares[0] > 0.2
    assert shares[1] < 0.1
