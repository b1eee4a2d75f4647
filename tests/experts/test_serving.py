"""The service answers as the model does, refuses what it should with a sentence, and batches as it is told."""

import asyncio
import io
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from experts import bundle, language
from experts.serving.batching import Batcher, DeadlineError, QueueFullError
from experts.serving.control import CAPS, NEVER, WAIT, WAITS, Choices, RequestClass, Seen, Service
from experts.serving.export import export
from experts.serving.limits import TokenBuckets
from experts.serving.rules import Fixed, rule_of
from experts.serving.sources import of_bundle

pytest.importorskip("fastapi")
from starlette.testclient import TestClient

from experts.serving.app import create_app

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(
        create_app("digits", keys=("secret",), body_bytes=100_000), headers={"x-api-key": "secret"}
    ) as found:
        yield found


@pytest.fixture(scope="module")
def writer() -> Iterator[TestClient]:
    with TestClient(create_app("language")) as found:
        yield found


def test_predictions_are_the_models(client: TestClient) -> None:
    found = bundle.load("digits")
    inputs, module = found.examples[:5], found.model()
    answer = client.post("/predict", json={"inputs": inputs.tolist()}).json()
    k = int(answer["level"][-1])
    with torch.no_grad():
        odds = module(torch.from_numpy(inputs), k).softmax(-1)  # type: ignore[operator]
    assert [each["label"] for each in answer["predictions"]] == odds.argmax(1).tolist()
    np.testing.assert_allclose([each["probabilities"] for each in answer["predictions"]], odds.numpy(), atol=1e-6)
    assert all(len(each["experts"]) == k for each in answer["predictions"])
    assert answer["version"].startswith("0.0.0+")


def test_an_image_or_an_array_is_as_good_as_numbers(client: TestClient) -> None:
    grey = (bundle.load("digits").examples[0].reshape(8, 8) * 255).round().astype(np.uint8)
    raw, png, large = ({"inputs": [(grey.ravel() / 255).tolist()]}, io.BytesIO(), io.BytesIO())
    Image.fromarray(grey).save(png, "PNG")
    Image.fromarray(grey).resize((16, 16), Image.Resampling.NEAREST).save(large, "PNG")
    array = io.BytesIO()
    np.save(array, grey.ravel() / np.float32(255))
    wanted = client.post("/predict", json=raw).json()["predictions"][0]["probabilities"]
    for body, kind in ((png, "image/png"), (array, "application/x-npy")):
        found = client.post("/predict", content=body.getvalue(), headers={"content-type": kind})
        np.testing.assert_allclose(found.json()["predictions"][0]["probabilities"], wanted, atol=1e-5)
    assert client.post("/predict", content=large.getvalue(), headers={"content-type": "image/png"}).status_code == 200


