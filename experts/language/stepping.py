"""The language model run for many rows, a layer of a token at a time, so that each layer's experts can be decided.

What a row gets does not depend on the rows beside it, bit for bit: products are made for multiples of `TILE` rows, at
least `LEAST`, whose sums a BLAS orders alike (MKL adds in another order for 8 rows on processors with AVX-512), and
attention always spans the whole passage.

Shape legend: n rows, m rows in a layer, D width, H heads, F width of a head, S tokens of a passage, L layers, E
experts, K the most experts of a token, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from experts.language.transformer import Transformer, turned

TILE, LEAST = 8, 16


class LayerInputs(NamedTuple):
    """What is known before the experts of a layer run: their inputs `[m, D]`, and router logits `[m, E]`."""

    inputs: np.ndarray
    logits: np.ndarray


class Stepper:
    """Weights of a network in the form in which steps use them."""

    def __init__(self, network: Transformer, size: int) -> None:
        settings = network.settings
        if not 1 <= size <= settings.context:
            raise ValueError(f"passages of {size} tokens: must be from 1 to {settings.context}")
        self.settings, self.size, self.heads = settings, size, settings.heads
        self.embedding, self.norm = network.embedding.weight.detach(), network.norm
        self.blocks: list[Any] = list(network.blocks)
        with torch.inference_mode():
            parts = [(each.attention.query, each.attention.key, each.attention.value) for each in self.blocks]
            self.projections = [torch.cat([part.weight for part in three]) for three in parts]
            places = torch.arange(size, dtype=torch.float32)[:, None] * network.frequencies
            self.cosines, self.sines = places.cos(), places.sin()

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """The stream `[n, D]` of tokens before the first layer."""
        found: np.ndarray = self.embedding[torch.from_numpy(ids)].numpy()
        return found

    def attend(
        self, layer: int, stream: np.ndarray, places: np.ndarray, keys: np.ndarray, values: np.ndarray, rows: np.ndarray
    ) -> LayerInputs:
        """Run a layer up to its router for the streams `[m, D]`, which are changed in place.

        `keys` and `values [n, H, S, F]` are the layer's; `rows [m]`, which rise, and `places [m]` say where the tokens
        stand.
        """
        block = self.blocks[layer]
        with torch.inference_mode():
            x_MD, row, place = padded(torch.from_numpy(stream)), torch.from_numpy(rows), torch.from_numpy(places)
            attention, count = block.attention, len(rows)
            three = F.linear(block.attention_norm(x_MD), self.projections[layer])[:count]
            query, key, value = three.unflatten(-1, (3, self.heads, -1)).unbind(1)
            turns = self.cosines[place][:, None], self.sines[place][:, None]
            query = turned(attention.query_norm(query), turns)
            all_keys, all_values = torch.from_numpy(keys), torch.from_numpy(values)
            all_keys[row, :, place] = turned(attention.key_norm(key), turns)
            all_values[row, :, place] = value
            if count < len(keys):  # else rows are all rows, in order
                all_keys, all_values = all_keys[row], all_values[row]
            seen_m11S = (torch.arange(self.size) <= place[:, None])[:, None, None]
            found = F.scaled_dot_product_attention(query[:, :, None], all_keys, all_values, attn_mask=seen_m11S)
            x_MD[:count] += F.linear(padded(found.flatten(1)), attention.out.weight)[:count]
            stream[:] = x_MD[:count].numpy()
            inputs_MD = block.expert_norm(x_MD)
            logits_mE = F.linear(inputs_MD, block.moe.gate.weight)[:count]
        return LayerInputs(inputs_MD[:count].numpy(), logits_mE.numpy())

    def answer(self, layer: int, stream: np.ndarray, step: LayerInputs, k: np.ndarray) -> None:
        """Add to the streams `[m, D]` what the best `k [m]` experts of each row return."""
        with torch.inference_mode():
            logits_mK, best_mK = torch.from_numpy(step.logits).topk(self.settings.k, dim=-1)
            taken_mK = torch.arange(self.settings.k) < torch.from_numpy(k)[:, None]
            weights_mK = logits_mK.masked_fill(~taken_mK, -torch.inf).softmax(-1).nan_to_num(0.0)
            self._mix(layer, stream, step.inputs, best_mK, weights_mK, taken_mK)

    def mix(self, layer: int, stream: np.ndarray, inputs: np.ndarray, experts: np.ndarray, weights: np.ndarray) -> None:
        """Add to the streams `[m, D]` what `experts [m, K]` return for the inputs `[m, D]`, times their weights; those
        of weight 0 do not run."""
        with torch.inference_mode():
            weights_mK = torch.from_numpy(weights)
            self._mix(layer, stream, inputs, torch.from_numpy(experts), weights_mK, weights_mK > 0)

    def _mix(
        self, layer: int, stream: np.ndarray, inputs: np.ndarray, experts_mK: torch.Tensor, weights_mK: torch.Tensor,
        taken_mK: torch.Tensor,
    ) -> None:  # fmt: skip
        order, places_mK = self._sorted(experts_mK, taken_mK)
        inputs_mD = torch.from_numpy(inputs)
        rows_ND = torch.cat([inputs_mD, inputs_mD.new_zeros(1, inputs_mD.shape[1])])[order[0]]
        answers = [rows_ND.new_zeros(1, rows_ND.shape[1])]
        for expert, part in zip(order[1], rows_ND.split(order[2]), strict=True):
            own: Any = self.blocks[layer].moe.experts[expert]
            gate, up = F.linear(part, own.w_in).chunk(2, dim=-1)
            answers.append(F.linear(F.silu(gate) * up, own.w_out))
        found_mKD = torch.cat(answers)[places_mK] * weights_mK[..., None]
        stream += found_mKD.sum(1).numpy()

    @staticmethod
    def projected(inputs: np.ndarray, projection: np.ndarray) -> np.ndarray:
        """Inputs `[m, D]` times a matrix `[P, D]`, `[m, P]`."""
        with torch.inference_mode():
            found: np.ndarray = F.linear(padded(torch.from_numpy(inputs)), torch.from_numpy(projection)).numpy()
        return found[: len(inputs)]

    def losses(self, stream: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Negative log-likelihood `[m]` in nats of the next tokens."""
        with torch.inference_mode():
            logits = F.linear(self.norm(padded(torch.from_numpy(stream))), self.embedding)[: len(targets)]
            found: np.ndarray = F.cross_entropy(logits, torch.from_numpy(targets), reduction="none").numpy()
        return found

    def divergences(self, stream: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Kullback-Leibler divergence `[m]` in nats of what is predicted from what the last layer's normed streams
        `wanted [m, D]` predict."""
        with torch.inference_mode():
            ours, theirs = self.norm(padded(torch.from_numpy(stream))), padded(torch.from_numpy(wanted))
            logs, aim = (F.linear(each, self.embedding)[: len(stream)].log_softmax(-1) for each in (ours, theirs))
            found: np.ndarray = (aim.exp() * (aim - logs)).sum(-1).numpy()
        return found

    @staticmethod
    def _sorted(
        best_mK: torch.Tensor, taken_mK: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, list[int], list[int]], torch.Tensor]:
        """Rows by expert, filled up to tiles with row m, which is empty; the experts; their rows. And where the answer
        of each choice will be, `[m, K]`, after a first row of zeros, which stands for those not taken."""
        rows, columns = taken_mK.nonzero(as_tuple=True)
        experts = best_mK[rows, columns]
        order = experts.argsort(stable=True)
        asked, counts = experts.unique(return_counts=True)
        sizes = ((counts + TILE - 1) // TILE * TILE).clamp(min=LEAST)
        starts = sizes.cumsum(0) - sizes
        inside = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        place = starts.repeat_interleave(counts) + inside
        filled = torch.full((int(sizes.sum()),), len(best_mK))
        filled[place] = rows[order]
        places_mK = torch.zeros_like(best_mK)
        places_mK[rows[order], columns[order]] = place + 1
        return (filled, asked.tolist(), sizes.tolist()), places_mK


def padded(x_mD: torch.Tensor) -> torch.Tensor:
    """A copy filled up with rows of zeros to a multiple of `TILE`, at least `LEAST`."""
    found = x_mD.new_zeros(max(-(-len(x_mD) // TILE) * TILE, LEAST), *x_mD.shape[1:])
    found[: len(x_mD)] = x_mD
    return found
