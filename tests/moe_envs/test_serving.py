"""MoEServing-v0: queues, rewards and times by hand, and traffic."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from experts.data import DataError
from experts.serving.arrivals import arrivals, trace
from experts.serving.control import WAIT, Service, must_send
from experts.serving.rules import rule_of
from moe_envs.serving import MoEServingVectorEnv
from moe_envs.serving.env import HORIZON

ID = "moe_envs:MoEServing-v0"


def vector(rows: int = 1, **kwargs: Any) -> MoEServingVectorEnv:
    return MoEServingVectorEnv(rows, **({"seconds": 1.0} | kwargs))


def with_arrivals(env: MoEServingVectorEnv, times: list[list[float]]) -> None:
    """Start an episode of row 0 with these arrivals of each class."""
    env.reset(seed=0)
    traffic, every = env.traffic, np.sort(np.concatenate(times))
    traffic.times[0] = traffic.apart[0][:, None] + 500.0
    for number, mine in enumerate(times):
        traffic.times[0, number, : len(mine)] = np.array(mine) + traffic.apart[0, number]
        traffic.totals[0, number, 1 : len(mine) + 1] = np.cumsum(mine)
    traffic.every[0] = 500.0
    traffic.every[0, : len(every)] = every
    traffic.heads[0], env.now[0], env._ended[0] = 0, 0.0, False
    env.worth[0] = sum(len(mine) * each.value for mine, each in zip(times, env.classes, strict=True))
    env._go_on()
    env._observe()


def set_time(env: MoEServingVectorEnv, seconds: float) -> None:
    """Go to this time of row 0's episode."""
    env.now[0] = seconds
    env._observe()


def test_a_batch_takes_what_waits_and_pays_for_its_time() -> None:
    env = vector(cost_weight=0.5)
    with_arrivals(env, [[0.25, 0.25, 0.25, 0.5]])
    assert (env.now[0], env.traffic.queue(env.now).tolist()) == (0.25, [[3]])
    _, reward, ended, _, infos = env.step(env.choices.number(2, 1)[None])
    seconds = env.table[1, 2]
    assert (infos["serving/rows"][0], infos["serving/level"][0], env.now[0]) == (2, 1, 0.25 + seconds)
    quality = -2 / 4 * (1 - env.service.quality[1])
    assert infos["reward/quality"][0] == pytest.approx(quality)
    assert reward[0] == pytest.approx(quality - 0.5 * seconds)
    assert infos["discount"][0] == pytest.approx(np.exp(-seconds / HORIZON))
    assert not ended[0]


def test_waiting_goes_to_the_next_arrival_or_five_milliseconds() -> None:
    env = vector()
    with_arrivals(env, [[0.25, 0.253, 0.4]])
    for now in (0.253, 0.258, 0.263):
        _, reward, _, _, infos = env.step(np.zeros(1, dtype=np.int64))
        assert (reward[0], infos["serving/level"][0], env.now[0]) == (0, -1, pytest.approx(now))


def test_late_answers_are_worth_nothing_and_hopeless_requests_are_given_up() -> None:
    env = vector(deadline=0.25)
    big, small = env.table[0, 64], env.table[:, 1].min()
    assert big > 0.25
    with_arrivals(env, [[0.0] * 64 + [0.5]])
    _, _, ended, _, infos = env.step(env.choices.number(64, 0)[None])
    assert infos["reward/quality"][0] == pytest.approx(-64 / 65)
    assert infos["serving/answered"][0] == 64
    with_arrivals(env, [[0.0, 0.1, 0.9]])
    while env.now[0] < 0.25 - must_send(small) + 0.01:
        assert env.action_masks()[0, 0] == (env.now[0] <= 0.25 - must_send(small))
        set_time(env, env.now[0] + WAIT)
    assert not env.action_masks()[0, 0]
    set_time(env, 0.3)
    assert env._go_on().tolist() == [[1]]
    assert env.traffic.queue(env.now).tolist() == [[1]]  # the first was given up
    for _ in range(2):
        _, _, ended, _, infos = env.step(env.choices.number(1, 0)[None])
    assert ended[0]
    assert infos["serving/in_time"][0] == 2


def test_latency_is_what_is_paid_where_nothing_is_late() -> None:
    env = vector(answers="latency", deadline=0.5)
    with_arrivals(env, [[0.0, 0.1, 0.2]])
    set_time(env, 0.2)
    _, _, ended, _, infos = env.step(env.choices.number(4, 0)[None])
    latency = 3 * (0.2 + env.table[0, 3]) - 0.3
    assert infos["reward/quality"][0] == pytest.approx(-latency / 0.5 / 3)
    assert ended[0]