def _bomb() -> bytes:
    """An array whose header says that it is far larger than it is."""
    file = io.BytesIO()
    header: Any = {"descr": "<f8", "fortran_order": False, "shape": (10**10, 64)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "kind", "status", "sentence"),
    [
        (b"", "application/json", 400, "no JSON"),
        (b"{", "application/json", 400, "no JSON"),
        (b"[" * 90_000, "application/json", 400, "no JSON"),
        (b'{"inputs": NaN}', "application/json", 400, "no JSON"),
        (b"[1]", "application/json", 422, "must be a JSON object, is a list"),
        (b"{}", "application/json", 422, '"inputs" must be a list'),
        (b'{"inputs": []}', "application/json", 422, "at least one row"),
        (b'{"inputs": [[1, 2]]}', "application/json", 422, "list of 64 numbers, these have 2"),
        (b'{"inputs": [[1, 2], [1]]}', "application/json", 422, "these have 1 and 2"),
        (json.dumps({"inputs": [["a"] * 64]}).encode(), "application/json", 422, "hold nothing else"),
        (json.dumps({"inputs": [[True] * 64]}).encode(), "application/json", 422, "hold nothing else"),
        (json.dumps({"inputs": [[1e30] * 64]}).encode(), "application/json", 422, "finite and from"),
        (json.dumps({"inputs": [[10**400] * 64]}).encode(), "application/json", 422, "finite and from"),
        (b'{"inputs": [3]}', "application/json", 422, "must be a list of 64 numbers"),
        (json.dumps({"inputs": [[0] * 64] * 65}).encode(), "application/json", 422, "65 rows, more than 64"),
        (json.dumps({"inputs": [[0] * 64], "x": 1}).encode(), "application/json", 422, "x: Extra inputs"),
        (json.dumps({"inputs": [[0] * 64], "deadline_ms": -1}).encode(), "application/json", 422, "deadline_ms"),
        (
            json.dumps({"inputs": [[0] * 64], "request_class": "x"}).encode(),
            "application/json",
            422,
            "'x' is not one of",
        ),
        (b"x" * 200_000, "application/json", 413, "larger than 100000 bytes"),
        (b"x", "text/plain", 415, "'text/plain' is none of"),
        (b"x", "image/png", 422, "no PNG image"),
        (b"x", "application/x-npy", 422, "no array in NumPy's format"),
        (_bomb(), "application/x-npy", 422, "other bytes than an array"),
    ],
)
def test_what_is_wrong_is_said(client: TestClient, body: bytes, kind: str, status: int, sentence: str) -> None:
    found = client.post("/predict", content=body, headers={"content-type": kind})
    assert (found.status_code, sentence in found.json()["detail"]) == (status, True), found.text


def test_pickles_are_not_loaded(client: TestClient) -> None:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}] * 64, dtype=object), allow_pickle=True)
    found = client.post("/predict", content=file.getvalue(), headers={"content-type": "application/x-npy"})
    assert found.status_code == 422


def test_a_key_is_needed_but_for_health(client: TestClient) -> None:
    body = {"inputs": [[0.0] * 64]}
    assert client.post("/predict", json=body, headers={"x-api-key": "other"}).status_code == 401
    assert client.get("/metrics", headers={"x-api-key": ""}).status_code == 401
    bearer = {"x-api-key": "", "authorization": "Bearer secret"}
    assert client.post("/predict", json=body, headers=bearer).status_code == 200
    assert client.get("/health", headers={"x-api-key": ""}).json()["ready"] is True


def test_unknown_paths_and_methods(client: TestClient) -> None:
    assert client.get("/nothing").json() == {"detail": "Not Found"}
    assert client.get("/predict").status_code == 405
    assert client.post("/generate", json={"prompt": "x"}).json()["detail"].startswith("the model is no language model")


