import math
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import StageFailed
from orchestrator.runs.bill import Bill
from orchestrator.sweep.decisions import read
from orchestrator.sweep.sweep import check_result
from tests.unit.orchestrator.jobs import stage
from tests.unit.orchestrator.sweep.simulation import (
    EVALUATE_EVERY,
    STEPS,
    Cluster,
    Killed,
    SimulatedEngine,
    sweep_job,
)

PBT_SPACE = {
    "optimizer.lr": {"loguniform": [1e-4, 1]},
    "data.train.scale_step": {"quniform": [0, 0.5, 0.25]},
}
SWEEPS: dict[str, dict[str, Any]] = {
    "random, none": {"search": {"name": "random", "seed": 3}},
    "random, asha": {
        "search": {"name": "random", "seed": 3},
        "scheduler": {"name": "asha", "grace": 0.1, "reduction": 2},
    },
    "optuna, median": {
        "search": {"name": "optuna", "startup": 2},
        "scheduler": {"name": "median", "min_trials": 1},
    },
    "optuna of two": {
        "search": {"name": "optuna", "startup": 2},
        "scheduler": {"name": "asha", "reduction": 2},
        "objective": [
            {"metric": "val/miou", "mode": "max"},
            {"metric": "val/pixel_accuracy", "mode": "max"},
        ],
    },
    "grid": {
        "search": {"name": "grid"},
        "space": {
            "optimizer.name": {"choice": ["sgd", "adamw"]},
            "optimizer.momentum": {"choice": [0.5, 0.9], "when": {"optimizer.name": "sgd"}},
        },
        "budget": {},
    },
    "pbt": {
        "scheduler": {"name": "pbt", "population": 4, "every": 0.25},
        "budget": {},
        "space": PBT_SPACE,
    },
}


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_disks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.sweep.decisions.sync", lambda _: None)
        patch.setattr("orchestrator.runs.run.sync", lambda _: None)
        yield


def run(directory: Path, name: str, **options: Any) -> list[dict[str, Any]]:
    return Cluster(directory / "sweeps" / "one", sweep_job(**SWEEPS[name]), **options).drive()


@pytest.mark.parametrize("name", SWEEPS)
def test_killed_after_each_entry_it_decides_as_if_it_had_not_been(
    tmp_path: Path, name: str
) -> None:
    whole = run(tmp_path / "whole", name)
    for entries in range(1, len(whole) + 1):
        place = tmp_path / "killed"
        cluster = Cluster(place / "sweeps" / "one", sweep_job(**SWEEPS[name]))
        with pytest.raises(Killed):
            cluster.drive(entries)
        assert cluster.drive() == whole
        shutil.rmtree(place)


