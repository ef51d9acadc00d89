"""The bill is a pure function of a run's events."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.job.sections import Cluster
from orchestrator.runs.bill import Account, Bill, add_bills, begin, end, read_account, read_bill
from orchestrator.runs.run import Run

Event = dict[str, Any]
_NOTHING = {"data wait": 0.0, "evaluation": 0.0, "checkpoint stall": 0.0}


def attempt(time: float, seen: float | None = None, price: float | None = 2.0) -> Event:
    terms = {"gpus_per_worker": 1, "cpus_per_worker": 4, "price_per_gpu_hour": price}
    return {"kind": "attempt", "time": time, "seen": seen} | terms


def workers(time: float, world: int = 8, seen: float | None = None) -> Event:
    return {"kind": "workers", "time": time, "world": world, "seen": seen}


def start(time: float, step: int) -> Event:
    return {"kind": "start", "time": time, "step": step}


def entry(time: float, step: int, **seconds: float) -> Event:
    named = {cause.replace("_", " "): value for cause, value in seconds.items()}
    spent = _NOTHING | {"start-up": named.pop("start up", 0.0)} | named
    return {"kind": "time", "time": time, "step": step, "seconds": spent}


def ended(time: float, status: str = "finished") -> Event:
    return {"kind": "ended", "time": time, "status": status}


def lost(*events: Event, now: float | None = None) -> dict[str, float]:
    """Of which all parts together are the whole time."""
    bill = read_account(events).bill(now)
    return {cause: pytest.approx(seconds) for cause, seconds in bill.lost.items()} | {
        "wall": pytest.approx(bill.wall),
        "kept": pytest.approx(bill.goodput * bill.wall),
    }


UNDISTURBED = (
    attempt(100),
    workers(110),
    start(115, 0),
    entry(120, 1, start_up=10),
    entry(220, 51, start_up=10, data_wait=20),
    entry(260, 60, start_up=10, data_wait=21, evaluation=15, checkpoint_stall=5),
    ended(265),
)


def test_a_run_that_nothing_befell() -> None:
    assert lost(*UNDISTURBED) == {
        "waiting for workers": 10,
        "start-up": 10,
        "data wait": 21,
        "evaluation": 15,
        "checkpoint stall": 5,
        "closing": 5,
        "wall": 165,
        "kept": 99,
    }
    bill = read_account(UNDISTURBED).bill()
    assert bill.gpu_seconds == pytest.approx(155 * 8)
    assert bill.cpu_seconds == pytest.approx(155 * 8 * 4)
    assert bill.money == pytest.approx(155 * 8 / 3600 * 2.0)
    assert bill.causes[0] == ("data wait", pytest.approx(21 / 165))


def test_without_price_or_gpus_there_is_no_money() -> None:
    assert read_account([attempt(0, price=None), workers(5), ended(9)]).bill().money is None
    cpu = attempt(0) | {"gpus_per_worker": 0}
    bill = read_account([cpu, workers(5), ended(9)]).bill()
    assert bill.money is None
    assert (bill.gpu_seconds, bill.cpu_seconds) == (0, pytest.approx(4 * 8 * 4))


def test_a_killed_command_that_is_given_again() -> None:
    """Killed at 200, ten steps after the checkpoint of step 40; given again at 500."""
    events = (
        attempt(0),
        workers(10),
        entry(20, 1, start_up=10),
        entry(100, 40, start_up=10),  # the checkpoint
        entry(130, 45, start_up=10),
        attempt(500, seen=200),
        workers(520),
        start(525, 40),
        entry(530, 41, start_up=10),
        entry(600, 80, start_up=10),
        ended(600),
    )
    assert lost(*events) == {
        "waiting for workers": 10 + 20,
        "start-up": 10 + 10,
        "lost steps": 30 + 70,
        "driver gone": 300,
        "wall": 600,
        "kept": 80 + 70,
    }
    held = 200 - 10 + 600 - 520  # nobody holds them while the command is gone
    assert read_account(events).bill().gpu_seconds == pytest.approx(held * 8)


def test_a_killed_command_that_is_not_given_again() -> None:
    events = UNDISTURBED[:4]
    assert lost(*events, now=150) == {
        "waiting for workers": 10,
        "start-up": 10,
        "wall": 50,
        "kept": 30,
    }
    assert lost(*events[:1], now=150) == {"waiting for workers": 50, "wall": 50, "kept": 0}
    assert lost(*UNDISTURBED, now=9999) == lost(*UNDISTURBED)


def test_lost_workers_start_again_fewer() -> None:
    """The last checkpoint, of step 20, was never complete: steps from 11 on were in vain."""
    events = (
        attempt(0),
        workers(10),
        entry(20, 1, start_up=10),
        entry(30, 10, start_up=10, checkpoint_stall=1),
        entry(50, 20, start_up=10, checkpoint_stall=2),
        workers(90, world=4, seen=60),
        start(95, 10),
        entry(100, 11, start_up=10),
        entry(120, 20, start_up=10),
        ended(121),
    )
    assert lost(*events) == {
        "waiting for workers": 10,
        "start-up": 10,
        "checkpoint stall": 2,
        "lost steps": 19 + 10,
        "restart": 30 + 10,
        "closing": 1,
        "wall": 121,
        "kept": 9 + 20,
    }
    assert read_account(events).bill().gpu_seconds == pytest.approx(80 * 8 + 31 * 4)


def test_a_rollback_and_then_a_kill() -> None:
    events = (
        attempt(0),
        workers(0),
        entry(10, 1, start_up=10),
        entry(20, 10, start_up=10),  # the checkpoint it goes back to
        entry(40, 30, start_up=10),
        {"kind": "rollback", "time": 45, "start": 10, "stop": 36},
        start(47, 10),
        entry(50, 37, start_up=5),
        entry(60, 50, start_up=5),
        attempt(70, seen=60),
        workers(75),
        start(80, 37),
        entry(85, 38, start_up=10),
        entry(100, 50, start_up=10),
        ended(100),
    )
    assert lost(*events) == {
        "start-up": 10 + 10,
        "rollback": 20 + 5,
        "restart": 5,
        "lost steps": 10,
        "driver gone": 10,
        "waiting for workers": 5,
        "wall": 100,
        "kept": 10 + 15,
    }


def test_a_hang_costs_its_silence_and_the_steps_since() -> None:
    hang = {"kind": "hang", "time": 860, "silence": 600}
    again = (workers(880, seen=865), start(890, 40), entry(900, 41, start_up=20), ended(900))
    assert lost(*UNDISTURBED[:4], entry(230, 40, start_up=10), hang, *again) == {
        "waiting for workers": 10,
        "start-up": 10,
        "lost steps": 30 + 5,
        "hang": 600,
        "restart": 15 + 20,
        "wall": 800,
        "kept": 110,
    }


def test_stops_and_failures_end_the_time_that_counts() -> None:
    first = (attempt(0), workers(10), entry(20, 1, start_up=10), entry(50, 30, start_up=10))
    second = (attempt(9000), workers(9010), start(9015, 30), entry(9020, 31, start_up=10))
    stopped = lost(*first, ended(52, "stopped"), *second, ended(9020))
    assert stopped["wall"] == 52 + 20
    assert stopped["closing"] == 2
    failed = lost(*first, ended(52, "failed"), *second, ended(9020))
    assert failed["lost steps"] == 2


def test_a_checkpoint_between_two_entries_cuts_the_time_in_proportion() -> None:
    events = (attempt(0), workers(0), entry(1, 0), entry(11, 10), attempt(11, seen=11))
    assert lost(*events, workers(11), start(11, 4))["lost steps"] == 6


def test_clocks_that_differ_never_make_negative_times() -> None:
    events = (attempt(100), workers(90), start(91, 0), entry(95, 1, start_up=30), ended(101))
    bill = read_account(events).bill()
    assert bill.wall == pytest.approx(1)
    assert min(bill.lost.values()) >= 0
    assert 0 <= bill.goodput <= 1


def left(account: Account, *events: Event, now: float) -> tuple[float, bool]:
    for event in events:
        account.take(event)
    return account.seconds_left(100, now)


def test_time_left() -> None:
    """At first the least possible; then at the pace of these workers, evaluations included."""
    account, device = Account(), {"kind": "device", "time": 12, "ideal_step": 0.5}
    assert left(account, attempt(0), now=5) == (0, False)
    assert left(account, workers(10), device, start(15, 20), now=16) == (40, False)
    assert left(account, entry(20, 21, start_up=10), now=20) == (39.5, False)
    assert left(account, entry(40, 31, evaluation=5), now=50) == (69 * 2 - 10, True)
    assert left(account, workers(60, seen=55), start(61, 31), now=62) == (69 * 0.5, False)


def test_several_runs_together() -> None:
    one = Bill(wall=10, lost={"a": 1, "b": 2}, gpu_seconds=5, cpu_seconds=6, money=None)
    other = Bill(wall=30, lost={"a": 3}, gpu_seconds=7, cpu_seconds=8, money=4.0)
    both = add_bills([one, other])
    assert (both.wall, both.lost, both.money) == (40, {"a": 4, "b": 2}, 4.0)
    assert both.goodput == pytest.approx(34 / 40)
    assert add_bills([]).goodput == 0


def test_the_record_of_a_run_has_its_bill(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.update(status="running")
    with run.lock():
        begin(run, Cluster(workers=2))
        assert read_bill(run).causes[0][0] == "waiting for workers"
        end(run, "finished", digest="x")
    record = run.read()
    assert (record["status"], record["digest"]) == ("finished", "x")
    assert record["bill"]["gpu_hours"] == 0
    assert record["bill"]["seconds"] == read_bill(run).wall
