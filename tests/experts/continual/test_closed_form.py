"""Closed forms: equal to scikit-learn, independent of the order."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experts.continual import (
    ClosedForm,
    NetworkShape,
    Replay,
    Stream,
    load,
    predictor,
    run,
)
from experts.data import DataError
from tests.experts.continual.conftest import QUICK, SMALL


@pytest.mark.parametrize("kind", ["slda", "ridge"])
@pytest.mark.parametrize("features", ["pixels", "pca", "random", "trunk"])
def test_closed_forms_learn_the_stream(blobs: Stream, kind: Any, features: Any) -> None:
    found = ClosedForm(kind, features, 40).run(blobs, strategy=QUICK, shape=SMALL)
    assert found.final > (0.5 if features in ("pca", "trunk") else 0.8)
    assert found.bytes == found.bytes_after[0]
    assert np.isnan(found.online).all()


@pytest.mark.parametrize("features", ["pixels", "pca", "random", "trunk"])
def test_a_closed_form_is_kept(blobs: Stream, features: Any, tmp_path: Path) -> None:
    found = ClosedForm("ridge", features, 20).run(blobs, strategy=QUICK, shape=SMALL, folder=tmp_path)
    predict = predictor(tmp_path)
    again = [float((predict(x).argmax(1) == y).mean()) for x, y in (task["test"] for task in blobs.tasks)]
    assert again == found.accuracy[-1].tolist()
    with pytest.raises(DataError, match="holds a closed form"):
        run(blobs, QUICK, shape=SMALL, folder=tmp_path)


def test_a_closed_form_does_not_take_the_place_of_a_network(blobs: Stream, tmp_path: Path) -> None:
    run(blobs, QUICK, shape=SMALL, folder=tmp_path)
    with pytest.raises(DataError, match="holds the run of a network"):
        ClosedForm("ridge", "pixels").run(blobs, folder=tmp_path)


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


def test_one_input_of_each_class_has_a_closed_form() -> None:
    x, y = np.zeros((2, 3), np.float32), np.array([0, 1])
    stream = Stream.of_arrays("one", [dict.fromkeys(("train", "validation", "test"), (x, y))])
    for kind in ("slda", "ridge"):
        assert ClosedForm(kind, "pixels").run(stream).final == 0.5  # type: ignore[arg-type]
