"""Plans scored from caches: the scores of a model that is decompressed and run, whatever was asked before."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experts.compression import LEVELS
from experts.compression.evaluation import PlanEvaluator
from experts.compression.pieces import importance, pieces
from experts.compression.plan import Plan
from experts.model import ConvMoEClassifier, MoEClassifier

N = 200


def conv() -> ConvMoEClassifier:
    torch.manual_seed(0)
    return ConvMoEClassifier(64, 10, channels=(4, 6), widths=(8,) * 3, trunk=12).eval()


def plain() -> MoEClassifier:
    torch.manual_seed(0)
    return MoEClassifier(64, 10, widths=(8, 4, 16)).eval()


@pytest.mark.parametrize("make", [conv, plain])
@pytest.mark.parametrize("cache_bytes", [2**30, 1])
def test_scores_are_those_of_the_decompressed_model(make: type, cache_bytes: int) -> None:
    model, generator = make(), np.random.default_rng(0)
    inputs, labels = generator.normal(size=(N, 64)).astype(np.float32), generator.integers(10, size=N)
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
    known = importance(model, x)
    evaluator = PlanEvaluator(model, inputs, labels, known, cache_bytes=cache_bytes)
    plan = [0] * len(pieces(model))
    for _ in range(12):
        plan[generator.integers(len(plan))] = int(generator.integers(len(LEVELS)))
        score = evaluator(plan)
        with torch.no_grad():
            logits = Plan.of(model, plan).apply(model, known)(x)
        assert score.accuracy == pytest.approx(float((logits.argmax(1) == y).float().mean()), abs=1e-6)
        assert score.loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)


def test_a_plan_is_evaluated_once() -> None:
    generator = np.random.default_rng(0)
    inputs, labels = generator.normal(size=(N, 64)).astype(np.float32), generator.integers(10, size=N)
    evaluator = PlanEvaluator(conv(), inputs, labels)
    plan = [1] * len(evaluator.names)
    first = evaluator(plan)
    assert evaluator(plan) == first
    assert evaluator.evaluations == 1
    with pytest.raises(ValueError, match="2 levels for 10 matrices"):
        evaluator([1, 2])
