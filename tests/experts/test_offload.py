"""Experts on the disk: the file, the pool, the model over them, and replays of recorded routing."""

import gc
import itertools
import os
import threading
import weakref
from collections import OrderedDict
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.deploy.expertcache import fit_next_layer
from experts.data import DataError
from experts.language import LanguageModel
from experts.language.transformer import ModelSettings, Transformer
from experts.layers import MoELayer
from experts.offload import ExpertFile, OffloadedModel, OffloadError, Probable, Trace, replay, store, traces
from experts.offload.eviction import ARC, LFU, LRU, RULES, SIEVE, AllKept, Eviction, Static, make
from experts.offload.pool import ExpertPool
from experts.offload.store import write

SIZE = ModelSettings(vocabulary=300, d_model=32, layers=3, heads=2, num_experts=6, d_ff=48, k=2, context=64)
EACH = 3 * 32 * 48 * 4  # bytes of an expert


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    return _Small(Transformer(SIZE).eval().requires_grad_(False))


class _Small(LanguageModel):
    """A small network that is given ids."""

    def __init__(self, network: Transformer) -> None:
        self.network, self.metadata = network, {}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(1))


def drawn(events: int, layers: int = 1, experts: int = 8, k: int = 2, seed: int = 0, drift: float = 0.05) -> Trace:
    """Routing whose favourites drift."""
    random = np.random.default_rng(seed)
    rows = []
    for event in range(events):
        odds = np.exp(-np.abs((np.arange(experts) - event * drift) % experts - 3))
        rows.append(random.choice(experts, k, replace=False, p=odds / odds.sum()))
    return Trace(np.arange(events) % layers, np.array(rows), experts, np.full(layers, 10), np.ones(events, dtype=bool))


def plain_lru(events: list[tuple[int, ...]], size: int) -> int:
    order, hits = OrderedDict[int, None](), 0
    for event in events:
        hits += sum(key in order for key in event)
        there = [key for key in reversed(event) if key in order]
        for key in [*there, *(key for key in reversed(event) if key not in there)]:
            if key not in order and len(order) >= size:
                order.pop(next(old for old in order if old not in event))
            order[key] = None
            order.move_to_end(key)
    return hits


def plain_lfu(events: list[tuple[int, ...]], size: int) -> int:
    count, last, there, hits = dict[int, int](), dict[int, int](), set[int](), 0
    for now, (key,) in enumerate(events):
        hits += key in there
        count[key], last[key] = count.get(key, 0) + 1, now
        if key not in there:
            if len(there) >= size:
                there.remove(min(there, key=lambda old: (count[old], last[old])))
            there.add(key)
    return hits


def plain_sieve(events: list[tuple[int, ...]], size: int) -> int:
    """As in the paper: new objects at the head, the hand goes from the tail to the head."""
    queue, visited, hand, hits = list[int](), dict[int, bool](), None, 0
    for (key,) in events:
        if key in visited:
            hits += 1
            visited[key] = True
            continue
        if len(queue) >= size:
            place = len(queue) - 1 if hand is None else hand
            while visited[queue[place]]:
                visited[queue[place]] = False
                place = place - 1 if place else len(queue) - 1
            del visited[queue[place]]
            del queue[place]
            hand = place - 1 if place else None
        queue.insert(0, key)
        hand = None if hand is None else hand + 1
        visited[key] = False
    return hits


def plain_arc(events: list[tuple[int, ...]], c: int) -> int:  # noqa: C901
    """The four cases of the paper."""
    t1, t2, b1, b2, p, hits = list[int](), list[int](), list[int](), list[int](), 0.0, 0

    def leave(x: int) -> None:
        if t1 and ((x in b2 and len(t1) == p) or len(t1) > p):
            b1.append(t1.pop(0))
        else:
            b2.append(t2.pop(0))

    for (x,) in events:
        if x in t1 or x in t2:
            hits += 1
            (t1 if x in t1 else t2).remove(x)
            t2.append(x)
        elif x in b1:
            p = min(c, p + max(1, len(b2) / len(b1)))
            leave(x)
            b1.remove(x)
            t2.append(x)
        elif x in b2:
            p = max(0, p - max(1, len(b1) / len(b2)))
            leave(x)
            b2.remove(x)
            t2.append(x)
        else:
            if len(t1) + len(b1) == c:
                if len(t1) < c:
                    b1.pop(0)
                    leave(x)
                else:
                    t1.pop(0)
            elif len(t1) + len(t2) + len(b1) + len(b2) >= c:
                if len(t1) + len(t2) + len(b1) + len(b2) == 2 * c:
                    b2.pop(0)
                leave(x)
            t1.append(x)
    return hits


