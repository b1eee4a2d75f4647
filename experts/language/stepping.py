"""The language model run for many rows, a layer of a token at a time, so that each layer's experts can be decided.

What a row gets does not depend on the rows beside it, bit for bit: products are made for multiples of `TILE` rows, at
least `LEAST`, whose sums a BLAS orders alike (MKL adds in another order for 8 rows on processors with AVX-512), and
how far attention spans depends on a row's own place.

Shape legend: n rows, m rows in a layer, D width, H heads, F width of a head, S tokens of a passage, L layers, E
experts, K the most experts of a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """Weights of a network in the form in which steps use them. Those of experts are copied: later changes of the
    network do not reach them."""

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
            norms = [
                torch.stack([each.attention.query_norm.weight, each.attention.key_norm.weight]) for each in self.blocks
            ]
            self.norms = [each[:, None] for each in norms]
            turned_round = [[(one.w_in.t(), one.w_out.t()) for one in each.moe.experts] for each in self.blocks]
            self.experts = [[tuple(one.contiguous() for one in both) for both in each] for each in turned_round]
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
        block, count = self.blocks[layer], len(rows)
        with torch.inference_mode():
            stream_mD, row, place = torch.from_numpy(stream), torch.from_numpy(rows), torch.from_numpy(places)
            x_MD = padded(stream_mD)
            three = F.linear(block.attention_norm(x_MD), self.projections[layer])[:count]
            three = three.unflatten(-1, (3, self.heads, -1))
            both = F.rms_norm(three[:, :2], three.shape[-1:], None, self.settings.norm_eps) * self.norms[layer]
            query, key = turned(both, (self.cosines[place][:, None, None], self.sines[place][:, None, None])).unbind(1)
            kept = torch.from_numpy(keys), torch.from_numpy(values)
            for all_rows, new in zip(kept, (key, three[:, 2]), strict=True):
                all_rows[row, :, place] = new
            found_mHF = torch.empty_like(query)
            for end, part in groups(places // TILE):
                span = min((end + 1) * TILE, self.size)
                seen_m11S = (torch.arange(span) <= place[part, None])[:, None, None]
                every = len(row[part]) == len(keys)  # rows, in order
                own_keys, own_values = (each[slice(None) if every else row[part], :, :span] for each in kept)
                found = F.scaled_dot_product_attention(query[part, :, None], own_keys, own_values, attn_mask=seen_m11S)
                found_mHF[part] = found[:, :, 0]
            stream_mD += F.linear(padded(found_mHF.flatten(1)), block.attention.out.weight)[:count]
            inputs_MD = block.expert_norm(padded(stream_mD))
            logits_mE = F.linear(inputs_MD, block.moe.gate.weight)[:count]
        return LayerInputs(inputs_MD[:count].numpy(), logits_mE.numpy())

    def answer(self, layer: int, stream: np.ndarray, step: LayerInputs, k: np.ndarray) -> None:
        """Add to the streams `[m, D]` what the best `k [m]` experts of each row return."""
        with torch.inference_mode():
            logits_mK, best_mK = torch.from_numpy(step.logits).topk(self.settings.k, dim=-1)
            taken_mK = torch.arange(self.settings.k) < torch.from_numpy(k)[:, None]
            weights_mK = logits_mK.masked_fill(~taken_mK, -torch.inf).softmax(-1).nan_to_num(0.0)
        self.mix(layer, stream, step.inputs, best_mK.numpy(), weights_mK.numpy())

    def mix(self, layer: int, stream: np.ndarray, inputs: np.ndarray, experts: np.ndarray, weights: np.ndarray) -> None:
        """Add to the streams `[m, D]` what `experts [m, K]` return for the inputs `[m, D]`, times their weights; those
        of weight 0 do not run."""
        filled, parts, places = _sorted(experts, weights > 0)
        with torch.inference_mode():
            inputs_mD = torch.from_numpy(inputs)
            rows_ND = torch.cat([inputs_mD, inputs_mD.new_zeros(1, inputs_mD.shape[1])])[torch.from_numpy(filled)]
            hidden_N2F = rows_ND.new_empty(len(rows_ND), 2 * self.settings.d_ff)
            answers = rows_ND.new_zeros(len(rows_ND) + 1, rows_ND.shape[1])
            for expert, start, end in parts:
                torch.mm(rows_ND[start:end], self.experts[layer][expert][0], out=hidden_N2F[start:end])
            gate_NF, up_NF = hidden_N2F.chunk(2, dim=-1)
            up_NF *= F.silu(gate_NF)
            for expert, start, end in parts:
                torch.mm(up_NF[start:end], self.experts[layer][expert][1], out=answers[start + 1 : end + 1])
            found_mKD = answers[torch.from_numpy(places)] * torch.from_numpy(weights)[..., None]
            torch.from_numpy(stream).add_(found_mKD.sum(1))

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

    def predicted(self, streams: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Of what normed streams `[T, D]` predict: the mean embedding `[T, D]` of the next token, and minus the entropy
        `[T]` in nats."""
        with torch.inference_mode():
            logs = F.linear(streams, self.embedding).log_softmax(-1)
            odds = logs.exp()
            return (odds @ self.embedding).numpy(), (odds * logs).sum(-1).numpy()

    def divergences(self, stream: np.ndarray, means: np.ndarray, negentropy: np.ndarray) -> np.ndarray:
        """Kullback-Leibler divergence `[m]` in nats of what is predicted from a prediction, of which `predicted` tells
        what is needed: the mean logit is the product of the stream and the mean embedding."""
        with torch.inference_mode():
            ours_mD = self.norm(padded(torch.from_numpy(stream)))
            logits_mV = F.linear(ours_mD, self.embedding)[: len(stream)]
            scale = logits_mV[:, 0] - logits_mV.log_softmax(-1)[:, 0]  # faster than logsumexp
            mean = (ours_mD[: len(stream)] * torch.from_numpy(means)).sum(-1)
            found: np.ndarray = (torch.from_numpy(negentropy) - mean + scale).clamp(min=0).numpy()
        return found