def test_metrics_and_request_ids(client: TestClient) -> None:
    answer = client.post("/predict", json={"inputs": [[0.0] * 64] * 3}, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert client.get("/model", headers={"x-request-id": "no good\x7f"}).headers["x-request-id"] != "no good\x7f"
    text = client.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(lines['moe_requests_total{code="200",path="/predict"}']) >= 1
    assert float(lines["moe_batch_rows_sum"]) >= 3
    assert float(lines["moe_requests_in_flight"]) == 1  # this one
    assert sum(float(value) for name, value in lines.items() if name.startswith("moe_expert_rows_total")) >= 3
    assert f'moe_model{{version="{answer.json()["version"]}"}}' in lines


def test_health_without_a_running_batcher() -> None:
    app = create_app("digits")
    assert TestClient(app).get("/health/ready").status_code == 503


def test_a_token_bucket_fills_again() -> None:
    now = [0.0]
    buckets = TokenBuckets(2.0, burst=3, clock=lambda: now[0])
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.take("b") == 0
    now[0] = 0.5
    assert [buckets.take("a"), buckets.take("a")] == [0, 0.5]


def test_a_client_that_asks_too_often_is_told_when_to_come_again() -> None:
    with TestClient(create_app("digits", rate=0.01, burst=2)) as client:
        codes = [client.get("/model").status_code for _ in range(3)]
        last = client.get("/model")
    assert (codes, last.status_code, int(last.headers["retry-after"]) > 50) == ([200, 200, 429], 429, True)


def test_a_reload_changes_the_version_and_a_damaged_file_does_not(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder, source = tmp_path / "model", of_bundle("digits")
    export(source, folder, "onnx", "1.0.0")
    headers, body = {"x-api-key": "k"}, {"inputs": source.examples[:2].tolist()}
    with TestClient(create_app(folder, keys=("k",)), headers=headers) as client:
        assert client.post("/predict", json=body).json()["version"] == "1.0.0"
        export(source, folder, "onnx", "1.1.0")
        assert client.post("/reload").json() == {"version": "1.1.0"}
        whole = (folder / "model.onnx").read_bytes()
        (folder / "model.onnx").write_bytes(whole[:-1] + b"x")
        refused = client.post("/reload")
        assert refused.status_code == 409
        assert refused.json()["detail"].startswith("1.1.0 goes on: ")
        assert client.post("/predict", json=body).json()["version"] == "1.1.0"
        export(of_bundle("fashion-mnist"), folder, "onnx", "2.0.0")
        assert "start a new server for it" in client.post("/reload").json()["detail"]
        assert client.post("/predict", json=body).status_code == 200


def test_a_reload_from_elsewhere_needs_a_key() -> None:
    with TestClient(create_app("digits"), client=("10.0.0.1", 1)) as client:
        assert client.post("/reload").status_code == 403


# A language model.


def test_next_tokens_are_the_models(writer: TestClient) -> None:
    model, texts = language.load("language"), ["In the beginning", "import numpy as"]
    answer = writer.post("/predict", json={"inputs": texts}).json()
    for text, found in zip(texts, answer["predictions"], strict=True):
        k = int(answer["level"].removeprefix("top-"))
        with torch.no_grad():
            wanted = model.network(torch.tensor([[0, *model.encode(text)]]), k).logits[0, -1].argmax()
        assert found["label"] == int(wanted)
        assert found["text"] == model.decode([int(wanted)])
        assert [len(layer) for layer in found["experts"]] == [k] * model.settings.layers


def test_texts_are_those_of_generate_and_stream_the_same(writer: TestClient) -> None:
    model = language.load("language")
    asked = {"prompt": "def main", "tokens": 12, "temperature": 0}
    whole = writer.post("/generate", json=asked).json()
    assert whole["text"] == model.generate("def main", 12, temperature=0)
    assert (whole["finish_reason"], whole["tokens"]) == ("length", 12)
    events = writer.post("/generate", json=asked | {"stream": True}).text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    pieces = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert pieces[-1]["finish_reason"] == "length"


def test_a_seed_repeats_a_text_whatever_is_written_beside_it(writer: TestClient) -> None:
    asked = {"prompt": "The king", "max_tokens": 10, "seed": 5}
    first = writer.post("/v1/completions", json=asked).json()
    assert first["usage"]["completion_tokens"] <= 10
    assert first["object"] == "text_completion"
    again = writer.post("/v1/completions", json=asked).json()
    assert again["choices"] == first["choices"]


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({"prompt": 3}, 422, "prompt: "), ({"prompt": "x", "tokens": 0}, 422, "tokens: "),
        ({"prompt": "x", "tokens": 512}, 422, "from 1 to 511"), ({"prompt": "x", "k": 5}, 422, "1 to 4 experts"),
        ({"prompt": "x", "top_p": 0}, 422, "top_p"), ({"prompt": "x", "more": 1}, 422, "more: "),
    ],
)  # fmt: skip
def test_a_wrong_wish_for_a_text_is_said(writer: TestClient, body: Any, status: int, sentence: str) -> None:
    found = writer.post("/generate", json=body)
    assert (found.status_code, sentence in found.json()["detail"]) == (status, True), found.text


def test_cold_sampling_takes_the_likeliest_token_and_spoils_no_other_text(writer: TestClient) -> None:
    asked = {"prompt": "The", "tokens": 6, "seed": 1}
    wanted = writer.post("/generate", json=asked | {"temperature": 0}).json()["text"]
    for cold in ({"temperature": 1e-300}, {"top_p": 1e-300}):
        assert writer.post("/generate", json=asked | cold).json()["text"] == wanted


