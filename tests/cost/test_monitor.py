"""The monitor finds what is slow, changes nothing, and leaves nothing behind."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from cost.energy import proxy_joules
from cost.monitor import FORWARDS, Monitor

Pair = tuple[nn.Module, torch.optim.Optimizer]


class SleepInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return gradient


class Sleepy(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return SleepInBackward.apply(super().forward(x))  # type: ignore[no-untyped-call]


def pair(layer: type[nn.Linear] = nn.Linear) -> Pair:
    torch.manual_seed(0)
    model = nn.Sequential(layer(8, 16), nn.ReLU(), nn.Linear(16, 3))
    return model, torch.optim.Adam(model.parameters())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, monitor: Monitor | None = None) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(32, 8, generator=generator)
        loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        if monitor:
            monitor.record(loss=loss, accuracy=0.5)
        optimizer.step()


@pytest.mark.usefixtures("clock")
def test_it_finds_what_is_slow(tmp_path: Path) -> None:
    model, optimizer = pair(Sleepy)
    optimizer.register_step_pre_hook(lambda *_: None)
    with Monitor(model, optimizer, every=1, path=tmp_path) as monitor:
        train(model, optimizer, 6)
        row = monitor.end_epoch()
    found = [row[name] for name in ("forward", "backward", "optimizer", "seconds")]
    assert found == pytest.approx([0.01, 0.02, 0, 6 * 0.03], abs=1e-3)


def test_the_logs_say_all(tmp_path: Path) -> None:
    model, optimizer = pair()
    with Monitor(model, optimizer, every=5, path=tmp_path, interval=0.01) as monitor:
        for _ in range(2):
            train(model, optimizer, 50, monitor)
            time.sleep(0.03)
            monitor.end_epoch(validation_accuracy=0.9)
        train(model, optimizer, 10)
    batches, epochs = pd.read_csv(tmp_path / "batches.csv"), pd.read_csv(tmp_path / "epochs.csv")
    assert batches["batch"].tolist() == list(range(5, 110, 5))  # the FLOPs of batch 0 are counted
    assert batches["epoch"].tolist() == [0] * 9 + [1] * 10 + [2] * 2
    assert (batches[["forward", "backward", "optimizer", "rss", "energy"]] > 0).all().all()
    assert (batches["forward"] + batches["backward"] + batches["optimizer"] <= batches["total"]).all()
    lines = (tmp_path / "batches.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines[:19]] == batches["loss"].tolist()[:19]
    assert epochs["batches"].tolist() == [50, 50, 10]
    assert epochs["measured"].tolist() == [9, 10, 2]
    assert epochs["accuracy"].tolist()[:2] == [0.5, 0.5]
    assert epochs["validation_accuracy"].tolist()[:2] == [0.9, 0.9]
    assert epochs["loss"][1] < epochs["loss"][0]
    assert epochs["forward"][0] == pytest.approx(batches[batches["epoch"] == 0]["forward"].median())
    about = json.loads((tmp_path / "monitor.json").read_text())
    assert about["energy_source"].startswith(("proxy", "RAPL"))
    assert about["units"]["forward"] == "s"
    assert len(pd.read_csv(tmp_path / "process.csv")) >= 3


def test_the_proxy_of_a_batch_by_hand(tmp_path: Path) -> None:
    model, optimizer = pair()
    with Monitor(model, optimizer, every=1, path=tmp_path) as monitor:
        if monitor._counter is not None:
            pytest.skip("this machine has an energy counter")
        train(model, optimizer, 3)
    flops, weights = 2 * 32 * (8 * 16 + 16 * 3), 4 * (8 * 16 + 16 + 16 * 3 + 3)
    made = 4 * 32 * (16 + 16)  # the peak is where ReLU has made its answer and its input is still held
    assert pd.read_csv(tmp_path / "batches.csv")["energy"][0] == pytest.approx(
        FORWARDS * proxy_joules(flops, weights, made)
    )


def test_it_changes_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    plain, watched = pair(), pair()
    train(*plain, steps=20)
    threads = threading.active_count()
    monitor = Monitor(*watched, every=1, path=tmp_path).start()
    train(*watched, steps=20, monitor=monitor)
    monitor.close()
    monitor.close()
    for ours, theirs in zip(watched[0].parameters(), plain[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    model, optimizer = watched
    hooks = model._forward_hooks, model._forward_pre_hooks
    hooks += optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks  # type: ignore[attr-defined]
    assert not any(hooks)
    assert threading.active_count() == threads
    size = (tmp_path / "batches.csv").stat().st_size
    train(*watched, steps=5)
    assert (tmp_path / "batches.csv").stat().st_size == size


@pytest.mark.usefixtures("clock")
def test_accumulated_gradients_are_one_batch_and_evaluation_is_none(tmp_path: Path) -> None:
    model, optimizer = pair(Sleepy)
    with Monitor(model, optimizer, every=1, path=tmp_path):
        for _ in range(3):
            for _ in range(2):
                model(torch.ones(4, 8)).sum().backward()
            model.eval()
            model(torch.ones(4, 8))
            model.train()
            with torch.no_grad():
                model(torch.ones(4, 8))
            optimizer.step()
    batches = pd.read_csv(tmp_path / "batches.csv")
    assert batches["batch"].tolist() == [1, 2]
    assert batches["forward"].to_numpy() == pytest.approx(0.02, abs=1e-3)
    assert batches["backward"].to_numpy() == pytest.approx(0.04, abs=1e-3)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"unused": self.head(x), "both": (SleepInBackward.apply(self.head(x)), None)}  # type: ignore[no-untyped-call]


@pytest.mark.usefixtures("clock")
def test_a_backward_pass_of_several_forwards_and_outputs_is_whole(tmp_path: Path) -> None:
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters())
    with Monitor(model, optimizer, every=1, path=tmp_path):
        for failing in (False, True, False, False):
            (model(x=torch.ones(4, 8))["both"][0] - model(x=torch.ones(4, 8))["both"][0]).sum().backward()
            if failing:  # a batch that the loop skips, as one that ran out of memory
                model(x=torch.ones(4, 8))["both"][0].register_hook(lambda gradient: 1 / 0)
            optimizer.step()
    batches = pd.read_csv(tmp_path / "batches.csv")
    assert batches["batch"].tolist() == [1, 2, 3]
    assert batches["backward"].to_numpy() == pytest.approx(0.04, abs=1e-3)
    with Monitor(model, optimizer, every=1, path=tmp_path / "none", interval=0.01):
        for _ in range(2):
            model(x=torch.ones(4, 8))
            optimizer.step()
    assert pd.read_csv(tmp_path / "none" / "batches.csv")["backward"].isna().all()


@pytest.mark.usefixtures("clock")
def test_energy_of_a_counter_is_power_times_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class TenWatts:
        source, window = "ten watts", 0.01

        def joules(self) -> float:
            return 10 * time.perf_counter()

    monkeypatch.setattr("cost.monitor.open_counter", lambda device: TenWatts())
    model, optimizer = pair(Sleepy)
    with Monitor(model, optimizer, every=1, path=tmp_path, interval=0.05) as monitor:
        train(model, optimizer, 6)
        row = monitor.end_epoch()
    batches = pd.read_csv(tmp_path / "batches.csv")
    assert batches["energy"].tolist() == pytest.approx((10 * batches["total"]).tolist(), rel=0.05)
    assert row["energy"] == pytest.approx(10 * row["seconds"], rel=0.05)
    assert json.loads((tmp_path / "monitor.json").read_text())["energy_source"] == "ten watts"


def test_values_that_are_not_finite_are_kept_readable_and_said(tmp_path: Path) -> None:
    model, optimizer = pair()
    with Monitor(model, optimizer, every=1, path=tmp_path) as monitor:
        for loss in (1.0, float("nan"), 2.0):
            model(torch.ones(4, 8)).sum().backward()
            monitor.record(loss=loss)
            optimizer.step()
        assert monitor.end_epoch()["finite"] is False
    assert [json.loads(line)["loss"] for line in (tmp_path / "batches.jsonl").read_text().splitlines()] == [None, 2.0]
    assert json.loads((tmp_path / "epochs.jsonl").read_text())["loss"] is None


def test_many_shapes_are_priced_by_their_elements(tmp_path: Path) -> None:
    model, optimizer = pair()
    with Monitor(model, optimizer, every=1, path=tmp_path) as monitor:
        if monitor._counter is not None:
            pytest.skip("this machine has an energy counter")
        for rows in (*range(1, 9), 80, 800):
            model(torch.ones(rows, 8)).sum().backward()
            optimizer.step()
    found = pd.read_csv(tmp_path / "batches.csv")["energy"]
    assert found[1] == pytest.approx(10 * found[0])


def test_a_disk_that_fails_for_a_while_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = pair()
    with Monitor(model, optimizer, every=1, path=tmp_path, interval=0.02):
        train(model, optimizer, 5)
        (tmp_path / "batches.csv").rename(tmp_path / "away.csv")
        (tmp_path / "batches.csv").mkdir()  # cannot be appended to
        train(model, optimizer, 5)
        for _ in range(3000):
            if "cannot write" in caplog.text:
                break
            time.sleep(0.01)
        (tmp_path / "batches.csv").rmdir()
        (tmp_path / "away.csv").rename(tmp_path / "batches.csv")
    assert "cannot write" in caplog.text
    assert pd.read_csv(tmp_path / "batches.csv")["batch"].tolist() == list(range(1, 10))


def test_an_interrupted_training_keeps_its_logs(tmp_path: Path) -> None:
    model, optimizer = pair()
    monitor = Monitor(model, optimizer, every=1, path=tmp_path)

    def interrupted() -> None:
        with monitor:
            train(model, optimizer, 5, monitor)
            model(torch.ones(2, 3))

    with pytest.raises(RuntimeError, match="shapes"):
        interrupted()
    assert len(pd.read_csv(tmp_path / "batches.csv")) == 4
    assert pd.read_csv(tmp_path / "epochs.csv")["batches"].tolist() == [5]
    train(model, optimizer, 1)  # no dispatch mode is left on


def test_what_it_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = pair()
    with Monitor(model, optimizer, path=tmp_path) as monitor:
        with pytest.raises(ValueError, match="attached already"):
            monitor.start()
        with pytest.raises(ValueError, match="loss and accuracy"):
            monitor.record(reward=1.0)
        with pytest.raises(ValueError, match="own columns"):
            monitor.end_epoch(seconds=1.0)
        with pytest.raises(TypeError):
            monitor.end_epoch(accuracy=None)  # type: ignore[arg-type]
        optimizer.step()
    assert "must be called" in caplog.text
    with pytest.raises(ValueError, match="own columns"):
        monitor.end_epoch(epoch=3)
    for again in (lambda: Monitor(model, optimizer, path=tmp_path), monitor.start):
        with pytest.raises(ValueError, match="overwrite=True"):
            again()
    with pytest.raises(ValueError, match="NoneType"):
        Monitor(model, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every"):
        Monitor(model, optimizer, every=0)
    with Monitor(model, optimizer, every=1, path=tmp_path, overwrite=True):
        train(model, optimizer, 3)
    assert len(pd.read_csv(tmp_path / "batches.csv")) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512)).cuda()
    optimizer = torch.optim.Adam(model.parameters())
    with Monitor(model, optimizer, every=2, path=tmp_path) as monitor:
        for _ in range(40):
            loss = model(torch.ones(256, 512, device="cuda")).square().mean()
            loss.backward()
            monitor.record(loss=loss)
            optimizer.step()
        row = monitor.end_epoch()
    assert row["batches"] == 40
    assert 0 < row["forward"] < row["total"] < 1
    assert row["backward"] > 0
    assert row["device_memory"] > 3 * 2 * 512 * 2048 * 4
