"""Bundles of more experts than all subsets can be tabulated of: outcomes of single experts and pairs."""

import json

import numpy as np
import pytest
import torch

from cost.profile import measure_experts
from experts import bundle, data, model
from experts.bundle import Bundle, BundleError, subsets, tabulate
from experts.training import TrainingSettings


def test_all_subsets_up_to_ten_experts_then_singles_and_pairs() -> None:
    assert subsets.tabulated(3).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert len(subsets.tabulated(10)) == 1024
    codes = subsets.tabulated(11)
    assert len(codes) == 1 + 11 + 55
    assert codes[:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert subsets.members(codes, 11).sum(1).max() == 2


def test_outcomes_are_the_model_s_own_answers(twelve: Bundle) -> None:
    inputs, labels = data.load("digits")["test"]
    split, own = twelve.split("test"), twelve.model()
    gate, outputs = model.tabulate(own, torch.from_numpy(inputs))
    codes = subsets.tabulated(12)
    outcomes = np.unpackbits(split.outcomes, axis=1, count=79, bitorder="little")
    assert not outcomes[:, 0].any()
    for column, code in enumerate(codes.tolist()):
        if code:
            members = (torch.tensor(code) >> torch.arange(12) & 1).bool().expand(len(labels), 12)
            correct = model.mix(gate, outputs, members).argmax(1).numpy() == labels
            assert (outcomes[:, column] == correct).mean() > 0.997  # ties of rounding apart
    np.testing.assert_array_equal(split.singles, outcomes[:, np.searchsorted(codes, 1 << np.arange(12))])
    top_2 = (1 << np.argsort(-split.gate_logits, axis=1, kind="stable")[:, :2]).sum(1)
    right = outcomes[np.arange(len(labels)), np.searchsorted(codes, top_2)].mean()
    assert right == pytest.approx(twelve.metadata["accuracy"]["test/top-2"], abs=3e-3)


@pytest.mark.parametrize("experts", [3, 10, 11])
def test_both_ways_to_tabulate_agree_with_a_sum_by_hand(experts: int) -> None:
    generator = np.random.default_rng(0)
    gate, outputs = generator.normal(size=(40, experts)), generator.normal(size=(40, experts, 3))
    labels, codes = generator.integers(3, size=40), subsets.tabulated(experts)
    right = np.zeros((40, len(codes)), dtype=np.uint8)
    for column, code in enumerate(codes.tolist()):
        chosen = [expert for expert in range(experts) if code >> expert & 1]
        if chosen:
            mixed = (np.exp(gate)[:, chosen, None] * outputs[:, chosen]).sum(1)
            right[:, column] = mixed.argmax(1) == labels
    wanted = np.packbits(right, axis=1, bitorder="little")
    np.testing.assert_array_equal(tabulate.pack_outcomes(gate, outputs, labels), wanted)

    def answer(rows: slice, members: torch.Tensor) -> torch.Tensor:
        parts = (torch.from_numpy(each[rows]).expand(len(members), *each[rows].shape) for each in (gate, outputs))
        found = model.mix(*(part.flatten(0, 1) for part in parts), members.flatten(0, 1))  # type: ignore[call-arg]
        return found.unflatten(0, members.shape[:2])

    np.testing.assert_array_equal(tabulate.pack_outcomes_by(answer, experts, labels), wanted)


def test_more_than_32_experts_are_refused(twelve: Bundle) -> None:
    inputs, labels = np.random.default_rng(0).normal(size=(100, 4)), np.arange(100) % 2
    settings = TrainingSettings(widths=(1,) * 33, epochs=1)
    with pytest.raises(ValueError, match="33 experts: a bundle has at most 32"):
        bundle.build("wide", inputs, labels, settings=settings, profile=measure_experts, progress=False)
    about = json.loads(twelve.members["bundle.json"]) | {"num_experts": 33}
    with pytest.raises(BundleError, match="num_experts"):
        bundle.read._check_structure(Bundle(twelve.path, about, twelve.members))