def test_orders_of_mixed_requests() -> None:
    taken = {}
    for order in range(5):
        env = vector(classes="mixed")
        with_arrivals(env, [[0.0] * 3, [0.0] * 3, [0.0] * 3])  # 1, 1 and 4 rows; due at .25, 1 and 4 s
        env.step(env.choices.number(8, 0, order)[None])
        taken[order] = env.traffic.heads[0].tolist()
    assert taken == {0: [3, 3, 0], 1: [3, 3, 0], 2: [3, 0, 0], 3: [0, 3, 0], 4: [0, 0, 2]}
    env = vector(classes="mixed")
    with_arrivals(env, [[0.0] * 3, [0.0], []])
    env.step(env.choices.number(2, 0, 1)[None])
    assert env.traffic.heads[0].tolist() == [1, 1, 0]  # the careful one is worth 2
    with_arrivals(env, [[0.0], [0.0], []])
    env.step(env.choices.number(4, 0, 4)[None])
    assert env.traffic.heads[0].tolist() == [1, 1, 0]  # nothing of the third class waits: all are taken


def test_what_is_seen_is_what_waits() -> None:
    env = vector(deadline=0.25)
    with_arrivals(env, [[0.1, 0.15, 0.2]])
    set_time(env, 0.22)
    seen = env.seen()
    assert seen.queue.tolist() == [[3]]
    np.testing.assert_allclose(seen.age, 0.12)
    np.testing.assert_allclose(seen.slack, 0.13)
    np.testing.assert_allclose(seen.since, 0.02)


def test_what_is_seen_follows_every_change() -> None:
    env, other = vector(3, classes="mixed", trace="bursts"), vector(3, classes="mixed", trace="bursts")
    for each in (env, other):
        each.reset(seed=1)
        each.action_space.seed(0)
    for step in range(60):
        for each in (env, other):
            each.step(each.action_space.sample())
        if step % 7 == 3:
            env.reset(options={"reset_mask": np.array([True, False, step % 2 == 0])})
            other.restore(env.state())
        for found, fresh in zip(vars(env.seen()).values(), vars(env._look()).values(), strict=True):
            np.testing.assert_array_equal(found, fresh)
        np.testing.assert_array_equal(env.action_masks(), other.action_masks())
    with pytest.raises(ValueError, match="read-only"):
        env.seen().slack[0] = 9.0


def test_arrival_rates_are_exponential_averages() -> None:
    env = vector(3, load=1.0)
    env.reset(seed=3)
    now = np.array([0.3, 0.6, 0.9])
    times = env.traffic.times[:, 0] - env.traffic.apart
    wanted = [[sum(np.exp((each - moment) / scale) for each in row if each <= moment) / scale
               for scale in (0.02, 0.1, 0.5, 2.5)] for row, moment in zip(times, now, strict=True)]  # fmt: skip
    np.testing.assert_allclose(env.traffic.recent(now)[1], wanted, rtol=1e-9)


@pytest.mark.parametrize("kind", ["poisson", "bursts"])
def test_loads_are_what_is_asked_for(kind: str) -> None:
    env = MoEServingVectorEnv(64, trace=kind, load=0.8, seconds=8.0)
    env.reset(seed=0)
    count = (env.traffic.every - np.arange(64)[:, None] * 1e3 < 100).sum(1)
    assert count.mean() == pytest.approx(0.8 * env.capacity * 8, rel=0.1)
    assert (count.std() > 1.5 * count.mean() ** 0.5) == (kind == "bursts")


def test_splits_have_other_arrivals() -> None:
    def first(split: str) -> list[float]:
        env = vector(4, split=split)
        env.reset(seed=0)
        return env.now.tolist()

    assert first("train") == first("train")
    assert len({tuple(first(split)) for split in ("train", "validation", "test")}) == 3