def groups(numbers: np.ndarray) -> Iterator[tuple[int, Any]]:
    """Each number among these, and where it stands: a slice of all if it is the only one."""
    if len(numbers) and (numbers == numbers[0]).all():
        yield int(numbers[0]), slice(None)
    else:
        for each in np.unique(numbers).tolist():
            yield each, (numbers == each).nonzero()[0]


def _sorted(experts: np.ndarray, taken: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int]], np.ndarray]:
    """Rows by expert, filled up to tiles with row m, which is empty; the experts, and where their rows start and end.
    And where the answer of each choice will be, `[m, K]`, after a first row of zeros, which stands for those not
    taken."""
    rows, columns = taken.nonzero()
    chosen = experts[rows, columns]
    order = chosen.astype(np.int16).argsort(kind="stable")  # of 16 bits numpy sorts in linear time
    counts = np.bincount(chosen)
    asked = counts.nonzero()[0]
    counts = counts[asked]
    sizes = np.maximum(-(-counts // TILE) * TILE, LEAST)
    ends = sizes.cumsum()
    place = np.arange(len(order)) + (ends - sizes - counts.cumsum() + counts).repeat(counts)
    filled = np.full(ends[-1] if len(ends) else 0, len(experts))
    filled[place] = rows[order]
    places = np.zeros_like(experts)
    places[rows[order], columns[order]] = place + 1
    return filled, list(zip(asked.tolist(), (ends - sizes).tolist(), ends.tolist(), strict=True)), places


def padded(x_mD: torch.Tensor) -> torch.Tensor:
    """Filled up with rows of zeros to a multiple of `TILE`, at least `LEAST`; the same memory if nothing is missing."""
    size = max(-(-len(x_mD) // TILE) * TILE, LEAST)
    if size == len(x_mD):
        return x_mD
    found = x_mD.new_zeros(size, *x_mD.shape[1:])
    found[: len(x_mD)] = x_mD
    return found
