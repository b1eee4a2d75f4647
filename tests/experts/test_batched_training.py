"""Many trainings at once are as many alone, to the bit; each is torch's AdamW on torch's model."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experts.batched_training import BatchedTraining

K, B, D, C = 5, 32, 20, 7


def batches(steps: int, count: int = K) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    return generator.normal(size=(steps, count, B, D)).astype(np.float32), generator.integers(0, C, (steps, count, B))


def make(rows: list[int], **kwargs: int) -> BatchedTraining:
    """The trainings of these numbers."""
    training = BatchedTraining(len(rows), D, C, **kwargs)
    training.begin(np.arange(len(rows)), [np.random.default_rng(row) for row in rows])
    numbers = np.array(rows)[:, None]
    training.set(0.01 / (1 + numbers) * [1, 0.5], 0.1 * numbers * [1, 0.3])
    return training


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_training_is_torchs(top_k: int) -> None:
    training, (x, y) = make(list(range(K)), width=6, top_k=top_k), batches(40)
    models, optimizers = [training.module(row) for row in range(K)], []
    for row, model in enumerate(models):
        groups = (model.gate.parameters(), model.experts.parameters())
        settings = zip(groups, training.rates[row], training.decays[row], strict=True)
        optimizers.append(
            torch.optim.AdamW([{"params": [*p], "lr": float(lr), "weight_decay": float(wd)} for p, lr, wd in settings])
        )
    for step in range(40):
        found = training.step(x[step], y[step])
        for row, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            inputs, labels = torch.from_numpy(x[step, row]), torch.from_numpy(y[step, row])
            logits = model(inputs, top_k)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            if step == 20:
                gate, experts = (
                    torch.cat([p.grad.ravel() for p in part.parameters() if p.grad is not None]).norm().item()
                    for part in (model.gate, model.experts)
                )
                np.testing.assert_allclose(training.gradient_norms()[row], [gate, experts], rtol=1e-4)
                probabilities = model.gate(inputs).softmax(1).detach()
                entropy = -(probabilities * probabilities.log()).sum(1).mean()
                assert found.entropy[row] == pytest.approx(entropy.item(), rel=1e-4)
                right = (logits.argmax(1) == labels).float().mean().item()
                assert found.accuracy[row] == pytest.approx(right, abs=1.5 / B)  # a tie may be decided otherwise
                assert found.load[row].sum() == pytest.approx(top_k)
            optimizer.step()
            assert found.loss[row] == pytest.approx(loss.item(), abs=1e-5)
    for row, model in enumerate(models):
        for ours, theirs in zip(training.module(row).parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_training_does_not_depend_on_its_neighbours() -> None:
    x, y = batches(10)
    together, alone = make(list(range(K))), make([3])
    for step in range(10):
        found, single = together.step(x[step], y[step]), alone.step(x[step, 3:4], y[step, 3:4])
        assert found.loss[3] == single.loss[0]
    assert np.array_equal(together.weights[3], alone.weights[0])
    shared, own = together.evaluate(x[0, 0], y[0, 0]), alone.evaluate(x[0, :1], y[0, :1])
    assert shared.loss[3] == own.loss[0]
    assert np.array_equal(together.weight_norms()[3], alone.weight_norms()[0])
    assert np.array_equal(together.update_norms()[3], alone.update_norms()[0])


def test_a_narrow_training_is_one_of_that_width() -> None:
    x, y = batches(10, 2)
    wide = BatchedTraining(2, D, C, width=8)
    wide.begin(np.arange(2), [np.random.default_rng(0), np.random.default_rng(1)], np.array([8, 3]))
    wide.set(np.full((2, 2), 0.01), np.full((2, 2), 0.1))
    for step in range(10):
        wide.step(x[step], y[step])
    hidden = wide._of["into"][1][:, 4:].reshape(D, 4, 8)
    assert (hidden[:, :, 3:] == 0).all()
    assert (hidden[:, :, :3] != 0).all()
    assert (wide._of["out"][1].reshape(4, 8, C)[:, 3:] == 0).all()


def test_state_restore_and_pickle_go_on_alike() -> None:
    x, y = batches(6)
    training = make(list(range(K)))
    training.step(x[0], y[0])
    state, copy = training.state(), pickle.loads(pickle.dumps(training))
    wanted = [training.step(x[step], y[step]).loss for step in range(1, 6)]
    training.restore(state)
    for other in (training, copy):
        assert np.array_equal(wanted, [other.step(x[step], y[step]).loss for step in range(1, 6)])
    training.restore(state, np.array([False, True, False, False, False]))
    assert np.array_equal(training.weights[1], state["weights"][1])
    assert np.array_equal(training.weights[2], copy.weights[2])
    with pytest.raises(ValueError, match="top_k must be from 1 to 4"):
        make([0], top_k=5)


def test_a_training_by_sgd_with_fewer_experts_is_torchs() -> None:
    x, y = batches(20, 2)
    training = BatchedTraining(2, D, C, num_experts=4, width=6)
    generators, experts = [np.random.default_rng(row) for row in range(2)], np.array([1, 3])
    training.begin(np.arange(2), generators, experts=experts, sgd=np.array([True, True]))
    training.set(np.full((2, 2), 0.1), np.zeros((2, 2)))
    models = [training.module(row) for row in range(2)]
    for model, present in zip(models, experts.tolist(), strict=True):
        with torch.no_grad():
            model.gate.bias[present:] = -1e9
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    for step in range(20):
        found = training.step(x[step], y[step])
        for row, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            loss = F.cross_entropy(model(torch.from_numpy(x[step, row])), torch.from_numpy(y[step, row]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert found.loss[row] == pytest.approx(loss.item(), abs=1e-5)
    absent = np.repeat(np.arange(4) >= 1, 6)
    assert not training.module(0).experts.hidden.weight[torch.from_numpy(absent)].any()
