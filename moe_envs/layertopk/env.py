"""MoELayerTopK-v0: how many experts each token of a text gets in each layer of a language model."""

from typing import Annotated, Any, Unpack

import numpy as np
from annotated_types import Ge, Le
from gymnasium import spaces

from cost.arguments import NonNegative, choose
from cost.model import Cost
from cost.timing import torch_threads
from moe_envs.core import BatchedEnv, Face, Outcome, Reward, SingleEnv, Spec
from moe_envs.core.spaces import layout
from moe_envs.layertopk.observations import HIDDEN, SURPRISE, budget_parts, passage_parts, seen, token_parts
from moe_envs.layertopk.picture import TextPicture

SPLITS = ("rl_train", "validation", "test")
COSTS = ("reference", "machine")
GRANULARITIES, OBSERVATIONS = ("layer", "token"), ("passage", "token")
QUALITIES = ("log-likelihood", "divergence")
# The advice is the least price plus STEEP nats times the square of the weight left out; times SURE these are logits.
# Under a budget an expert costs SCARCE * exp(-budget) nats more, twice that when the budget has run out, nothing when
# twice as much as planned is left. STEEP, from the first layer to the last, and SCARCE were measured on the shipped
# model.
STEEP, SCARCE, SURE = (0.08, 0.04, 0.1, 0.2), 0.08, 500.0


