"""A module of any shape as an `MoEModel`: where its trunk, gate, experts and head are, with a check that this is right.

Shape legend: B inputs, D width of an input, H width of an expert's output, E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from experts.model import combine
from experts.routers import mixing_weights, top_k

Head = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (h [B, D], mixed outputs [B, H]) -> class logits [B, C]
TOLERANCE = 1e-3  # of the logits' largest magnitude


class AdaptedMoE(nn.Module):
    """The parts of `module`, each the name of a submodule such as "encoder.norm" or a function.

    `trunk` computes `x -> h`, what the gate and the experts see, and `gate` `h -> [B, E]` logits. `experts`, a list or
    the name of one, compute `h -> [B, H]`, of any width. The outputs of the chosen experts are summed, weighted by the
    softmax of the gate over them; `head(h, mixed)` makes class logits of the sum, None where it already is these.

    `k` experts answer an input in the module itself. With `examples [n, ...]`, the logits are compared with the
    module's own; raises `ValueError` with the largest difference if they are not the same.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        trunk: str | Callable[[torch.Tensor], torch.Tensor],
        gate: str | Callable[[torch.Tensor], torch.Tensor],
        experts: str | list[nn.Module],
        head: Head | None = None,
        k: int = 2,
        examples: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.module, self.k = module.eval(), k
        self._trunk, self._gate = (_part(module, each) for each in (trunk, gate))
        found: Any = module.get_submodule(experts) if isinstance(experts, str) else experts
        self._experts, self.head = list(found), head
        if examples is not None:
            self.check(examples)

    @property
    def trunk(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """`x -> h`."""
        return self._trunk

    @property
    def gate(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """`h -> [B, E]`."""
        return self._gate

    @property
    def experts(self) -> list[nn.Module]:
        """The experts."""
        return self._experts

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        """Class logits `[B, C]` of the top-k gate."""
        h_BD = self.trunk(x_BD)
        gate_BE = self.gate(h_BD)
        members_BE = top_k(gate_BE, min(self.k, gate_BE.shape[1]))
        outputs_BEH = torch.stack([expert(h_BD) for expert in self.experts], dim=1)
        return self.answer(h_BD, gate_BE, outputs_BEH, members_BE)

    def answer(
        self, h_BD: torch.Tensor, gate_BE: torch.Tensor, outputs_BEH: torch.Tensor, members_BE: torch.Tensor
    ) -> torch.Tensor:
        """Class logits `[B, C]` of chosen experts."""
        mixed_BH = combine(outputs_BEH, mixing_weights(gate_BE, members_BE).nan_to_num(0.0), members_BE, None)
        return mixed_BH if self.head is None else self.head(h_BD, mixed_BH)

    @torch.no_grad()
    def check(self, examples: torch.Tensor) -> float:
        """Largest difference of the logits to the module's own; raises `ValueError` if it is not small."""
        wanted, found = self.module(examples), self(examples)
        wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        if wanted.shape != found.shape:
            raise ValueError(f"the parts give logits of {tuple(found.shape)}, the module {tuple(wanted.shape)}")
        error = float((wanted - found).abs().max())
        if error > TOLERANCE * float(wanted.abs().max().clamp_min(1.0)):
            raise ValueError(
                f"the parts give other logits than the module, by up to {error:.3g}: is k right, and does its head "
                "take the sum of the experts' outputs weighted by a softmax over the chosen?"
            )
        return error


def _part(module: nn.Module, part: str | Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return module.get_submodule(part) if isinstance(part, str) else part