@pytest.mark.parametrize("size", [2, 3, 5])
def test_rules_are_those_of_their_papers(size: int) -> None:
    pairs, ones = drawn(600, k=2), drawn(800, k=1)
    assert replay(pairs, "lru", size / 8).hits == plain_lru([tuple(row) for row in pairs.experts.tolist()], size)
    events = [tuple(row) for row in ones.experts.tolist()]
    for name, plain in (("lru", plain_lru), ("lfu", plain_lfu), ("sieve", plain_sieve), ("arc", plain_arc)):
        assert replay(ones, name, size / 8).hits == plain(events, size), name


def least_loads(events: list[tuple[int, ...]], size: int, bypass: bool) -> int:
    """The fewest loads of any way to choose, by all states that can be reached."""
    states = {frozenset[int](): 0}
    for event in events:
        found: dict[frozenset[int], int] = {}
        for there, loads in states.items():
            loads += len(set(event) - there)
            union = sorted(there | set(event))
            for kept in itertools.combinations(union, min(size, len(union))):
                if bypass or set(event) <= set(kept):
                    key = frozenset(kept)
                    found[key] = min(found.get(key, loads), loads)
        states = found
    return min(states.values())


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_belady_is_the_best_of_all_ways(bypass: bool, seed: int) -> None:
    trace = drawn(40, experts=6, k=2, seed=seed)
    events = [tuple(row) for row in trace.experts.tolist()]
    for size in (2, 3, 4):
        assert replay(trace, "belady", size / 6, bypass=bypass).loads == least_loads(events, size, bypass)


