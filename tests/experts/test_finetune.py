"""Training under a plan: the compressed model gets better, and the original and the plan's bytes stay."""

import copy

import numpy as np
import torch
import torch.nn.functional as F

from experts import data
from experts.compression.finetune import FinetuneSettings, finetune
from experts.compression.plan import Plan
from experts.model import MoEClassifier


def noisy(x: torch.Tensor) -> torch.Tensor:
    return x + 0.05 * torch.randn_like(x)


def trained() -> tuple[MoEClassifier, np.ndarray, np.ndarray]:
    torch.manual_seed(0)
    model, (inputs, labels) = MoEClassifier(64, 10, widths=(16,) * 3, trunk=24), data.load("digits")["rl_train"]
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), inputs, labels


def test_a_compressed_model_gets_better() -> None:
    model, inputs, labels = trained()
    before = copy.deepcopy(model.state_dict())
    x = torch.from_numpy(inputs)
    for level, share in ((7, 0.5), (9, 0.8), (11, 0.8)):  # each passes for 10 of the seeds 0 to 9
        plan = Plan.of(model, level)
        settings = FinetuneSettings(steps=120, batch_size=64, rate=3e-3, alpha=1.0, temperature=1.0)
        student = finetune(model, plan, inputs, labels, settings, augment=noisy, progress=False)
        torch.rand(level)
        again = finetune(model, plan, inputs, labels, settings, augment=noisy, progress=False)
        with torch.no_grad():
            wanted = model(x).log_softmax(1)
            found = [plan.apply(each)(x).log_softmax(1) for each in (model, student, again)]
            losses = [float(F.kl_div(each, wanted, log_target=True, reduction="batchmean")) for each in found]
        assert losses[1] < share * losses[0]
        assert losses[1] == losses[2]
        assert len(plan.compress(student)[0]) == plan.bytes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
