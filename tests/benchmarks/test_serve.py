"""`moe-serve` as a process: what it has begun it ends, and several processes serve one model."""

import json
import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")
import httpx
import psutil

from benchmarks.programs.service import CODE, service
from experts import bundle
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
