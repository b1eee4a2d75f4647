"""The dashboard reads runs and servers, and its page works in a browser."""

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from agents import runs
from tests.processes import free_port, running, wait_until

pytest.importorskip("dash")
from benchmarks.dashboard import data, figures

ENV = "moe_envs:MoERouting-v0"
PARETO = '[aria-label="Quality against cost of each run"]'
SHORT: dict[str, Any] = {"n_envs": 4, "n_steps": 32, "batch_size": 64, "total_timesteps": 512}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        runs.train(ENV, "ppo", seed, found / str(seed), {"bundle": "digits"}, SHORT)
    return found


def test_runs_of_a_folder_are_grouped_by_all_but_the_seed(folder: Path) -> None:
    trained, problems = data.read_runs(data.find_runs([folder]))
    assert problems == []
    assert [(each.name, each.seed) for each in trained] == [("0", 0), ("1", 1)]
    assert {each.group for each in trained} == {"MoERouting-v0 ppo own bundle=digits"}
    (band,) = data.bands(trained).values()
    ends = [each.curve["return"].iloc[-1] for each in trained]
    assert band["mean"].iloc[-1] == pytest.approx(np.mean(ends), abs=0.05)
    assert (band["low"] <= band["mean"]).all()
    for each in trained:
        episodes = pd.read_csv(folder / each.name / "episodes.csv")
        last = episodes[episodes["timesteps"] >= 0.9 * episodes["timesteps"].max()]
        assert each.last["return"] == pytest.approx(last["return"].mean())


def test_a_damaged_run_is_said_and_the_others_are_shown(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "runs")
    (tmp_path / "runs" / "1" / "run.json").write_text("{")
    trained, problems = data.read_runs(data.find_runs([tmp_path / "runs"]))
    assert len(trained) == 1
    assert "runs/1: " in problems[0]
    with pytest.raises(ValueError, match="holds no run"):
        data.find_runs([tmp_path / "runs" / "0" / "best"])


def test_the_front_joins_what_no_run_beats() -> None:
    points = {"a": (0.2, 0.8), "b": (0.3, 0.7), "c": (0.1, 0.5)}
    empty = pd.DataFrame()
    trained = [data.TrainedRun(name, name, 0, empty, empty, {"cost": cost, "quality": quality})
               for name, (cost, quality) in points.items()]  # fmt: skip
    front = figures.pareto(trained).data[-1]
    assert (list(front.x), list(front.y)) == ([0.1, 0.2], [0.5, 0.8])


def test_every_shipped_profile_is_shown() -> None:
    names = data.profiles()
    assert {"language: serving", "digits: profile", "language: loads"} <= set(names)
    for path in names.values():
        times = data.times(path)
        assert (times["ms"] > 0).all()
        assert len(figures.costs(times).data) == times["operation"].nunique()


def test_routing_shares_sum_to_the_experts_of_a_token() -> None:
    for shares in data.routing("language").values():
        np.testing.assert_allclose(shares.sum(1), 4, rtol=1e-5)


TEXT = """# HELP moe_requests_total x
moe_requests_total{{code="200",path="/predict"}} {done}
moe_request_seconds_bucket{{le="0.01",path="/predict"}} {fast}
moe_request_seconds_bucket{{le="0.1",path="/predict"}} {done}
moe_request_seconds_bucket{{le="+Inf",path="/predict"}} {done}
moe_batch_rows_sum {rows}
moe_batch_rows_count {batches}
moe_batch_seconds_count{{level="top-1"}} {batches}
moe_queue_rows 3
moe_expert_rows_total{{expert="1/2"}} {rows}
"""


def test_what_a_server_counted_since_the_look_before() -> None:
    first, second = (
        data.samples(TEXT.format(done=done, fast=fast, rows=rows, batches=batches))
        for done, fast, rows, batches in ((0, 0, 0, 0), (100, 50, 300, 60))
    )
    found = data._since((10.0, first), (20.0, second))
    assert found["codes"] == {"200": 10}
    assert (found["p50"], found["p95"]) == (pytest.approx(0.01), pytest.approx(0.01 + 0.9 * 0.09))
    assert (found["rows"], found["queue"], found["levels"]) == (5, 3, {"top-1": 6})
    quiet = data._since((10.0, second), (20.0, second))
    assert (quiet["p95"], quiet["rows"]) == (None, None)


def test_a_server_that_does_not_answer_is_said() -> None:
    watched = data.Watched("http://127.0.0.1:9")
    watched.look()
    assert watched.problem is not None
    assert "does not answer" in watched.problem


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs chromium: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", f"user-data-dir={tmp_path}"):  # fmt: skip
        options.add_argument(f"--{word}")
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield found
    found.quit()


def _listens(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) == 0


def _barriers(browser: Any) -> dict[str, list[str]]:
    """What axe finds serious for people who see badly or use no mouse, and where."""
    axe = pytest.importorskip("axe_core_python.selenium")
    return {each["id"]: [node["html"] for node in each["nodes"]]
            for each in axe.Axe().run(browser)["violations"] if each["impact"] in ("serious", "critical")}  # fmt: skip


def test_the_page_in_a_browser(folder: Path, browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def wait(selector: str) -> Any:
        return WebDriverWait(browser, 120).until(lambda page: page.find_elements(By.CSS_SELECTOR, selector))

    code = "from benchmarks.cli.main import dashboard; dashboard()"
    port = free_port()
    command = [sys.executable, "-c", code, str(folder), "--server", "http://127.0.0.1:9", "--port", str(port)]
    with running(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: _listens(port), process)
        browser.get(f"http://127.0.0.1:{port}")
        wait("#curves-figure .main-svg")
        assert "MoERouting-v0 ppo own bundle=digits" in browser.page_source
        found = _barriers(browser)
        for tab, selector in (("Pareto fronts", f"{PARETO} .main-svg"), ("Experts", "#experts-figure .main-svg"),
                              ("Cost profile", "#costs-figure .main-svg"), ("Server", "[role=alert]")):  # fmt: skip
            next(each for each in browser.find_elements(By.CSS_SELECTOR, ".tab") if each.text == tab).click()
            wait(selector)
            found |= {f"{tab}: {name}": where for name, where in _barriers(browser).items()}
        assert found == {}
        script = "return document.querySelector('[role=alert]').innerText"  # at once: the page replaces it
        assert "does not answer" in browser.execute_script(script)
        severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert [each for each in severe if "favicon" not in each["message"]] == []