def test_no_rule_is_above_belady_and_sums_are_right() -> None:
    trace = drawn(900, layers=3, experts=10, k=3)
    for scope in ("layer", "global"):
        best = replay(trace, "belady", 0.4, scope=scope, bypass=True)
        for name in (*RULES, "lfu-per-layer"):
            found = replay(trace, name, 0.4, scope=scope)
            assert found.hits <= best.hits
            assert found.hits + found.loads == found.requests == 2700
            assert found.bytes == 10 * found.loads
    steady = drawn(900, experts=10, k=3, drift=0.0)
    scores = {(0, expert): float((steady.experts == expert).sum()) for expert in range(10)}
    pinned = replay(steady, lambda size, events: Static(size, scores), 0.4, bypass=True)
    assert pinned.rate == pytest.approx(sum(sorted(scores.values())[-4:]) / 2700, abs=0.01)
    assert pinned.rate > replay(steady, "lru", 0.4).rate
    for wrong in ({"capacity": 0.0}, {"capacity": 2}, {"scope": "node"}, {"policy": "best"}):
        with pytest.raises(ValueError, match="|".join(("capacity=", "scope=", "policy="))):
            replay(trace, **{"policy": "lru", "capacity": 0.5, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["lru", "lrfu"])
def test_one_memory_with_shares_is_as_one_for_each_layer(name: str) -> None:
    trace = drawn(900, layers=3, experts=10, k=3)
    warmed = replace(trace, counted=np.arange(900) >= 300)
    alone = replay(warmed, name, 0.4)
    assert replay(warmed, f"{name}-per-layer", 0.4, scope="global") == alone
    assert replay(warmed, f"{name}-per-layer", 0.4) == alone
    free = replay(warmed, name, 0.4, bypass=True)
    assert replay(warmed, f"{name}-per-layer", 0.4, scope="global", bypass=True) == free
    assert replay(warmed, name, 0.4, scope="global") != alone


def test_a_layer_may_use_the_room_of_others() -> None:
    rule = make("lru-per-layer", 4, 2)
    for expert in range(4):
        rule.begin(0)
        rule.inserted((0, expert))
    assert rule.victim((1, 0), ()) == (0, 0)  # the first layer is above its share of two
    rule.removed((0, 0))
    rule.inserted((1, 0))
    assert rule.victim((0, 9), ()) == (0, 1)
    assert rule.victim((1, 9), {(0, 1)}) == (0, 2)
    assert rule.victim((1, 9), {(0, expert) for expert in range(4)}) == (1, 0)
    with pytest.raises(AllKept):
        rule.victim((1, 9), {*((0, expert) for expert in range(4)), (1, 0)})


def test_a_prompt_warms_and_is_not_counted() -> None:
    trace = drawn(100)
    warmed = replace(trace, counted=np.arange(100) >= 50)
    whole, half = replay(trace, "lru", 0.5), replay(warmed, "lru", 0.5)
    first = replay(replace(trace, counted=np.arange(100) < 50), "lru", 0.5)
    assert half.requests == 100
    assert half.hits == whole.hits - first.hits


TRACE = """# route_trace v1
# model=a.gguf arch=b n_layer=2 n_expert=8 n_expert_used=2
# layer=0 expert_bytes=100 dense_bytes=5
# layer=1 expert_bytes=200 dense_bytes=5
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,0,0,7,0.5,0,100
0,1,0,0,0,3,0.5,0,100
0,1,0,0,1,1,0.4,0,100
0,1,0,1,0,2,0.5,0,200
0,1,1,0,0,3,0.5,0,100
"""


def test_recorded_traces_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(TRACE)
    found = traces.read(path)
    assert found.layer.tolist() == [0, 0, 1, 0]
    assert found.experts.tolist() == [[7, -1], [3, 1], [2, -1], [3, -1]]
    assert found.counted.tolist() == [False, True, True, True]
    assert (found.requests, found.layers, found.num_experts) == (4, 2, 8)
    assert replay(found, "lru", 0.5).bytes == 100 + 100 + 200
    for wrong in (
        TRACE[10:],
        TRACE.replace(",7,", ",8,"),
        TRACE.replace("n_layer=2", "n_layer=3"),
        TRACE[: TRACE.index("0,0,0,0,0")],
        TRACE + TRACE.strip().rpartition("\n")[2] + "\n",
        "",
    ):
        path.write_text(wrong)
        with pytest.raises(DataError, match="no trace of routing"):
            traces.read(path)
    with pytest.raises(DataError, match="cannot be read"):
        traces.read(tmp_path / "b.csv")


RECORDED = os.environ.get("MOE_ENVS_TRACES", "")


@pytest.mark.skipif(not RECORDED, reason="MOE_ENVS_TRACES names no folder with recorded traces")
@pytest.mark.parametrize(
    ("name", "rates"),
    [("qwen", (0.735, 0.882, 0.965)), ("gemma", (0.730, 0.869, 0.956)), ("gptoss", (0.770, 0.867, 0.891))],
)
def test_belady_on_recorded_traces(name: str, rates: tuple[float, ...]) -> None:
    trace = traces.read(Path(RECORDED) / f"{name}.route.csv")
    found = [replay(trace, "belady", share, bypass=True).rate for share in (0.1, 0.2, 0.4)]
    assert found == pytest.approx(rates, abs=5e-4)


def test_the_models_own_routing_is_recorded(model: LanguageModel, ids: torch.Tensor) -> None:
    trace = traces.record(model, ids.tolist())
    routing = model.network(ids[1:]).routing
    assert trace.experts.shape == (2 * 20 * 3, 2)
    for layer, each in enumerate(routing):
        taken = trace.experts[trace.layer == layer][20:]
        assert [set(row) for row in taken.tolist()] == [set(row.nonzero()[:, 0].tolist()) for row in each.members]
    logits = routing[0].logits
    first = trace.experts[trace.layer == 0][20:]
    assert first[:, 0].tolist() == logits.argmax(-1).tolist()  # the most important first
    assert traces.record(model, ids.tolist(), k=[2, 1, 0]).requests == 40 * 3
    assert traces.record(model, ids.tolist(), k=4).requests == 40 * 3 * 4
    assert trace.expert_bytes.tolist() == [EACH] * 3


@pytest.mark.parametrize("policy", [*sorted(RULES), "lru-per-layer"])
def test_an_offloaded_model_answers_as_before(model: LanguageModel, ids: torch.Tensor, policy: str) -> None:
    wanted = model.network(ids).logits
    fewer = model.network(ids, [1, 2, 0]).logits
    with OffloadedModel(model, memory=5 * EACH, policy=policy, prefetch="last") as offloaded:
        torch.testing.assert_close(model.network(ids).logits, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.network(ids, [1, 2, 0]).logits, fewer, atol=1e-5, rtol=1e-5)
        cache, parts = model.network.cache(2), []
        for token in ids.split(1, dim=1):
            parts.append(model.network(token, None, cache).logits)
            assert len(offloaded.pool.resident) <= 5
        torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-4, rtol=1e-4)
        found = offloaded.statistics()
        assert found["tokens"] == 3 * 40
        assert 0 < found["requests"] - found["hits"] <= found["loads"]
        assert found["bytes"] == found["loads"] * EACH
        assert 0 < found["prefetch_accuracy"] <= 1
    with pytest.raises(OffloadError, match="was closed"):
        model.network(ids)