class MoELayerTopKVectorEnv(BatchedEnv):
    """MoELayerTopK-v0 over `num_envs` passages at once; see `MoELayerTopKEnv` for the problem and its arguments."""

    STATE = (
        "passage", "_token", "_layer", "_keys", "_values", "_stream", "_inputs", "_logits", "_seen", "_chosen",
        "_used", "_loss",
    )  # fmt: skip

    def __init__(
        self,
        num_envs: int = 1,
        *,
        model: str = "language",
        text: Annotated[str | None, "the folder of a corpus"] = None,
        split: str = "rl_train",
        cost_weight: NonNegative = 0.1,
        budget: Annotated[NonNegative | None, "experts of a token in a layer, in the mean"] = None,
        granularity: str = "layer",
        observation: str = "passage",
        quality: str = "log-likelihood",
        tokens: Annotated[int, Ge(1)] = 64,
        costs: str = "reference",
        width: Annotated[int, Ge(1), Le(512)] = 64,
        time_weight: NonNegative = 1.0,
        memory_weight: NonNegative = 0.0,
        energy_weight: NonNegative = 0.0,
        **face: Unpack[Face],
    ) -> None:
        from moe_envs.layertopk.model import PricedModel  # imports torch, as LayerInputs does

        choose("split", split, SPLITS)
        choose("granularity", granularity, GRANULARITIES)
        choose("observation", observation, OBSERVATIONS)
        choose("quality", quality, QUALITIES)
        choose("costs", costs, COSTS)
        self.stepped = stepped = PricedModel.of(model, text, split, tokens, costs, width)
        self.layers, self.k, self.tokens = stepped.layers, stepped.k, stepped.size
        reward = Reward.of(cost_weight, stepped.reference, Cost(time_weight, memory_weight, energy_weight))
        single = spaces.Discrete(self.k + 1) if granularity == "layer" else None
        actions = single or spaces.MultiDiscrete([self.k + 1] * self.layers)
        parts = token_parts(self.k, self.layers) + passage_parts() * (observation == "passage")
        parts += budget_parts() * (budget is not None)
        super().__init__(num_envs, layout(parts), actions, reward, **face)
        self.by_token, self.by_divergence = granularity == "token", quality == "divergence"
        decisions = self.tokens * self.layers
        self.total = decisions * self.k if budget is None else int(budget * decisions + 1e-9)
        if granularity == "layer":
            scarce = self.scarcity() * np.arange(self.k + 1)
            depth = np.linspace(0, len(STEEP) - 1, self.layers)
            steep = np.interp(depth, np.arange(len(STEEP)), STEEP)
            self.advice = {
                "left_out": -SURE * np.kron(steep[:, None], np.eye(self.k + 1)),
                "layer": -SURE * (self.prices() + scarce),
            }
            if budget:
                self.advice["budget"] = SURE * scarce[None] * self.k / budget
        self._asked: np.ndarray | None = None  # passages of the next reset
        self.passage, self._token, self._layer, self._used = np.zeros((4, num_envs), dtype=np.int64)
        self._keys, self._values = stepped.empty_cache(num_envs), stepped.empty_cache(num_envs)
        self._stream, self._inputs = np.zeros((2, num_envs, stepped.width), dtype=np.float32)
        self._logits = np.zeros((num_envs, stepped.experts), dtype=np.float32)
        self._seen = np.zeros((num_envs, HIDDEN), dtype=np.float32)
        self._chosen = np.zeros((num_envs, self.tokens, self.layers), dtype=np.int64)
        self._loss = np.zeros((num_envs, self.tokens), dtype=np.float32)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Start episodes, on the passages `options["passage"]`, a number or one for each row, if they are given."""
        asked = (options or {}).get("passage")
        if asked is not None:
            from moe_envs.core.stepped import check_numbers

            self._asked = check_numbers("passage", asked, len(self.stepped.passages.ids), self.num_envs)
        try:
            return super().reset(seed=seed, options=options)
        finally:
            self._asked = None

    def _begin(self, rows: np.ndarray) -> None:
        drawn = self._draw(rows, len(self.stepped.passages.ids))
        self.passage[rows] = drawn if self._asked is None else self._asked[rows]
        self._token[rows], self._layer[rows], self._used[rows] = 0, 0, 0
        self._keys[:, rows], self._values[:, rows] = 0, 0
        self._chosen[rows], self._loss[rows] = 0, 0
        with torch_threads(1):
            self._enter(rows)

    def _advance(self, actions: np.ndarray) -> Outcome:
        quality, cost = np.zeros(self.num_envs), np.zeros((self.num_envs, 3))
        taken = np.zeros(self.num_envs, dtype=np.int64)
        with torch_threads(1):
            for each in actions.T if self.by_token else [actions]:
                taken += self._decide(each, quality, cost)
        details = {"layertopk/experts": taken, "layertopk/experts_used": self._used.copy()}
        return Outcome(quality, cost, self._token == self.tokens, details)

    def _decide(self, k: np.ndarray, quality: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """Run the next layer of each row that has not ended, with k experts or what the budget leaves; add to quality
        and cost; returns the experts run."""
        from experts.language.stepping import LayerInputs, groups

        stepped, token, layer = self.stepped, self._token.copy(), self._layer.copy()
        running = token < self.tokens
        k = np.where(running, np.minimum(k, self.left_experts()), 0)
        rows = running.nonzero()[0]
        for number, here in groups(layer[rows]):
            part = rows[here]
            stream = self._stream[part]
            stepped.stepper.answer(number, stream, LayerInputs(self._inputs[part], self._logits[part]), k[part])
            self._stream[part] = stream
        self._chosen[rows, token[rows], layer[rows]] = k[rows]
        self._used += k
        cost[rows] += stepped.costs[layer[rows], k[rows]]
        self._layer[rows] += 1
        if (last := (running & (self._layer == self.layers)).nonzero()[0]).size:
            losses = stepped.losses(self._stream[last], self.passage[last], token[last])
            self._loss[last, token[last]] = losses
            if self.by_divergence:
                change = -stepped.divergences(self._stream[last], self.passage[last], token[last])
            else:
                change = stepped.full_losses(self.passage[last])[np.arange(len(last)), token[last]] - losses
            quality[last] = change / self.tokens
            self._layer[last], self._token[last] = 0, token[last] + 1
        self._enter((running & (self._token < self.tokens)).nonzero()[0])
        return k

    def _enter(self, rows: np.ndarray) -> None:
        """Run the tokens of these rows up to the router of their layers."""
        from experts.language.stepping import groups

        stepped = self.stepped
        if (first := rows[self._layer[rows] == 0]).size:
            self._stream[first] = stepped.embed(self.passage[first], self._token[first])
        for layer, at in groups(self._layer[rows]):
            here = rows[at]
            stream, cache = self._stream[here], (self._keys[layer], self._values[layer])
            step = stepped.stepper.attend(layer, stream, self._token[here], *cache, here)
            self._stream[here], self._inputs[here], self._logits[here] = stream, step.inputs, step.logits
            self._seen[here] = stepped.stepper.projected(step.inputs, stepped.projection)

    def _observe(self) -> np.ndarray:
        running, token = self._token < self.tokens, np.minimum(self._token, self.tokens - 1)
        done = self.tokens * self.layers - self.left_decisions()
        values = seen(self._logits, self._seen, self._layer, self._chosen[self._rows, token], self.k) | {
            "surprise": np.where(self._token > 0, self._loss[self._rows, token - 1], 0).clip(0, SURPRISE),
            "used": self._used / np.maximum(done, 1) / self.k,
            "progress": self._token / self.tokens,
            "budget": np.minimum(self.left_experts() / np.maximum(self.left_decisions(), 1), self.k) / self.k,
        }
        observation = np.zeros((self.num_envs, self.single_observation_space.shape[0]), dtype=np.float32)  # type: ignore[index]
        for name, part in self.observation_layout.items():
            observation[:, part.slice] = values[name].reshape(self.num_envs, -1)
        observation[~running] = 0
        return observation

    def action_masks(self) -> np.ndarray:
        """Mask `[n, K + 1]`, or `[n, L * (K + 1)]` for all layers at once: what the budget allows."""
        allowed = np.arange(self.k + 1) <= self.left_experts()[:, None]
        return np.asarray(np.tile(allowed, self.layers) if self.by_token else allowed)

    @property
    def budgeted(self) -> bool:
        """Whether the number of experts is limited."""
        return self.total < self.tokens * self.layers * self.k

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Token and layer `[n]` that are decided next."""
        return self._token.copy(), self._layer.copy()

    def relative_costs(self) -> np.ndarray:
        """What a number of experts adds to the cost of an episode, for each layer of a token, `[L, K + 1]`."""
        costs = self.stepped.costs
        return np.asarray(self.reward.price(costs.reshape(-1, 3))[0].reshape(costs.shape[:2]))

    def prices(self) -> np.ndarray:
        """What numbers of experts cost a token in nats, for each layer, `[L, K + 1]`, with their `scarcity`."""
        priced = self.reward.cost_weight * self.relative_costs() * self.tokens
        return np.asarray(priced + self.scarcity() * np.arange(self.k + 1))

    def scarcity(self) -> float:
        """What an expert costs a token in nats because of the budget, if as much of it is left as was planned."""
        return SCARCE * float(np.exp(-self.total / (self.tokens * self.layers))) * self.budgeted

    def inputs(self) -> np.ndarray:
        """Inputs `[n, D]` of the experts in the layers that are decided next."""
        return self._inputs.copy()

    def left_experts(self) -> np.ndarray:
        """Experts `[n]` that the budget leaves."""
        return np.asarray(self.total - self._used)

    def left_decisions(self) -> np.ndarray:
        """Decisions `[n]`, one for each token and layer, that are left."""
        return np.asarray((self.tokens - self._token) * self.layers - self._layer)