def test_long_texts_count_as_several_rows(writer: TestClient) -> None:
    found = writer.post("/predict", json={"inputs": [[5] * 512] * 9})
    assert (found.status_code, "72 usual rows" in found.json()["detail"]) == (413, True)
    mixed = [[5] * 300, [7, 8], [5] * 20]
    together = writer.post("/predict", json={"inputs": mixed}).json()["predictions"]
    alone = [writer.post("/predict", json={"inputs": [row]}).json()["predictions"][0] for row in mixed]
    assert [each["label"] for each in together] == [each["label"] for each in alone]


def test_a_text_of_half_a_character_is_refused(writer: TestClient) -> None:
    found = writer.post("/generate", content=b'{"prompt": "\\ud800"}', headers=JSON)
    assert found.status_code in (400, 422)


# Batches.


SERVICE = Service(("best", "fast"), (1, 64), np.array([[0.001, 0.064], [0.0005, 0.032]]), np.array([1.0, 0.9]))
ONE = (RequestClass(deadline=5.0),)


def _batched(controller: Any, ask: Any, classes: Any = ONE, **more: Any) -> tuple[Any, Any]:
    """Results of the coroutines of `ask(batcher)`, begun together, and the batches that were run."""
    ran = list[tuple[list[int], int]]()

    def run(rows: list[int], level: int) -> list[int]:
        time.sleep(0.5 if 7 in rows else 0.01)
        ran.append((list(rows), level))
        if -1 in rows:
            raise RuntimeError("a broken row")
        return [10 * row for row in rows]

    async def main() -> Any:
        choices = Choices(2, len(classes))
        batcher = Batcher(run, controller(choices, SERVICE, classes), choices, SERVICE, classes, **more)
        batcher.start()
        found = await asyncio.gather(*ask(batcher), return_exceptions=True)
        await batcher.stop()
        return found

    return asyncio.run(main()), ran


def test_each_request_gets_its_own_answers() -> None:
    found, ran = _batched(rule_of("fixed:cap=4,level=1"), lambda b: [b.submit([i, i + 100]) for i in range(6)])
    assert found == [([10 * i, 10 * (i + 100)], 1) for i in range(6)]
    assert [len(rows) for rows, _ in ran] == [4, 4, 4]


def test_a_failed_batch_fails_its_requests_only() -> None:
    found, _ = _batched(rule_of("fixed:cap=1"), lambda b: [b.submit([i]) for i in (1, -1, 2)])
    assert (found[0], str(found[1]), found[2]) == (([10], 0), "a broken row", ([20], 0))


def test_a_full_queue_and_a_late_request() -> None:
    rule = rule_of("fixed:cap=1")
    found, _ = _batched(rule, lambda b: [b.submit([1]), b.submit([2]), b.submit([3])], queue_size=2)
    assert isinstance(found[2], QueueFullError)
    found, ran = _batched(rule, lambda b: [b.submit([7], 0.3), b.submit([2], 0.4), b.submit([3])])
    assert isinstance(found[1], DeadlineError)
    assert [rows for rows, _ in ran] == [[7], [3]]


def test_requests_with_all_kinds_of_deadlines_are_answered_or_given_up() -> None:
    """A request that leaves from the middle of a queue, whose neighbours hold arrays."""
    rows = [np.full(4, number) for number in range(40)]

    async def one(batcher: Any, number: int) -> bool:
        try:
            answers, _ = await batcher.submit([rows[number]] * 2, 0.02 + 0.03 * ((7 * number) % 40))
        except DeadlineError:
            return False
        return bool((answers[0] == 10 * rows[number]).all())

    choices = Choices(2)

    async def main() -> tuple[list[bool], bool]:
        def run(inputs: list[Any], level: int) -> list[Any]:
            time.sleep(0.02)
            return [10 * each for each in inputs]

        batcher = Batcher(run, rule_of("fixed:cap=2")(choices, SERVICE, ONE), choices, SERVICE, ONE)
        batcher.start()
        found = await asyncio.gather(*(one(batcher, number) for number in range(40)))
        alive = batcher.alive
        await batcher.stop()
        return list(found), alive

    found, alive = asyncio.run(main())
    assert alive
    assert True in found


