"""MoEExpertCache-v0: which experts of a language model are loaded into a memory that does not hold them all."""

from typing import Annotated, Any, Unpack

import numpy as np
from annotated_types import Ge, Gt

from cost.arguments import NonNegative, choose
from cost.model import Cost
from cost.timing import torch_threads
from moe_envs.core import Face, Outcome, Reward, SingleEnv, Spec
from moe_envs.core.spaces import layout
from moe_envs.expertcache.memory import EVICTIONS, MemoryEnv, actions_of, advice_for, capacity_of
from moe_envs.expertcache.picture import CachePicture
from moe_envs.expertcache.recorded import DEVICES, MoEExpertPrefetchVectorEnv
from moe_envs.layertopk.observations import HIDDEN

SPLITS = ("rl_train", "validation", "test")
PRECISIONS = ("float32", "bfloat16", "int8", "int4")
COSTS = ("reference", "machine", *DEVICES)
SOURCES = ("model", "trace")
FALLBACKS, QUALITIES = ("substitute", "skip"), ("divergence", "log-likelihood")
# Advice: load an expert if the square of its weight times STEEP, in nats, is above its price; SURE times the difference
# of the squares is a logit. STEEP, from the first layer to the last, is the geometric mean of what tuned thresholds say
# on the shipped model: six settings of `boards`, on validation.
STEEP, SURE = (0.5, 0.3, 0.68, 1.0), 300.0