class MoELayerTopKEnv(SingleEnv):
    """
    ## Description
    A Mixture-of-Experts language model reads a passage of text, token by token. In each layer, the router of the model
    ranks its experts; the agent decides how many of the best ones run. Some tokens need all K, others none: each expert
    that is left out saves time and makes the prediction of this and of later tokens a little worse.

    The model is really run, batched over the rows and with a KV cache: what was left out for a token is missing when
    later tokens look back at it. Text is real, and costs are looked up in a profile measured on a machine.

    ## Action Space
    With `granularity="layer"`, `Discrete(K + 1)`: the number of experts for this token in this layer. With
    `granularity="token"`, `MultiDiscrete([K + 1] * L)`: the numbers for all L layers at once. More experts than the
    budget leaves are not run; `action_masks()` tells which numbers are possible.

    ## Observation Space
    A `Box` of float32; `env.unwrapped.observation_layout` maps each name to its slice, its bounds and its meaning. For
    the shipped model K = 4 and L = 4.

    | part | size | range | meaning |
    |---|---|---|---|
    | `router` | K | -16..0 | log probabilities of the best experts in this layer |
    | `weights` | K | 0..1 | weights of the best experts if all of them run |
    | `left_out` | L (K + 1) | 0..1 | squared sum of the weights that 0 to K experts leave out, 0 for other layers |
    | `entropy` | 1 | 0..16 | entropy of the router in nats |
    | `layer` | L | 0..1 | one-hot layer |
    | `hidden` | 16 | -10..10 | projection of the layer's inputs |
    | `experts` | L | 0..1 | experts of this token in the layers before, over K |
    | `surprise` | 1 | 0..12 | loss of the token before in nats |
    | `used` | 1 | 0..1 | mean experts of a token and layer so far, over K |
    | `progress` | 1 | 0..1 | finished share of the passage |
    | `budget` | 1 | 0..1 | experts left for each token and layer, over K; only with a `budget` |

    With `observation="token"`, there are no `surprise`, `used` and `progress`: the policy then sees nothing of the
    tokens before, and can decide all tokens of a prompt at once. After the last token, all parts are 0. With
    `granularity="token"` the router is that of the first layer.

    ## Rewards
    R = quality - cost_weight * cost. After the last layer of a token, quality is the log probability of the next token
    in nats, minus that of the same model with K experts everywhere, divided by the number of tokens: the quality of an
    episode is the change in nats a token, 0 for K experts. With `quality="divergence"`, it is minus the
    Kullback-Leibler divergence of the prediction from the one with K experts: about 1.7 times as large in the mean,
    with a third of the noise, so that a learner needs fewer steps.

    Cost is the time of this layer (memory and energy can be weighted in) relative to the time of a whole passage with K
    experts, whose cost is 1. It includes attention, which cannot be saved, and the last layer's includes the output
    layer.

    `info` has `reward/quality`, `reward/cost`, `cost/time` [s], `cost/memory` [B], `cost/energy` [J], `vector_reward`
    (quality, -time, -memory, -energy, relative), `layertopk/experts`, the experts run in this step, and
    `layertopk/experts_used`, those of the episode so far.

    ## Starting State
    A passage of the split, drawn at random; the first decision is for its first token in the first layer.
    `reset(options={"passage": number})` selects one, so that it can be replayed.

    ## Episode End
    Terminated after the last token of the passage; never truncated by itself.

    ## Arguments
    | argument | default | meaning |
    |---|---|---|
    | `model` | `"language"` | name or folder of a language model |
    | `text` | None | folder of a corpus to take passages from, instead of those that come with the model |
    | `split` | `"rl_train"` | passages of `"rl_train"`, `"validation"` or `"test"` |
    | `cost_weight` | 0.1 | lambda of the reward |
    | `budget` | None | hard limit: mean number of experts of a token in a layer |
    | `granularity` | `"layer"` | one decision for each token and layer, or `"token"`: for all its layers at once |
    | `observation` | `"passage"` | or `"token"`, see Observation Space |
    | `quality` | `"log-likelihood"` | or `"divergence"`, see Rewards |
    | `tokens` | 64 | tokens of a passage, at most 64, or the context of the model with `text` |
    | `costs` | `"reference"` | the shipped profile, or this `"machine"`'s |
    | `width` | 64 | rows of the batch whose costs are charged, at most 512, as if all took the same number |
    | `time_weight`, `memory_weight`, `energy_weight` | 1, 0, 0 | weights of the cost terms; should sum to 1 |
    | `render_mode` | None | `"rgb_array"` or `"ansi"` |

    ## Version History
    * v0: initial version.
    """

    vector_class = MoELayerTopKVectorEnv
    vector: MoELayerTopKVectorEnv

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode, on the passage `options["passage"]` if it is given."""
        self._seed(seed)
        observation, _ = self.vector.reset(options=options)
        return observation[0], {}

    def action_masks(self) -> np.ndarray:
        """Mask of the numbers of experts that the budget allows."""
        return np.asarray(self.vector.action_masks()[0])

    def _picture(self) -> TextPicture:
        env = self.vector
        done = int(env._token[0])
        return TextPicture(env.stepped.pieces(int(env.passage[0])), env._chosen[0, :done].mean(1) / env.k)


SPEC = Spec(
    id="MoELayerTopK-v0",
    entry_point="moe_envs.layertopk:MoELayerTopKEnv",
    baselines="agents.baselines.layertopk",
    reference_point=(1.0, -1.0),
    validation_episodes=200,
    boards={
        **{f"cost weight {weight:g}": {"cost_weight": weight} for weight in (0.05, 0.1, 0.2)},
        **{f"budget {budget:g}": {"cost_weight": 0.0, "budget": budget} for budget in (0.75, 1.5)},
    },
    small={"tokens": 8},
    short={"tokens": 1},
    variants=({}, {"granularity": "token"}, {"budget": 1.5}, {"observation": "token", "quality": "divergence"}),
)