def test_a_choice_that_there_is_not_does_not_stop_the_server() -> None:
    class Wrong:
        def decide(self, seen: Seen, starts: np.ndarray) -> np.ndarray:
            return np.array([10**6])

    found, _ = _batched(lambda *_: Wrong(), lambda b: [b.submit([1]), b.submit([2])])
    assert found == [([10], 0), ([20], 0)]


def test_what_is_running_is_answered_when_the_server_stops() -> None:
    choices = Choices(2)

    async def main() -> Any:
        batcher = Batcher(lambda rows, level: time.sleep(0.3) or rows, rule_of("fixed:cap=1")(choices, SERVICE, ONE),
                          choices, SERVICE, ONE)  # fmt: skip
        batcher.start()
        asked = asyncio.get_running_loop().create_task(batcher.submit([1]))
        await asyncio.sleep(0.1)
        await batcher.stop()
        return await asked

    assert asyncio.run(main()) == ([1], 0)


def test_a_controller_that_only_waits_or_fails_loses_nobody() -> None:
    class Broken:
        def decide(self, seen: Seen, starts: np.ndarray) -> np.ndarray:
            raise ArithmeticError("no")

    class Lazy:
        def decide(self, seen: Seen, starts: np.ndarray) -> np.ndarray:
            return np.zeros(1, dtype=int)

    for made, fails in ((Broken(), True), (Lazy(), False)):
        failures = Counter[str]()
        found, _ = _batched(
            lambda *_, made=made: made, lambda b: [b.submit([1], 0.1), b.submit([2], 0.1)],
            failed=lambda failures=failures: failures.update(["once"]),
        )  # fmt: skip
        assert found == [([10], 0), ([20], 0)]
        assert bool(failures) is fails


def test_orders_take_the_first_deadline_the_highest_value_or_one_class() -> None:
    classes = (RequestClass("slow", deadline=3.0, value=5.0), RequestClass("quick", deadline=2.0))

    class Order:
        def __init__(self, choices: Choices, order: int) -> None:
            self.choice = choices.number(1, 0, order)

        def decide(self, seen: Seen, starts: np.ndarray) -> np.ndarray:
            return np.array([self.choice])

    for order, wanted in ((0, [1, 2, 0]), (1, [0, 1, 2]), (2, [0, 1, 2]), (3, [1, 2, 0])):
        asked = [(0, 0), (1, 1), (2, 1)]
        _, ran = _batched(
            lambda choices, *_, order=order: Order(choices, order),
            lambda b, asked=asked: [b.submit([row], number=number) for row, number in asked], classes,
        )  # fmt: skip
        assert [rows[0] for rows, _ in ran] == wanted


# Rules.


def _seen(queue: int, slack: float = 1.0, age: float = 0.0, rate: float = 0.0) -> Seen:
    one = np.ones(1)
    return Seen(
        np.array([[queue]]), np.array([[age]]), np.array([[slack]]), 0.01 * one, np.full((1, 4), rate),
        np.zeros((1, 2)), 0.02 * one,
    )  # fmt: skip


def _decided(rule: str, seen: Seen) -> tuple[int, int] | None:
    choices = Choices(2)
    choice = rule_of(rule)(choices, SERVICE, (RequestClass(),)).decide(seen, np.array([True]))
    cap, level, _ = choices.parts(choice)
    return None if choice[0] == 0 else (int(cap[0]), int(level[0]))


