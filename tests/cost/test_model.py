"""The cost model: affine look-ups, and one number relative to a reference."""

import numpy as np
import pytest

from cost.model import Cost, CostModel, RelativeCost


def test_cost_model_by_hand() -> None:
    model = CostModel(np.array([[1.0, 10, 100], [2, 20, 200]]), np.array([[0.1, 1, 10], [0.2, 2, 20]]))
    assert model.cost(1, 0) == Cost()
    assert model.cost(1, 3) == Cost(2 + 0.2 * 3, 20 + 2 * 3, 200 + 20 * 3)
    np.testing.assert_allclose(model.batch(np.array([[0, 3], [2, 1]]))[:, 0], [2.6, 1.2 + 2.2])
    fixed, slope = model.subsets()
    np.testing.assert_allclose(fixed[:, 0], [0, 1, 2, 3])
    np.testing.assert_allclose(slope[3], [0.3, 3, 30])


def test_relative_cost_is_one_for_the_reference() -> None:
    relative = RelativeCost(Cost(2, 4, 8), Cost(0.5, 0.25, 0.25))
    assert relative(2.0, 4.0, 8.0) == 1
    assert relative(4.0, 0.0, 0.0) == 1
    np.testing.assert_array_equal(relative(np.array([2.0, 0]), np.array([4.0, 4]), np.array([8.0, 0])), [1, 0.25])
    for reference, weights in (
        (Cost(0, 1, 1), Cost(1, 1, 1)),
        (Cost(1, 1, 1), Cost()),
        (Cost(1, 1, 1), Cost(-1, 3, 3)),
    ):
        with pytest.raises(ValueError, match="0"):
            RelativeCost(reference, weights)