@given(
    name=st.sampled_from(sorted(SWEEPS)),
    most=st.integers(1, 4),
    seed=st.integers(0, 100),
    lost=st.sampled_from([0, 0, 30, 100]),
    kills=st.lists(st.integers(1, 60), max_size=4),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_with_several_at_once_nothing_recorded_is_lost_or_repeated(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    most: int,
    seed: int,
    lost: int,
    kills: list[int],
) -> None:
    directory = tmp_path_factory.mktemp("sweep") / "sweeps" / "one"
    cluster = Cluster(directory, sweep_job(**SWEEPS[name]), most=most, seed=seed, lost=lost)
    before: list[dict[str, Any]] = []
    for entries in sorted(kills):
        with suppress(Killed):
            cluster.drive(max(entries, len(before) + 1))
        log = read(directory)
        assert log[: len(before)] == before
        before = log
    log = cluster.drive()
    assert log[: len(before)] == before
    check(log)
    assert cluster.drive() == log  # and nothing is left to do


def check(log: list[dict[str, Any]]) -> None:
    """What holds for every log of a sweep that is over."""
    kinds = ("suggest", "end")
    trials = {entry["trial"] for entry in log}
    assert trials == set(range(len(trials)))
    for kind in kinds:
        assert sorted(e["trial"] for e in log if e["kind"] == kind) == sorted(trials)
    results = [(e["trial"], e["step"]) for e in log if e["kind"] == "result"]
    assert len(set(results)) == len(results)
    decided = [(e["trial"], e["step"]) for e in log if e["kind"] == "decide"]
    assert sorted(decided) == sorted(results)
    for trial in trials:
        own = [entry for entry in log if entry["trial"] == trial]
        assert own[-1]["kind"] == "end"
        if own[-1]["status"] == "finished":
            steps = [entry["step"] for entry in own if entry["kind"] == "result"]
            assert steps == list(range(EVALUATE_EVERY, STEPS + 1, EVALUATE_EVERY))
        for one, two in pairwise(own):
            stopped = one["kind"] == "decide" and one["action"] == "stop"
            assert not stopped or two["kind"] == "end"


def test_generations_of_pbt_do_not_depend_on_the_order_of_results(tmp_path: Path) -> None:
    def outcome(log: list[dict[str, Any]]) -> Any:
        return sorted(
            (e for e in log if e["kind"] in ("decide", "start", "end")),
            key=lambda e: (e["trial"], e.get("step", 0), e["kind"]),
        )

    alone = run(tmp_path / "1", "pbt")
    assert any(entry.get("action") == "exploit" for entry in alone)
    for seed in range(3):
        many = run(tmp_path / f"many-{seed}", "pbt", most=3, seed=seed)
        assert outcome(many) == outcome(alone)


def test_a_copy_goes_on_with_other_values_in_a_run_of_its_own(tmp_path: Path) -> None:
    log = run(tmp_path, "pbt")
    exploit = next(entry for entry in log if entry.get("action") == "exploit")
    starts = [e for e in log if e["kind"] == "start" and e["trial"] == exploit["trial"]]
    assert starts[1]["from"] == {"trial": exploit["from"], "step": exploit["step"]}
    assert starts[1]["run"] != starts[0]["run"]
    later = log[log.index(starts[1]) :]
    steps = [e["step"] for e in later if e["kind"] == "result" and e["trial"] == exploit["trial"]]
    assert steps[0] > exploit["step"]


def test_asha_spares_steps(tmp_path: Path) -> None:
    def trained(name: str) -> int:
        cluster = Cluster(tmp_path / name / "sweeps" / "one", sweep_job(**SWEEPS[name]))
        cluster.drive()
        return len(cluster.trained)

    assert trained("random, asha") < trained("random, none")


def test_what_is_not_finite_ends_at_once_as_the_worst(tmp_path: Path) -> None:
    job = sweep_job(space={"optimizer.lr": {"choice": [0.9, 0.01]}}, search={"name": "grid"})
    log = Cluster(tmp_path / "sweeps" / "one", job).drive()
    ends = {entry["trial"]: entry for entry in log if entry["kind"] == "end"}
    assert {trial: entry["status"] for trial, entry in ends.items()} == {0: "nan", 1: "finished"}
    assert max(e["step"] for e in log if e["kind"] == "result" and e["trial"] == 0) < STEPS


def test_values_that_the_schema_refuses_together_are_told_and_not_run(tmp_path: Path) -> None:
    space = {
        "optimizer.name": {"choice": ["sgd", "adamw"]},
        "optimizer.momentum": {"choice": [0.5]},
    }
    job = sweep_job(space=space, search={"name": "grid"}, budget={})
    log = Cluster(tmp_path / "sweeps" / "one", job).drive()
    invalid = [entry for entry in log if entry.get("status") == "invalid"]
    assert len(invalid) == 1
    assert "momentum" in invalid[0]["error"]
    assert not [e for e in log if e["kind"] == "start" and e["trial"] == invalid[0]["trial"]]


def test_trials_that_all_fail_end_the_sweep_early(tmp_path: Path) -> None:
    job = sweep_job(budget={"trials": 100})
    engine = SimulatedEngine(job, directory_in(tmp_path), {})
    while unit := engine.next_unit():
        engine.ended(unit.trial, "failed", f"no file (all of it: {unit.trial})")
    ends = [entry for entry in engine.entries if entry["kind"] == "end"]
    assert [entry["status"] for entry in ends] == ["failed"] * 5
    assert ends[0]["error"] == "no file (all of it: 0)"
    with pytest.raises(StageFailed) as error:
        check_result(job, engine.entries)
    head, *reasons = str(error.value).splitlines()
    assert "none of 5 trials" in head
    assert "--force" in head
    assert reasons == ["trial 0 is failed: no file (all of it: 0) (so are 4 more)"]


def test_a_used_up_budget_stops_all_and_more_of_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = stage("seg", "segmentation", "tiny-voc", steps=STEPS)
    settings["cluster"] = {"workers": 1, "gpus_per_worker": 1}
    used = Bill(wall=0, lost={}, gpu_seconds=0, cpu_seconds=0, money=None)
    monkeypatch.setattr("orchestrator.sweep.engine.read_bill", lambda _: used)

    def engine(hours: float) -> SimulatedEngine:
        job = sweep_job(stages=[settings], budget={"gpu_hours": hours})
        return SimulatedEngine(job, directory_in(tmp_path), {})

    first = engine(1)
    unit = first.next_unit()
    assert unit
    first.take(0, 2, {"val/miou": 0.5})
    used = replace(used, gpu_seconds=3600)
    first._billed = (-math.inf, "")
    first.stop_running(first.spent())
    assert first.stops(0) == "budget: 1 of 1 GPU-hours are used"
    first.ended(0, "stopped")
    assert first.next_unit() is None
    assert first.entries[-1] == {
        "kind": "end",
        "trial": 0,
        "status": "stopped",
        "metrics": {"val/miou": 0.5},
    }
    assert engine(1).next_unit() is None
    more = engine(2).next_unit()
    assert more
    assert more.trial == 1


def test_an_interrupted_trial_is_given_out_again(tmp_path: Path) -> None:
    engine = SimulatedEngine(sweep_job(), directory_in(tmp_path), {})
    first = engine.next_unit()
    assert first
    engine.ended(0, "interrupted")
    assert engine.next_unit() == first


def directory_in(path: Path) -> Path:
    directory = path / "sweeps" / "one"
    directory.mkdir(parents=True, exist_ok=True)
    return directory
