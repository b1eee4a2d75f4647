"""What can be exported: classifiers of bundles, reference models, language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from experts import bundle, language, reference_models
from experts.language import LanguageModel, passages
from experts.serving.runners import Source

TEXTS, TOKENS = 32, 64


def of_bundle(name: str | Path) -> Source:
    """The classifier of a bundle, routed by its own gate to the best two experts."""
    found = bundle.load(name)
    module: Any = found.model()
    about = {"kind": "classifier", "name": found.path.name, "sha256": found.sha256, "routing": "top-2 of its gate"}
    return Source(module, found.examples, about)


def of_reference_model(name: str) -> Source:
    """A reference model, as it is compressed."""
    module: Any = reference_models.load(name).eval()
    examples = np.asarray(reference_models.examples(name).inputs, dtype=np.float32)
    about = {"kind": "classifier", "name": name, "routing": "as trained"}
    return Source(module, examples, about)


def of_language(name: str | Path) -> Source:
    """A language model: ids `[N, T]` to logits `[N, T, V]`, without a cache."""
    model = language.load(str(name))
    about = {
        "kind": "language", "name": Path(name).name, "sha256": model.sha256,
        "routing": f"top-{model.settings.k} of {model.settings.num_experts} in each layer",
    }  # fmt: skip
    return Source(DenseLanguage(model).eval(), _examples(name, model), about, language=model)


def _examples(name: str | Path, model: LanguageModel) -> np.ndarray:
    """Passages that come with a model, else random tokens."""
    folder = language.find(str(name))
    if (folder / passages.FILE).exists():
        return passages.load(folder, "validation").ids[:TEXTS, :TOKENS]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.settings.vocabulary, (TEXTS, TOKENS), generator=generator).numpy()


class DenseLanguage(nn.Module):
    """A language model as a static graph: every expert runs on every token, those not chosen with weight 0."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        network, self.k = model.network, model.settings.k
        blocks: list[Any] = list(network.blocks)
        self.embedding, self.norm = network.embedding, network.norm
        self.frequencies = nn.Buffer(network.frequencies, persistent=False)
        self.attentions = nn.ModuleList(block.attention for block in blocks)
        self.attention_norms = nn.ModuleList(block.attention_norm for block in blocks)
        self.expert_norms = nn.ModuleList(block.expert_norm for block in blocks)
        self.gates = nn.ModuleList(block.moe.gate for block in blocks)
        self.w_in, self.w_out = (
            nn.ParameterList(
                nn.Parameter(torch.stack([getattr(expert, part).detach() for expert in block.moe.experts]), False)
                for block in blocks
            )
            for part in ("w_in", "w_out")
        )

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Logits `[B, T, V]`."""
        places_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand(ids_BT.shape)
        angles_BTF = places_BT[..., None] * self.frequencies
        turns = angles_BTF.cos()[:, None], angles_BTF.sin()[:, None]
        x_BTD = self.embedding(ids_BT)
        for layer, attention in enumerate(self.attentions):
            x_BTD = x_BTD + attention(self.attention_norms[layer](x_BTD), turns, places_BT, None)
            x_BTD = x_BTD + self._experts(layer, self.expert_norms[layer](x_BTD))
        return F.linear(self.norm(x_BTD), self.embedding.weight)

    def _experts(self, layer: int, x_BTD: torch.Tensor) -> torch.Tensor:
        logits_BTE = self.gates[layer](x_BTD)
        best = logits_BTE.topk(self.k, dim=-1)
        weights_BTE = torch.zeros_like(logits_BTE).scatter(-1, best.indices, best.values.softmax(-1))
        gate, up = torch.einsum("btd,efd->btef", x_BTD, self.w_in[layer]).chunk(2, dim=-1)
        active_BTEF = F.silu(gate) * up * weights_BTE[..., None]
        return torch.einsum("btef,edf->btd", active_BTEF, self.w_out[layer])
