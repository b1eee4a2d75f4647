"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("moe_requests", "Requests by path and status.", ["path", "code"], registry=registry)
        self.latency = Histogram(
            "moe_request_seconds", "Seconds from request to answer.", ["path"], buckets=SECONDS, registry=registry
        )
        self.refused = Counter("moe_refused", "Predictions answered 429 before they were read.", registry=registry)
        self.failures = Counter(
            "moe_controller_failures", "Decisions in which the controller failed.", registry=registry
        )
        self.flying = Gauge("moe_requests_in_flight", "Requests that are being answered.", registry=registry)
        self.queue = Gauge("moe_queue_rows", "Rows that wait for a batch.", registry=registry)
        self.writing = Gauge("moe_texts_in_writing", "Texts that are being written.", registry=registry)
        self.batch_rows = Histogram("moe_batch_rows", "Rows of a batch.", buckets=ROWS, registry=registry)
        self.batch_seconds = Histogram(
            "moe_batch_seconds", "Seconds of a batch in the model.", ["level"], buckets=SECONDS, registry=registry
        )
        self.experts = Counter("moe_expert_rows", "Rows that ran an expert.", ["expert"], registry=registry)
        self.tokens = Counter("moe_tokens_written", "Tokens written.", registry=registry)
        self.reloads = Counter("moe_reloads", "Reloads by outcome.", ["outcome"], registry=registry)
        self.model = Gauge("moe_model", "1 for the model that answers.", ["version"], registry=registry)

    def watch(self, queue: Callable[[], float], writing: Callable[[], float]) -> None:
        """Read these when they are asked for."""
        self.queue.set_function(queue)
        self.writing.set_function(writing)

    def serve_version(self, version: str) -> None:
        """This version answers from now on."""
        self.model.clear()
        self.model.labels(version).set(1)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