def test_what_is_probable_is_loaded_ahead(model: LanguageModel, ids: torch.Tensor) -> None:
    wanted, fewer = model.network(ids).logits, model.network(ids, [1, 2, 0]).logits
    chances = fit_next_layer(model, ids)
    accuracy = {}
    for name, prefetch in {
        "last": "last",
        "two": Probable(chances, most=2, least=0.0),
        "none": Probable(chances, 0),
    }.items():
        copied = deepcopy(model)
        with OffloadedModel(copied, memory=5 * EACH, prefetch=prefetch) as offloaded:
            torch.testing.assert_close(copied.network(ids).logits, wanted, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(copied.network(ids, [1, 2, 0]).logits, fewer, atol=1e-5, rtol=1e-5)
            before = offloaded.statistics()["prefetched"]
            cache, parts = copied.network.cache(1), []
            for token in ids[:1].split(1, dim=1):
                parts.append(copied.network(token, None, cache).logits)
                assert len(offloaded.pool.resident) <= 5
            torch.testing.assert_close(torch.cat(parts, 1), wanted[:1], atol=1e-4, rtol=1e-4)
            accuracy[name] = offloaded.statistics()["prefetch_accuracy"]
            assert (offloaded.statistics()["prefetched"] > before) == (name != "none")
    assert accuracy["two"] > accuracy["last"] > accuracy["none"] == 0
    chances = replace(chances, frequency=chances.frequency[:2])
    with pytest.raises(ValueError, match=r"prefetch is for 2 layers of 6 experts, not \(3, 6\)"):
        OffloadedModel(model, memory=5 * EACH, prefetch=Probable(chances))


def test_without_prefetch_each_miss_is_a_load_and_memory_is_bounded(model: LanguageModel, ids: torch.Tensor) -> None:
    wanted = model.network(ids).logits
    with OffloadedModel(model, memory=2 * EACH + 5) as offloaded:
        held = []

        def count(module: Any, given: Any) -> None:
            experts = [each for layer in offloaded.layers for each in layer.experts]
            mine = {each.raw.data_ptr() for each in experts if each.raw is not None}  # type: ignore[union-attr]
            there = {future.result().data_ptr() for future in offloaded.pool._there.values()}
            held.append(len(mine | there))

        for layer in offloaded.layers:
            for expert in layer.experts:
                expert.register_forward_pre_hook(count)
        torch.testing.assert_close(model.network(ids).logits, wanted, atol=1e-5, rtol=1e-5)
        assert max(held) == 2
        found = offloaded.statistics()
        assert found["hits"] + found["loads"] == found["requests"]


def test_the_most_important_stay(file: Path) -> None:
    with ExpertFile(file) as opened:
        pool = ExpertPool(opened, 2 * EACH)
        assert sorted(pool.take(0, [3, 1, 0, 2])) == [1, 3]
        assert pool.resident == {(0, 3), (0, 1)}
        assert torch.equal(pool.once(0, 2), opened.read(0, 2))
        assert pool.resident == {(0, 3), (0, 1)}
        pool.close()
    many = Trace(
        np.zeros(2, dtype=int), np.array([[3, 1, 0, 2], [3, 1, -1, -1]]), 8, np.full(1, 10), np.ones(2, dtype=bool)
    )
    assert replay(many, "lru", 0.25).hits == 2


def test_with_room_for_all_each_expert_is_read_once(model: LanguageModel, ids: torch.Tensor) -> None:
    wanted = [model.loss(row).tolist() for row in ids]
    with OffloadedModel(model, memory=18 * EACH) as offloaded:
        found = [model.loss(row).tolist() for row in ids]
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        used = offloaded.statistics()["loads"]
        assert used <= 18
        assert [model.loss(row).tolist() for row in ids] == found
        assert offloaded.statistics()["loads"] == used
        assert not any(
            isinstance(each, torch.nn.Parameter) and each.numel() == 32 * 96 for each in model.network.parameters()
        )


@pytest.mark.parametrize(("weights", "error"), [("bfloat16", 0.02), ("int8", 0.03), ("int4", 0.3)])
def test_packed_experts_are_smaller_and_close(
    model: LanguageModel, ids: torch.Tensor, weights: Any, error: float
) -> None:
    wanted = model.network(ids).logits
    with OffloadedModel(model, memory=10**9, weights=weights) as offloaded:
        found = model.network(ids).logits
        assert offloaded.pool.each < {"bfloat16": 0.51, "int8": 0.3, "int4": 0.2}[weights] * EACH
    assert 0 < (found - wanted).abs().max() / wanted.abs().max() < error


@pytest.fixture
def file(model: LanguageModel, tmp_path: Path) -> Path:
    path = tmp_path / "experts.bin"
    write(path, _layers(model))
    return path


def test_the_file_holds_every_expert(model: LanguageModel, file: Path) -> None:
    for direct in (True, False):
        with ExpertFile(file, direct) as opened:
            opened.check()
            for layer, block in enumerate(model.network.blocks):
                for number, expert in enumerate(block.moe.experts):  # type: ignore[union-attr, arg-type]
                    w_in, w_out = opened.weights(opened.read(layer, number))
                    assert torch.equal(w_in, expert.w_in)
                    assert torch.equal(w_out, expert.w_out)
            with pytest.raises(OffloadError, match="no expert 6 in layer 0"):
                opened.read(0, 6)


def test_damage_stops_the_answer_and_is_named(model: LanguageModel, ids: torch.Tensor, file: Path) -> None:
    raw = file.read_bytes()
    network = model.network
    with OffloadedModel(model, memory=4 * EACH, file=file):
        wanted = network(ids).logits
        broken = bytearray(raw)
        for start in range(len(raw) - 4096, 4096, -4096):  # a bit of every page but the header's
            broken[start + 5] ^= 4
        file.write_bytes(bytes(broken))
        with pytest.raises(OffloadError, match="is damaged in expert . of layer .: write it anew"):
            network(ids)
        file.write_bytes(raw)
        torch.testing.assert_close(network(ids).logits, wanted)
        os.truncate(file, len(raw) // 2)
        with pytest.raises(OffloadError, match="ends within expert"):
            network(ids)
        file.write_bytes(raw)
        torch.testing.assert_close(network(ids).logits, wanted)
        file.unlink()  # an open file stays until it is closed
        torch.testing.assert_close(network(ids).logits, wanted)


def test_a_file_that_is_none_is_told(model: LanguageModel, file: Path, tmp_path: Path) -> None:
    raw = file.read_bytes()
    wrong = tmp_path / "wrong.bin"
    for place in (0, 16, 40, 120, 300):
        wrong.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(OffloadError, match="no file of experts"):
            ExpertFile(wrong)
    for short in (b"", raw[:10], raw[:200]):
        wrong.write_bytes(short)
        with pytest.raises(OffloadError, match="no file of experts"):
            ExpertFile(wrong)
    with pytest.raises(OffloadError, match="cannot be opened: No such file"):
        ExpertFile(tmp_path / "absent.bin")
    with pytest.raises(OffloadError, match="holds other experts"):
        OffloadedModel(_other(), memory=10**6, file=file)
    with pytest.raises(OffloadError, match="not in int8"):
        OffloadedModel(model, memory=10**6, file=file, weights="int8")
    with pytest.raises(ValueError, match="not even one expert"):
        OffloadedModel(model, memory=100)
    with pytest.raises(ValueError, match="policy='best'"):
        OffloadedModel(model, memory=10**6, policy="best")
    with pytest.raises(ValueError, match="prefetch='all'"):
        OffloadedModel(model, memory=10**6, prefetch="all")


def test_a_file_with_weights_of_others_is_refused(
    model: LanguageModel, file: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = model.network(ids).logits
    source, blocks = store.source_of(_layers(model)), _layers(_other())
    with monkeypatch.context() as patched:
        patched.setattr(store, "source_of", lambda layers: source)  # it says that it holds the model's
        write(file.parent / "other.bin", blocks)
    with pytest.raises(OffloadError, match="is damaged in expert 0 of layer 0"):
        OffloadedModel(model, memory=10**6, file=file.parent / "other.bin")
    torch.testing.assert_close(model.network(ids).logits, wanted)
    with OffloadedModel(model, memory=10**6, file=file):
        torch.testing.assert_close(model.network(ids).logits, wanted)
        with pytest.raises(ValueError, match="offloaded already: load the model anew"):
            OffloadedModel(model, memory=10**6, file=file)


def test_a_layer_that_asks_for_nothing_keeps_its_place(file: Path) -> None:
    with ExpertFile(file) as opened:
        pool = ExpertPool(opened, 4 * EACH)
        for _ in range(3):
            for layer, experts in enumerate(([1], [], [2])):
                pool.take(layer, experts)
        assert (pool.rule.passed, pool.rule.layer) == (2, 2)
        with pytest.raises(ValueError, match="5 experts are to stay, 4 fit"):
            pool.exchange(1, [0, 1, 2], {0, 1, 2}, 3)
        pool.close()


def _layers(model: LanguageModel) -> list[MoELayer]:
    return [block.moe for block in model.network.blocks]  # type: ignore[union-attr, misc]


def _other() -> LanguageModel:
    torch.manual_seed(9)
    return _Small(Transformer(SIZE).eval().requires_grad_(False))


def test_threads_share_a_pool(file: Path) -> None:
    opened = ExpertFile(file)
    wanted = {(layer, expert): opened.read(layer, expert) for layer in range(3) for expert in range(6)}
    pool, errors = ExpertPool(opened, 4 * EACH), list[object]()

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(150):
            layer, experts = int(random.integers(3)), random.choice(6, 2, replace=False).tolist()
            pool.prefetch(int(random.integers(3)), random.choice(6, 1).tolist())
            for expert, raw in pool.take(layer, experts).items():
                if not torch.equal(raw, wanted[layer, expert]):
                    errors.append((layer, expert))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    assert len(pool.resident) <= 4
    assert pool.statistics().requests == 4 * 150 * 2
    pool.close()
    opened.close()


@pytest.mark.parametrize("rule", [LRU, LFU, ARC, SIEVE])
def test_a_rule_says_when_all_must_be_kept(rule: type[Eviction]) -> None:
    made = rule(2)
    for key in ((0, 1), (0, 2)):
        made.begin(0)
        made.miss(key)
        made.inserted(key)
    with pytest.raises(AllKept):
        made.victim((0, 3), {(0, 1), (0, 2)})
    with pytest.raises(ValueError, match="policy='x' is not one of lru"):
        make("x", 2, 1)


def test_a_model_of_transformers_is_offloaded() -> None:
    pytest.importorskip("transformers", reason="pip install moe-envs[hf]")
    from experts.huggingface import adapt
    from tests.experts.test_huggingface import tiny

    theirs = tiny("Qwen3Moe")
    stacked = weakref.ref(theirs.model.layers[0].mlp.experts.gate_up_proj)
    ids = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(1))
    wanted = theirs(ids).logits
    adapted = adapt(theirs)
    with pytest.raises(ValueError, match="not even one expert"):
        OffloadedModel(adapted, memory=10)
    torch.testing.assert_close(theirs(ids).logits, wanted)
    with OffloadedModel(adapted, memory=3 * 4 * 3 * 24 * 32) as offloaded:
        gc.collect()
        assert stacked() is None
        torch.testing.assert_close(theirs(ids).logits, wanted, atol=1e-4, rtol=1e-4)
        assert offloaded.statistics()["loads"] > 3
