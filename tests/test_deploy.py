"""The files for operations fit the server: its metrics, its command, its health checks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("prometheus_client")
from experts.serving.metrics import Metrics

DEPLOY = Path(__file__).parent.parent / "deploy"
METRIC = re.compile(r"\bmoe_[a-z_]+")


def exported() -> set[str]:
    """Names of all metrics that a server has, once it has counted something of each."""
    metrics = Metrics()
    metrics.requests.labels("/predict", 200).inc()
    metrics.latency.labels("/predict").observe(0.1)
    metrics.batch_seconds.labels("top-1").observe(0.1)
    metrics.experts.labels("0").inc()
    metrics.reloads.labels("loaded").inc()
    metrics.serve_version("1.0.0")
    return {line.split("{")[0].split(" ")[0] for line in metrics.text().decode().splitlines() if line[0] != "#"}


def expressions() -> dict[str, list[str]]:
    alerts = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())
    board = json.loads((DEPLOY / "grafana/dashboards/moe-serve.json").read_text())
    return {
        "alerts": [rule["expr"] for group in alerts["groups"] for rule in group["rules"]],
        "dashboard": [target["expr"] for panel in board["panels"] for target in panel["targets"]],
    }


@pytest.mark.parametrize("source", ["alerts", "dashboard"])
def test_every_metric_that_is_asked_for_is_there(source: str) -> None:
    known = exported()
    for expression in expressions()[source]:
        assert set(METRIC.findall(expression)) <= known, expression
        assert expression.count("(") == expression.count(")")


def test_alerts_are_at_what_was_asked_for() -> None:
    slow, failed, *_ = expressions()["alerts"]
    assert slow.endswith("> 0.15")
    assert failed.endswith("> 0.01")


def test_the_pods_are_probed_where_the_server_answers_and_have_no_rights() -> None:
    documents = {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "kubernetes/moe-serve.yaml").read_text())}
    pod: Any = documents["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")} == {
        "/health/ready", "/health/live",
    }  # fmt: skip
    assert pod["securityContext"]["runAsNonRoot"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert documents["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "moe-serve"
    labels = documents["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert documents["Service"]["spec"]["selector"].items() <= labels.items()


def test_the_image_copies_every_package_and_runs_as_a_user() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    for package in ("agents", "benchmarks", "cost", "experts", "moe_envs"):
        assert f"COPY {package} {package}" in text
    assert text.index("\nUSER 10001") < text.index("\nENTRYPOINT")
    assert ":latest" not in text + (DEPLOY / "compose.yaml").read_text()
