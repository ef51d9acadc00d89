"""Speed, MFU and times, with a clock that the test moves."""

from types import SimpleNamespace

import pytest
import torch

from orchestrator.training import meters as module
from orchestrator.training.meters import Meters


class Clock:
    """`time` of the meters, and the loader whose waits pass in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.loader = 100.0, SimpleNamespace(wait_seconds=0.0)
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def passes(self, seconds: float, *, waiting: float = 0.0) -> None:
        self.now += seconds
        self.loader.wait_seconds += waiting

    def meters(self, **options: float) -> Meters:
        return Meters(self.loader, 8, torch.device("cpu"), **options)  # type: ignore[arg-type]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def add(meters: Meters, total: float = 8.0, norm: float = 1.0) -> None:
    meters.add(*(torch.tensor(value, dtype=torch.float64) for value in (total, 4.0, norm)))


def test_speed_leaves_evaluations_and_checkpoints_out(clock: Clock) -> None:
    meters = clock.meters(ideal_step=0.5)
    for seconds in (1.0, 2.0, 3.0, 4.0):
        clock.passes(seconds, waiting=0.5)
        add(meters)
        with meters.paused("evaluation"):
            clock.passes(100, waiting=7)
    with meters.paused("checkpoint stall"):
        clock.passes(50)
    metrics = meters.read()
    assert metrics["train/loss"] == 2.0
    assert metrics["train/images_per_second"] == pytest.approx(4 * 8 / 10)
    assert metrics["train/data_wait_share"] == pytest.approx(2 / 10)
    assert metrics["train/mfu"] == pytest.approx(4 * 0.5 / 10)
    assert metrics["train/evaluation_seconds"] == pytest.approx(400)


def test_percentiles_of_step_times(clock: Clock) -> None:
    meters = clock.meters()
    for seconds in [1.0] * 50 + [2.0] * 45 + [3.0] * 5 + [30.0]:
        clock.passes(seconds)
        add(meters)
    metrics = meters.read()
    found = [metrics[f"train/step_seconds_{name}"] for name in ("p50", "p95", "max")]
    assert found == pytest.approx([2.0, 3.0, 30.0])
    assert "train/mfu" not in metrics
    assert "train/evaluation_seconds" not in metrics


def test_readings_are_of_their_own_window(clock: Clock) -> None:
    meters = clock.meters()
    clock.passes(9)
    add(meters, total=100)
    meters.read()
    clock.passes(2)
    add(meters)
    again = meters.read()
    assert again["train/loss"] == 2.0
    assert again["train/images_per_second"] == pytest.approx(4)
    assert again["train/step_seconds_max"] == pytest.approx(2)


def test_steps_that_float16_passed_over_have_no_norm(clock: Clock) -> None:
    meters = clock.meters()
    add(meters, norm=3.0)
    add(meters, norm=float("inf"))
    clock.passes(1)
    assert meters.read()["train/gradient_norm"] == 3.0


def test_where_the_time_went(clock: Clock) -> None:
    clock.passes(5)
    meters = clock.meters(began=100.0)
    clock.passes(2, waiting=2)
    assert meters.not_trained() == {"start-up": pytest.approx(7)}
    add(meters)
    assert meters.first_wait == 2
    clock.passes(10, waiting=4)
    add(meters)
    with meters.paused("evaluation"):
        clock.passes(30, waiting=1)
    with meters.paused("checkpoint stall"):
        clock.passes(3)
    meters.read()
    assert meters.not_trained() == {
        "start-up": pytest.approx(7),
        "data wait": pytest.approx(4),
        "evaluation": pytest.approx(30),
        "checkpoint stall": pytest.approx(3),
    }


def test_a_checkpoint_carries_the_sums(clock: Clock) -> None:
    whole, before, after = clock.meters(), clock.meters(), clock.meters()
    for meters in (whole, before):
        add(meters, total=100)
    after.go_on_from(before.state())
    for meters in (whole, after):
        add(meters)
    clock.passes(1)
    assert after.read()["train/loss"] == whole.read()["train/loss"]
