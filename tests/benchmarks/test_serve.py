"""`moe-serve` as a process: what it has begun it ends, and several processes serve one model."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")
import httpx
import numpy as np
import psutil

from benchmarks.experiments.serving import joined, outcome, tuned_text
from benchmarks.programs.sender import Sent
from benchmarks.programs.service import CODE, service
from experts import bundle
from experts.serving.control import RequestClass, Service
from experts.serving.rules import rule_of
from tests.processes import free_port, running, wait_until

ASK = {"prompt": "In the", "tokens": 60, "seed": 0, "stream": True}


def test_a_text_that_is_being_written_is_ended_before_the_server() -> None:
    with service("language") as server:
        url = f"http://127.0.0.1:{server.port}"
        with httpx.stream("POST", f"{url}/generate", json=ASK, timeout=60) as answer:
            lines = answer.iter_lines()
            events = [next(lines)]
            os.kill(server.process.pid, signal.SIGTERM)
            events += [line for line in lines if line]
        assert json.loads(events[-2].removeprefix("data: "))["finish_reason"] in ("length", "stop")
        assert events[-1] == "data: [DONE]"
        server.process.wait(30)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


@pytest.mark.skipif("MOE_ENVS_LONG" not in os.environ, reason="takes a minute: make test-long")
def test_several_processes_serve_one_model() -> None:
    pytest.importorskip("ray.serve", reason="needs the extra ray")
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-c", CODE, "digits", "--port", url.rpartition(":")[2], "--workers", "2", "--quiet"]

    def ready() -> bool:
        try:
            return bool(httpx.get(f"{url}/health").status_code == 200)
        except httpx.TransportError:
            return False

    with running(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process, httpx.Client() as client:
        wait_until(ready, process)
        row = bundle.load("digits").examples[0].tolist()
        answers = [client.post(f"{url}/predict", json={"inputs": [row]}) for _ in range(20)]
        assert {each.status_code for each in answers} == {200}
        assert len({each.json()["predictions"][0]["label"] for each in answers}) == 1
        assert client.post(f"{url}/predict", json={"inputs": [[1]]}).status_code == 422
        names = [" ".join(each.cmdline()) for each in psutil.Process(process.pid).children(recursive=True)]
        assert sum("ServeReplica" in name for name in names) == 2
        process.send_signal(signal.SIGINT)
        process.wait(60)


def test_what_answers_are_worth_by_hand() -> None:
    classes = (RequestClass("quick", deadline=0.1), RequestClass("careful", deadline=1.0, value=2.0, care=2.0))
    known = Service(("best", "fast"), (1,), np.ones((2, 1)), np.array([1.0, 0.9]))
    best, fast = b'{"level": "best"}', b'{"level": "fast"}'
    answers = [best, fast, best, b"", fast, fast]
    latency = np.array([0.05, 0.05, 0.2, 0.001, 0.5, 0.05])  # in time, in time, late, refused, in time, in time
    sent = Sent(latency, np.array([200, 200, 200, 429, 200, 200]), answers, 1.0)
    found = outcome(sent, np.array([0, 0, 0, 1, 1, 1]), classes, known, 0.1, 0.5)
    worth = 1 + 0.9 + 2 * (2 * 0.8)
    assert found["lost"] == pytest.approx(1 - worth / 9)
    assert found["return"] == pytest.approx(worth / 9 - 1 - 0.05)
    assert found["in time"] == pytest.approx(4 / 6)
    assert found["levels"] == {"best": pytest.approx(1 / 4), "fast": pytest.approx(3 / 4)}
    assert found["p95"] == {"quick": pytest.approx(0.185), "careful": pytest.approx(0.4775)}
    nobody = Sent(np.ones(1), np.array([429]), [b""], 1.0)
    assert outcome(nobody, np.array([1]), classes, known, 0.1, 0.0)["p95"] == {"quick": None, "careful": None}


def test_turns_are_joined_in_their_order() -> None:
    first = Sent(np.array([0.1, 0.2]), np.array([200, 429]), [b"a", b""], 2.0)
    found = joined([first, Sent(np.array([0.3]), np.array([200]), [b"b"], 1.5)])
    assert found.latency.tolist() == [0.1, 0.2, 0.3]
    assert found.status.tolist() == [200, 429, 200]
    assert found.answers == [b"a", b"", b"b"]
    assert found.seconds == 3.5


def test_a_rule_is_tuned_once(tmp_path: Path) -> None:
    kwargs = {"classes": "mixed", "seconds": 0.5}
    text = tuned_text("by class", 1, tmp_path, kwargs)
    assert text.startswith("by-class:levels=")
    rule_of(text)
    (kept,) = tmp_path.glob("rule-*.json")
    changed = kept.stat().st_mtime_ns
    assert tuned_text("by class", 1, tmp_path, kwargs) == text
    assert kept.stat().st_mtime_ns == changed