class MoEExpertCacheVectorEnv(MemoryEnv):
    """MoEExpertCache-v0 over `num_envs` streams at once; see `MoEExpertCacheEnv` for the problem and its arguments."""

    STATE = (*MemoryEnv.STATE, "_keys", "_values", "_hidden", "_inputs", "_logits", "_seen", "_demand")
    common_parts = ("layer", "hidden")  # though they may have as many numbers as there are actions

    def __new__(cls, *given: Any, **arguments: Any) -> Any:
        """With `source="trace"`, an environment on recorded routing."""
        if arguments.get("source") == "trace":
            return MoEExpertPrefetchVectorEnv(*given, **arguments)
        return super().__new__(cls, *given, **arguments)

    def __init__(
        self,
        num_envs: int = 1,
        *,
        source: str = "model",
        model: str = "language",
        text: Annotated[str | None, "the folder of a corpus"] = None,
        split: str = "rl_train",
        cost_weight: NonNegative = 0.2,
        capacity: Annotated[float, Gt(0)] = 6,
        weights: str = "int4",
        eviction: str = "predicted",
        fallback: str = "substitute",
        quality: str = "divergence",
        tokens: Annotated[int, Ge(1)] = 64,
        passages: Annotated[int, Ge(1)] = 4,
        costs: str = "reference",
        time_weight: NonNegative = 1.0,
        memory_weight: NonNegative = 0.0,
        energy_weight: NonNegative = 0.0,
        **face: Unpack[Face],
    ) -> None:
        from moe_envs.expertcache.model import CachedModel  # imports torch, as LayerInputs does
        from moe_envs.expertcache.observations import request_parts

        choose("source", source, SOURCES)
        choose("split", split, SPLITS)
        choose("weights", weights, PRECISIONS)
        choose("eviction", eviction, EVICTIONS)
        choose("fallback", fallback, FALLBACKS)
        choose("quality", quality, QUALITIES)
        choose("costs", costs, COSTS)
        self.stepped = stepped = CachedModel.of(model, text, split, tokens, passages, weights, costs)
        self.layers, self.k, self.experts = stepped.layers, stepped.k, stepped.experts
        self.capacity = capacity_of(capacity, self.experts)
        self.eviction, self.tokens = eviction, tokens * passages
        self.substitute, self.by_divergence = fallback == "substitute", quality == "divergence"
        everything = Cost(*(stepped.loads[self.k] * self.layers * self.tokens).tolist())
        reward = Reward.of(cost_weight, everything, Cost(time_weight, memory_weight, energy_weight))
        actions = actions_of(self.k, eviction)
        super().__init__(num_envs, layout(request_parts(self.k, self.layers)), actions, reward, **face)
        limit = np.tile(self.advised()[:, None] ** 2, self.k)
        self.advice = advice_for(eviction, {"squared": SURE * np.eye(self.k), "layer": -SURE * limit})
        self._allocate()
        n = num_envs
        self._keys, self._values = stepped.empty_cache(n), stepped.empty_cache(n)
        self._hidden, self._inputs = np.zeros((2, n, stepped.width), dtype=np.float32)
        self._logits, self._demand = np.zeros((2, n, self.experts), dtype=np.float32)
        self._wanted = np.zeros((n, self.k), dtype=np.int64)
        self._seen = np.zeros((n, HIDDEN), dtype=np.float32)

    def restore(self, state: dict[str, Any]) -> np.ndarray:
        """Restore a `state()` of an environment with the same arguments; returns its observations."""
        from experts.offload.demand import best

        self.check_state(state)
        self._wanted = best(state["arrays"]["_logits"], self.k)
        return super().restore(state)

    def price(self) -> float:
        """What loading one expert costs, in nats of its token."""
        relative, _ = self.reward.price(self.stepped.loads[1:2])
        return float(self.reward.cost_weight * relative[0] * self.tokens)

    def advised(self) -> np.ndarray:
        """For each layer the weight `[L]` from which our PPO loads an expert at its start."""
        steep = np.interp(np.linspace(0, len(STEEP) - 1, self.layers), np.arange(len(STEEP)), STEEP)
        return np.asarray(np.sqrt(self.price() / steep))

    def _advance(self, actions: np.ndarray) -> Outcome:
        from experts.language.stepping import groups
        from experts.offload.demand import picked
        from moe_envs.expertcache.observations import LATELY, answering, staying

        stepped, running = self.stepped, self._token < self.tokens
        rows = running.nonzero()[0]
        layer = self._layer[rows]
        logits, resident = self._logits[rows], self._resident[rows, layer]
        wanted = self._wanted[rows]
        missing = ~picked(resident, wanted)
        load = (actions[rows, : self.k] > 0) & missing
        available, each = resident.copy(), np.arange(len(rows))[:, None]
        available[each, wanted] |= load
        experts, weights = answering(logits, wanted, available, self.substitute)
        stream = self._hidden[rows]
        with torch_threads(1):
            for number, here in groups(layer):
                part = stream[here]
                stepped.stepper.mix(number, part, self._inputs[rows[here]], experts[here], weights[here])
                stream[here] = part
        self._hidden[rows] = stream
        ran, loaded = np.zeros((2, *resident.shape), dtype=np.bool_)
        ran[each, experts], loaded[each, wanted] = weights > 0, load
        self._note(rows, resident, ran, loaded)
        self._resident[rows, layer] = staying(
            available, self._chosen(rows, layer, self._demand[rows], actions), self.capacity
        )
        loads, requests = np.zeros((2, self.num_envs), dtype=np.int64)
        loads[rows], requests[rows] = load.sum(1), missing.sum(1)
        self._loaded, self._missed = self._loaded + loads, self._missed + requests
        self._lately = (LATELY * self._lately + (1 - LATELY) * loads / self.k).astype(np.float32)
        quality = np.zeros(self.num_envs)
        self._layer[rows] += 1
        if (last := rows[self._layer[rows] == self.layers]).size:
            quality[last] = self._end_token(last)
        self._enter(rows[self._token[rows] < self.tokens])
        asked = self.k * np.maximum(self._token * self.layers + self._layer, 1)
        details = {
            "expertcache/loads": loads,
            "expertcache/loads_per_token": self._loaded / np.maximum(self._token, 1),
            "expertcache/hit_rate": 1 - self._missed / asked,
        }
        return Outcome(quality, stepped.loads[loads], self._token == self.tokens, details)

    def _end_token(self, rows: np.ndarray) -> np.ndarray:
        """The quality of a token in these rows, whose last layer has run."""
        passage, token = self._places(rows)
        with torch_threads(1):
            if self.by_divergence:
                change = -self.stepped.divergences(self._hidden[rows], passage, token)
            else:
                full = self.stepped.full_losses(passage)[np.arange(len(rows)), token]
                change = full - self.stepped.losses(self._hidden[rows], passage, token)
        self._layer[rows] = 0
        self._token[rows] += 1
        return np.asarray(change / self.tokens)

    @torch_threads(1)
    def _enter(self, rows: np.ndarray) -> None:
        """Run the tokens of these rows up to the router of their layers, and note what it asks for."""
        from experts.language.stepping import groups
        from experts.offload.demand import best, odds

        stepped, layer = self.stepped, self._layer[rows]
        passage, token = self._places(rows)
        if (first := layer == 0).any():
            begun = rows[first & (token == 0)]
            self._keys[:, begun], self._values[:, begun] = 0, 0
            self._hidden[rows[first]] = stepped.embed(passage[first], token[first])
        for number, at in groups(layer):
            here, stream = rows[at], self._hidden[rows[at]]
            step = stepped.stepper.attend(number, stream, token[at], self._keys[number], self._values[number], here)
            self._hidden[here], self._inputs[here], self._logits[here] = stream, step.inputs, step.logits
            self._seen[here] = stepped.stepper.projected(step.inputs, stepped.projection)
        logits, requests = self._logits[rows], self._requests
        self._wanted[rows] = wanted = best(logits, self.k)
        requests.add(rows, layer, wanted)
        self._demand[rows] = stepped.demand.predict(requests, rows, layer, odds(logits))

    def _observe(self) -> np.ndarray:
        from experts.offload.demand import odds
        from moe_envs.expertcache.observations import request_values

        layer = self._layer
        values = request_values(odds(self._logits), self._wanted, self._resident[self._rows, layer], self._demand)
        values |= {
            "layer": layer[:, None] == np.arange(self.layers),
            "loads": self._lately,
            "hidden": self._seen.clip(-10, 10),
        }
        return self._laid_out(values)

    def _places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Passage and token in it `[m]`, where these rows stand."""
        size = self.stepped.size
        token = np.minimum(self._token[rows], self.tokens - 1)
        return self.stepped.streams[self.stream[rows], token // size], token % size

    def wanted(self) -> np.ndarray:
        """The experts asked for, `[n, K]`, the best first."""
        return self._wanted.copy()

    def logits(self) -> np.ndarray:
        """Router logits `[n, E]` of the present layers."""
        return self._logits.copy()

    def _useful(self) -> np.ndarray:
        """Bits of missing experts."""
        from experts.offload.demand import picked

        return ~picked(self.residents(), self._wanted)


class MoEExpertCacheEnv(SingleEnv):
    """
    ## Description
    A Mixture-of-Experts language model reads a stream of text, and its memory holds only some experts of each layer;
    the others lie on a disk. Whenever the router asks for experts that are missing, the agent decides which of them are
    loaded. In place of the others the best experts in memory run, at a quarter of their weight: that costs no load, but
    makes the prediction worse. The stream's passages come from different domains, each of which uses other experts.

    The model is really run on what the memory gives it, batched over the rows and with a KV cache. Text is real, and
    load times are looked up in a profile measured on a machine.

    With `source="trace"` no model runs: see Recorded Routing.

    ## Action Space
    `MultiBinary(K)`: for each of the K experts that the router asks for, the best first, whether it is loaded if it is
    missing. Bits of experts that are in memory do nothing; `action_masks()` tells which are missing.

    What leaves a full memory is decided by `eviction`, after the token's experts have run; an expert that was just
    loaded may leave at once. With `eviction="learned"` the space is `MultiDiscrete([2] * K + [3])`, whose last number
    chooses the rule: 0 "predicted", 1 "lru", 2 "ema".

    ## Observation Space
    A `Box` of float32; `env.unwrapped.observation_layout` maps each name to its slice, its bounds and its meaning. For
    the shipped model K = 4 and L = 4.

    | part | size | range | meaning |
    |---|---|---|---|
    | `weights` | K | 0..1 | weights of the best experts |
    | `squared` | K | 0..1 | their squares |
    | `missing` | K | 0..1 | 1 for the experts that are not in memory |
    | `demand` | K | -1..1 | predicted demand for the best experts |
    | `gain` | K | -1..1 | demand minus the lowest of experts in memory that are not requested; 0 if not missing |
    | `substitute` | K | 0..1 | probability of the best unrequested expert in memory, over that of each requested one |
    | `layer` | L | 0..1 | one-hot layer |
    | `count` | 1 | 0..1 | missing experts, over K |
    | `mass` | 1 | 0..1 | probability of the best experts together |
    | `entropy` | 1 | 0..16 | entropy of the router in nats |
    | `loads` | 1 | 0..1 | experts loaded lately in a layer, over K |
    | `hidden` | 16 | -10..10 | projection of the layer's inputs |

    Demand is the discounted number of requests for an expert in the next tokens (0.9 a token, 1 if all ask for it),
    predicted by a ridge regression on the router's probability and past requests, fitted to texts of `rl_train`. After
    the last token, all parts are 0.

    ## Rewards
    R = quality - cost_weight * cost. After the last layer of a token, quality is minus the Kullback-Leibler divergence
    in nats of the prediction from that of the same model with all experts in memory, divided by the number of tokens.
    With `quality="log-likelihood"` it is the change of the log probability of the next token; its noise is much larger.

    Cost is the time of the loads (bytes and energy can be weighted in) relative to loading all K experts of every token
    and layer, whose cost is 1. Loads of one layer are measured together.

    `info` has `reward/quality`, `reward/cost`, `cost/time` [s], `cost/memory` [B], the bytes loaded, `cost/energy` [J],
    a proxy, `vector_reward` (quality, -time, -memory, -energy, relative), `expertcache/loads` of this step, and of the
    episode `expertcache/loads_per_token` and `expertcache/hit_rate`, the share of requests that were in memory.

    ## Starting State
    A stream of the split, drawn at random; the first decision is for its first token in the first layer. In memory are
    the experts that texts of `rl_train` request most often. `reset(options={"stream": number})` selects one.

    ## Episode End
    Terminated after the last token of the stream; never truncated by itself.

    ## Arguments
    | argument | default | meaning |
    |---|---|---|
    | `source` | `"model"` | `"trace"` replays recorded routing |
    | `model` | `"language"` | name or folder of a language model |
    | `text` | None | folder of a corpus to take passages from, instead of those that come with the model |
    | `split` | `"rl_train"` | passages of `"rl_train"`, `"validation"` or `"test"` |
    | `cost_weight` | 0.2 | lambda of the reward |
    | `capacity` | 6 | experts of each layer that fit into memory, or their share if it is below 1; \