def test_rules_by_hand() -> None:
    assert _decided("fixed:cap=8,timeout=0.5", _seen(7)) is None
    assert _decided("fixed:cap=8,timeout=0.5", _seen(8)) == (8, 0)
    assert _decided("fixed:cap=8,timeout=0.5,level=1", _seen(1, age=0.6)) == (8, 1)
    assert _decided("slackfit", _seen(1, slack=1.0)) == (64, 0)
    assert _decided("slackfit", _seen(1, slack=0.04)) == (64, 1)  # 32 rows at the best level take as long
    assert _decided("slackfit", _seen(1, slack=0.0001)) == (1, 1)
    assert _decided("thresholds:queues=10,rates=500", _seen(10, rate=500)) == (64, 0)
    assert _decided("thresholds:queues=10,rates=500", _seen(11)) == (64, 1)
    assert _decided("thresholds:queues=10,rates=500", _seen(1, rate=501)) == (64, 1)
    assert _decided("thresholds:queues=10,rates=500,fill=4", _seen(3)) is None
    assert _decided("thresholds:queues=10,rates=500,fill=4", _seen(3, slack=0.01)) == (64, 0)
    # n (since + wait + a) = 1 (.01 + .005 + .001) against .95 of 20 ms
    assert _decided("regression", _seen(1)) is None
    assert _decided("regression", _seen(2)) == (64, 0)
    assert _decided("adaptive:timeout=0", _seen(1)) == (1, 0)


@pytest.mark.parametrize("rule", ["thresholds:queues=10,rates=500,fill=64,margin=0", "plan:margin=0", "slackfit"])
def test_rules_take_the_present_speed_into_account(rule: str) -> None:
    same, changed = 0, 0
    for queue, slack in itertools.product((1, 3, 8, 20), np.geomspace(0.001, 0.2, 24)):
        seen = _seen(queue, slack, rate=300.0)
        usual = _decided(rule, seen)
        seen.slow = np.ones(1)
        same += usual == _decided(rule, seen)
        seen.slow = np.array([2.0])
        changed += usual != _decided(rule, seen)
    assert (same, changed > 0) == (96, True)


def test_the_server_learns_how_slow_batches_are() -> None:
    seen = []

    class Watching(Fixed):
        def decide(self, seen_now: Seen, starts: np.ndarray) -> np.ndarray:
            seen.append(seen_now.slow[0])
            return super().decide(seen_now, starts)

    _batched(lambda choices, *_: Watching(choices, cap=1), lambda b: [b.submit([row]) for row in range(10, 30)])
    assert seen[0] == 1.0
    assert 3.9 < seen[-1] <= 4.0  # a row takes 10 ms and is known to take 1 ms; no batch counts more than 4


def test_one_class_at_a_time_by_hand() -> None:
    classes, choices = (RequestClass("a"), RequestClass("b", deadline=1.0)), Choices(2, 2)
    text = "by-class:levels=1/0,caps=8/4,fills=4/8,leads=0.01/0.1,queues=20/100"
    rule = rule_of(text)(choices, SERVICE, classes)

    def decided(queue: list[int], slack: list[float]) -> tuple[int, int, int] | None:
        seen = Seen(np.array([queue]), np.zeros((1, 2)), np.array([slack]), np.ones(1), np.zeros((1, 4)),
                    np.zeros((1, 2)), np.zeros(1))  # fmt: skip
        choice = rule.decide(seen, np.array([True]))
        cap, level, order = (int(each[0]) for each in choices.parts(choice))
        return None if choice[0] == 0 else (cap, level, order)

    assert decided([3, 7], [0.5, 0.5]) is None  # neither is full or near
    assert decided([4, 7], [0.5, 0.5]) == (8, 1, 2)
    assert decided([3, 8], [0.5, 0.5]) == (4, 0, 3)
    assert decided([4, 8], [0.5, 0.55]) == (4, 0, 3)  # 0.45 is before 0.49
    assert decided([1, 2], [0.0104, 0.5]) == (8, 1, 2)  # 0.5 ms and 10 ms
    assert decided([0, 2], [NEVER, 0.1015]) == (4, 0, 3)  # 2 ms and 0.1 s
    assert decided([10, 95], [0.5, 0.3]) == (4, 1, 3)  # more than 100 rows wait
    with pytest.raises(ValueError, match="for several classes, and needs levels, caps, fills, leads, queues"):
        rule_of(text)(Choices(2), SERVICE, ONE)
    with pytest.raises(ValueError, match="the model has 1, from 0"):
        rule_of(text)(Choices(1, 2), SERVICE, classes)