def test_a_trace_is_split_by_time_and_has_the_rate_asked_for(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    stamps = np.datetime64("2023-11-16T18:17:03") + (random.uniform(0, 100, 2000) * 1e9).astype("timedelta64[ns]")
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens\n" + "".join(f"{str(each).replace('T', ' ')},5\n" for each in stamps))
    parts = [trace(path, split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == pytest.approx([1200, 400, 400], rel=0.15)
    assert sum(len(part) for part in parts) in (1999, 2000)  # the very last may be at the end
    found = arrivals(str(path), 50.0, 20.0, np.random.default_rng(1), "validation")
    assert len(found) == pytest.approx(1000, rel=0.1)
    assert (np.diff(found) >= 0).all()
    env = vector(2, trace=str(path), split="test")
    env.reset(seed=0)
    assert env.traffic.queue(env.now).sum() >= 2


@pytest.mark.parametrize("text", ["", "a,b\n", "TIMESTAMP\nx\n", "TIMESTAMP\n1\n2\n", "TIMESTAMP\n" + "1\n" * 200])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "trace.csv").write_text(text)
    with pytest.raises(DataError, match="no trace"):
        vector(trace=str(tmp_path / "trace.csv"))
    with pytest.raises(DataError, match="no trace"):
        vector(trace=str(tmp_path / "absent.csv"))


def test_arguments_are_checked() -> None:
    two: dict[str, Any] = {"answers": "latency", "classes": "mixed"}
    cases: list[tuple[dict[str, Any], str]] = [({"load": (2.0, 1.0)}, "load"), ({"seconds": 11.0}, "seconds"),
                                               ({"classes": "x"}, "classes"), (two, "one class"),
                                               ({"deadline": 0.001}, "fastest")]  # fmt: skip
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            vector(**wrong)


def test_a_policy_that_only_waits_still_answers() -> None:
    env: Any = gymnasium.make(ID, seconds=1.0, load=0.3)
    env.reset(seed=0)
    ended = False
    while not ended:
        _, _, ended, _, info = env.step(0)
    assert info["serving/answered"] >= info["serving/in_time"] > 0


def test_what_a_row_takes_beside_the_model_is_not_known_to_rules() -> None:
    plain, slow = vector(), vector(overhead=0.001)
    np.testing.assert_allclose(slow.table[:, 8], plain.table[:, 8] + 0.008)
    np.testing.assert_array_equal(slow.service.seconds, plain.service.seconds)
    assert 1 / slow.capacity == pytest.approx(1 / plain.capacity + 0.001)


def test_energy_that_is_not_known_has_no_price(monkeypatch: pytest.MonkeyPatch) -> None:
    known = vector().service
    unknown = Service(known.levels, known.sizes, known.seconds, known.quality, 0 * known.joules)
    monkeypatch.setattr("experts.serving.timing.service_of", lambda model, costs: unknown)
    assert vector().reward.relative.reference.energy == 1
    with pytest.raises(ValueError, match="the energy of batches of language is not known"):
        vector(energy_weight=0.5)


def test_the_rule_of_the_observation_is_the_one_that_was_asked_for() -> None:
    text = "by-class:levels=0/0/2,caps=8/8/16,fills=4/8/8,queues=3/100/10,leads=0.01/0.1/1"
    for rule in ("slackfit", "regression", text):
        env = vector(4, rule=rule, classes="mixed", trace="bursts")
        part = env.observation_layout["plan"].slice
        observation, _ = env.reset(seed=0)
        made = rule_of(rule)(env.choices, env.service, env.classes)
        for _ in range(20):
            chosen = made.decide(env.seen(), np.zeros(4, dtype=np.bool_))
            going = ~env._ended
            assert going.any()
            assert observation[going, part].argmax(1).tolist() == chosen[going].tolist()
            observation, *_ = env.step(chosen)
    with pytest.raises(ValueError, match="remembers batches"):
        vector(rule="adaptive")


def test_times_of_batches_vary_and_rules_learn_how_slow_they_are() -> None:
    env = vector(4, jitter=0.2, slowdown=(1.0, 3.0), load=0.5, seconds=8.0, autoreset_mode="Disabled")
    env.reset(seed=0)
    slow, factors = env.rate.max() / env.rate, []
    assert slow.max() > 1.2  # fewer requests for a slower server
    for _ in range(64):
        *_, infos = env.step(np.full(4, env.choices.number(1, 0)))
        factors.append(infos["cost/time"] / env.table[0, infos["serving/rows"]])
    logs = np.log(factors)
    assert 0.15 < logs.std(0).mean() < 0.25
    np.testing.assert_allclose(np.exp(logs.mean(0)), env.capacity * 0.5 / env.rate, rtol=0.1)
    learned = env.seen().slow
    np.testing.assert_allclose(learned, np.exp(logs.mean(0)), rtol=0.3)
    assert np.corrcoef(learned, env.capacity / env.rate)[0, 1] > 0.9
    again = vector(4, jitter=0.2, slowdown=(1.0, 3.0), load=0.5, seconds=8.0)
    again.reset(seed=0)
    np.testing.assert_array_equal(again._factors, env._factors)  # of the episode, not of what was done
    other = vector(4, jitter=0.2, slowdown=(1.0, 3.0), load=0.5, seconds=8.0, split="test")
    other.reset(seed=0)
    assert not (other._factors == env._factors).any()


def test_without_variation_the_times_are_the_known_ones() -> None:
    env = vector(3)
    env.reset(seed=0)
    for _ in range(20):
        env.step(np.full(3, env.choices.number(4, 1)))
    assert env.seen().slow.tolist() == [1.0] * 3
    with pytest.raises(ValueError, match=r"slowdown=\(2.0, 1.0\): the first must not be above the second"):
        vector(slowdown=(2.0, 1.0))
    with pytest.raises(ValueError, match="the fastest answer of language takes"):
        vector(deadline=0.1, slowdown=(1.0, 20.0))