`env.unwrapped.vector.memory` is their bytes |
    | `weights` | `"int4"` | precision of the experts: `"float32"`, `"bfloat16"`, `"int8"` or `"int4"` |
    | `eviction` | `"predicted"` | what leaves: `"predicted"` demand, `"lru"`, `"lfu"`, `"ema"` (half-life 4 tokens), \
`"static"`, `"learned"`, or `"belady"`, which sees the future |
    | `fallback` | `"substitute"` | what runs in place of missing experts; with `"skip"`, nothing |
    | `quality` | `"divergence"` | or `"log-likelihood"`, see Rewards |
    | `tokens` | 64 | tokens of a passage, at most the context of the model |
    | `passages` | 4 | passages of a stream |
    | `costs` | `"reference"` | the shipped profile of loads, this `"machine"`'s, or `"simulated disk"` \
(0.1 ms and 2 GB/s), `"simulated hard disk"`, `"simulated memory card"`, `"simulated network"` |
    | `time_weight`, `memory_weight`, `energy_weight` | 1, 0, 0 | weights of the cost terms; should sum to 1 |
    | `render_mode` | None | `"rgb_array"` or `"ansi"` |

    ### Recorded Routing
    With `source="trace"` everything is loaded that a token asks for, and the decision is what to load in advance for
    the next layer, after the last layer for the first one and the next token. The K candidates are the missing experts
    that it most probably asks for. Loads in advance and the layer's computation overlap, which is simulated: the time
    of `overlap` loads is hidden. What is loaded in advance, and not asked for, takes the place of others.

    `trace` is a file of the format route_trace v1, as for `experts.offload.traces.read`; without one, it is the routing
    of the `model` on the passages that come with it, and an expert has its size in int4. A file's tokens are split by
    time: 60 % `rl_train`, 20 % `validation`, 20 % `test`; a stream is `tokens` times `passages` of them, or as many as
    there are. The predictors are fitted to `rl_train`, so that they know the streams of short files there too well.

    The action is `MultiBinary(K)`, a bit for each candidate; quality is 0. The observation has, for each candidate,
    `chance`, the predicted probability that the next layer asks for it, `again`, 1 if the last token asked for it
    there, and `gain`, its demand minus the lowest there; then `layer`, `count`, the share of experts that are
    missing in this layer, and `loads`, that share lately. Chance and demand are ridge regressions on past requests
    and on what this layer asks for; the router's weights are not read. `info` has `expertcache/prefetched`, the
    experts loaded in advance; `expertcache/loads_per_token` counts them, too.

    Arguments that differ: `capacity` 0.375; `overlap` 1.0, in loads of one expert; `costs`
    `"simulated disk"`, or another simulated one; none of `text`, `weights`, `fallback`, `quality`.

    ## Version History
    * v0: initial version.
    """

    vector_class = MoEExpertCacheVectorEnv
    vector: MoEExpertCacheVectorEnv

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode, on the stream `options["stream"]` if it is given."""
        self._seed(seed)
        observation, _ = self.vector.reset(options=options)
        return observation[0], {}

    def action_masks(self) -> np.ndarray:
        """Mask of the bits that do something."""
        return np.asarray(self.vector.action_masks()[0])

    def _picture(self) -> CachePicture:
        return CachePicture(self.vector._history[0], int(self.vector._token[0]))


SPEC = Spec(
    id="MoEExpertCache-v0",
    entry_point="moe_envs.expertcache:MoEExpertCacheEnv",
    baselines="agents.baselines.expertcache",
    reference_point=(1.0, -1.0),
    validation_episodes=128,
    boards={
        f"capacity {capacity}, cost weight {weight:g}": {"capacity": capacity, "cost_weight": weight}
        for weight in (0.2, 0.8)
        for capacity in (6, 4, 8)
    },
    small={"tokens": 4, "passages": 2},
    short={"tokens": 1, "passages": 1},
    variants=(
        {},
        {"eviction": "learned", "capacity": 3},
        {"eviction": "belady", "quality": "log-likelihood"},
        {"fallback": "skip", "weights": "int8", "eviction": "ema"},
        {"source": "trace"},
        {"source": "trace", "eviction": "belady", "overlap": 0.0},
    ),
)