def test_the_adaptive_cap_grows_and_shrinks() -> None:
    choices = Choices(1)
    rule = rule_of("adaptive:target=0.1,decrease=0.5")(choices, SERVICE, (RequestClass(),))
    caps = []
    for number, seconds in enumerate((0.01, 0.01, 0.01, 0.2)):
        seen = _seen(50)
        seen.last = np.array([[number + 1.0, seconds]])
        caps.append(int(choices.parts(rule.decide(seen, np.array([number == 0])))[0][0]))
    assert caps == [2, 2, 4, 2]  # 2, 3, 4, 2 rounded down to a cap that there is


def test_the_adaptive_cap_counts_batches_that_are_alike() -> None:
    choices = Choices(1)
    rule = rule_of("adaptive:target=0.1,timeout=1")(choices, SERVICE, (RequestClass(),))
    caps = []
    for number in range(7):
        seen = _seen(50 if number < 6 else 1)  # at last it waits
        seen.last = np.array([[2.0, 0.01]]) * (number > 0)
        seen.age[:] = 0
        choice = rule.decide(seen, np.array([number == 0]))
        caps.append(int(choices.parts(choice)[0][0]) if choice != WAITS else 0)
    assert caps == [1, 2, 2, 4, 4, 4, 0]  # 1 to 6
    seen.queue[:] = 50
    assert choices.parts(rule.decide(seen, np.array([False])))[0] == 4  # no batch came: still 7
    assert choices.parts(rule.decide(seen, np.array([False])))[0] == 8


@pytest.mark.parametrize(
    "text",
    [
        "slackfi",
        "fixed:cop=1",
        "fixed:cap=x",
        "fixed:level=2",
        "thresholds:queues=1",
        "thresholds:queues=1/2,rates=1/2",
        "plan:order=1",
        "thresholds:cap=16",
        "plan:scale=7",
        "fixed:level=0.5",
        "fixed:cap=8/16",
        "fixed:timeout=-1",
        "fixed:timeout=nan",
        "slackfit:buckets=0",
        "adaptive:decrease=1.2",
    ],
)
def test_unknown_rules_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not|level|queues|order|scale|at least|between"):
        rule_of(text)(Choices(2), SERVICE, (RequestClass(),))


@given(st.integers(1, 3), st.integers(1, 3), st.data())
@settings(max_examples=50)
def test_choices_have_numbers(levels: int, classes: int, data: Any) -> None:
    choices = Choices(levels, classes)
    every = np.arange(1, len(choices))
    np.testing.assert_array_equal(choices.number(*choices.parts(every)), every)
    cap = data.draw(st.integers(1, 200))
    assert choices.parts(choices.number(cap, 0))[0] == max(each for each in CAPS if each <= cap)


def test_request_classes_are_checked() -> None:
    for wrong in ({"deadline": 0}, {"deadline": 2 * NEVER}, {"value": -1}, {"size": 0}):
        with pytest.raises(ValueError, match="needs"):
            RequestClass(**wrong)  # type: ignore[arg-type]


def test_an_application_is_started_once() -> None:
    app = create_app("digits")
    with TestClient(app):
        pass
    with pytest.raises(RuntimeError, match="started before"), TestClient(app):
        pass


def test_a_queue_that_fails_again_and_again_leaves_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    choices, failures = Choices(len(SERVICE.levels), 1), list[int]()

    def fails() -> None:
        failures.append(1)
        raise ValueError("always")

    async def wait() -> None:
        batcher = Batcher(
            lambda rows, level: rows, rule_of("fixed:cap=1")(choices, SERVICE, ONE), choices, SERVICE, ONE
        )
        monkeypatch.setattr(batcher, "_step", fails)
        batcher.start()
        await asyncio.sleep(0.2)
        assert batcher.alive
        await batcher.stop()

    asyncio.run(wait())
    assert 1 < len(failures) <= 0.2 / WAIT + 2
