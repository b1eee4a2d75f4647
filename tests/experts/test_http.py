"""The server's process: it closes what does not come, refuses too many, and lives through them."""

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

pytest.importorskip("uvicorn")
import uvicorn

from experts.serving import http
from experts.serving.app import create_app
from experts.serving.control import RequestClass

ASK = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"


@pytest.fixture
def app() -> Any:
    return create_app("digits")


@contextmanager
def listening(app: Any, connections: int = 100) -> Iterator[tuple[int, http.Admission]]:
    """The port of a server in a thread, and its admission."""
    config = http.config_of(app, "127.0.0.1", 0, connections)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1], config.http.admission  # type: ignore[union-attr]
    server.should_exit = True
    thread.join(30)


def _ask(port: int, raw: bytes) -> bytes:
    """What comes until the server closes the connection, or an answer with a body."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as found:
        found.sendall(raw)
        answer = b""
        while part := found.recv(65536):
            answer += part
            head, end, body = answer.partition(b"\r\n\r\n")
            if end and len(body) >= int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]):
                break
    return answer


def test_a_request_that_does_not_come_whole_is_closed(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.3)
    with listening(app) as (port, _):
        for begun in (b"", b"POST /predict HTTP/1.1\r\nX-Slow: "):
            assert _ask(port, begun).startswith(b"HTTP/1.1 408 ")
        body = b'{"inputs": [[1]]}'
        assert b"a list of 64 numbers" in _ask(port, ASK % (len(body), body))


def test_garbage_and_too_many_connections(app: Any) -> None:
    with listening(app, connections=2) as (port, _):
        assert b" 400 " in _ask(port, b"\x00\x01garbage\r\n\r\n").split(b"\r\n")[0]
        with socket.create_connection(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)):
            time.sleep(0.2)
            assert _ask(port, b"").startswith(b"HTTP/1.1 503 ")


def test_predictions_beyond_half_a_deadline_are_refused_unread(app: Any) -> None:
    body = b'{"inputs": [[1]]}'
    with listening(app) as (port, admission):
        assert b" 422 " in _ask(port, ASK % (len(body), body))
        until = time.monotonic() + 30
        while admission.inside and time.monotonic() < until:  # the answer is here before it is counted there
            time.sleep(0.01)
        assert admission.inside == 0
        admission.inside = 10**6
        refused = _ask(port, ASK % (len(body), body))
        assert refused.startswith(b"HTTP/1.1 429 ")
        assert b"retry-after: 1" in refused.lower()
        assert b" 200 " in _ask(port, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        admission.inside = 0
        assert b" 422 " in _ask(port, ASK % (len(body), body))


def test_requests_that_can_wait_long_are_not_refused_for_the_sake_of_those_that_cannot() -> None:
    classes = RequestClass("quick", deadline=0.1), RequestClass("bulk", deadline=4.0)
    admission = http.Admission(create_app("digits", classes=classes))
    admission.capacity, admission.inside = 100.0, 199
    assert isinstance(admission.enter(), http.Prediction)
    admission.inside = 200
    assert not isinstance(admission.enter(), http.Prediction)


def test_the_capacity_is_learned_from_what_was_answered(app: Any) -> None:
    admission = http.Admission(app)
    before, admission.inside = admission.capacity, 10**6
    admission.enter()
    admission._since -= 1.0
    admission._done = 99
    admission.answered()
    assert admission.capacity == pytest.approx(before + (100 - before) / 4, rel=0.05)


def test_the_time_without_requests_does_not_lower_the_capacity(app: Any) -> None:
    admission = http.Admission(app)
    before, admission._since = admission.capacity, admission._since - 100.0
    admission.enter()
    admission.inside = 10**6
    admission.enter()
    admission.answered()
    assert admission.capacity == before


def test_predictions_count_once_they_have_come_whole(app: Any) -> None:
    with listening(app) as (port, admission):
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(admission_limit(admission) + 5)]
        for each in slow:
            each.sendall(ASK[: ASK.index(b"%d")] + b"100\r\n\r\n")
        body = b'{"inputs": [[1]]}'
        assert b" 422 " in _ask(port, ASK % (len(body), body))
        for each in slow:
            each.close()


def admission_limit(admission: http.Admission) -> int:
    admission.capacity = 1.0
    return http.LEAST


def test_requests_that_are_too_long_are_closed(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEAD_SECONDS", 5.0)
    with listening(app) as (port, _):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as found:
            found.sendall(b"GET /health HTTP/1.1\r\nX-Long: ")
            with pytest.raises(OSError, match=r"reset|[Pp]ipe"):  # noqa: PT012
                for _ in range(2000):
                    found.sendall(b"x" * 65_536)
        chunks = b"POST /nothing HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=30) as found:
            found.sendall(chunks)
            with pytest.raises(OSError, match=r"reset|[Pp]ipe"):  # noqa: PT012
                for number in range(2000):
                    found.sendall(b"X-%d: %s\r\n" % (number, b"y" * 20_000))


def test_a_body_that_goes_on_after_the_answer_is_closed(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_SECONDS", 0.3)
    with listening(app) as (port, _), socket.create_connection(("127.0.0.1", port), timeout=30) as found:
        found.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        found.sendall(b"x")
        answer = b""
        while part := found.recv(65_536):  # until the server closes the connection
            answer += part
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_other_spellings_of_a_path_are_counted_alike() -> None:
    for url in (b"/predict", b"/predict?x=1", b"http://x/predict", b"/%70redict"):
        assert http._path(url) == "/predict"
    for url in (b"/predictX", b"*", b"\xff", b""):
        assert http._path(url) != "/predict"


def test_each_request_is_a_span(app: Any) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    with listening(app) as (port, _):
        _ask(port, b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: seven\r\nConnection: close\r\n\r\n")
    (span,) = (each for each in exporter.get_finished_spans() if each.parent is None)
    assert (span.name, span.attributes["request.id"]) == ("GET /health", "seven")


@pytest.mark.parametrize(
    ("model", "examples", "limits"),
    [("digits", 40, {}), ("digits", 5, {"keys": ("secret",)}), ("digits", 5, {"rate": 0.5}), ("language", 4, {})],
)
def test_answers_are_of_the_schema(model: str, examples: int, limits: dict[str, Any]) -> None:
    """For requests drawn from the OpenAPI schema, and for such that break it."""
    schemathesis = pytest.importorskip("schemathesis")
    modes, errors = schemathesis.GenerationMode, schemathesis.checks.not_a_server_error
    drawn = settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                     suppress_health_check=list(HealthCheck))  # fmt: skip
    app = create_app(model, **limits)
    operations = [each.ok() for each in schemathesis.openapi.from_dict(app.openapi()).get_all_operations()]
    with listening(app) as (port, _):
        assert len(operations) == 9
        for operation, mode in itertools.product(operations, modes):
            if mode is modes.NEGATIVE and not len(operation.body):
                continue  # there is nothing to break

            @drawn
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                answer = case.call_and_validate(f"http://127.0.0.1:{port}", excluded_checks=[errors], timeout=60)
                assert answer.status_code < 500 or answer.status_code == 504  # a deadline that was too short

            check()
