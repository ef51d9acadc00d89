"""Real trials, driven here instead of by Ray Tune."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from orchestrator.job.sweep import SweepJob
from orchestrator.runs.checkpoint import checkpoint_paths, newest_checkpoint
from orchestrator.runs.lineage import as_lines, trace
from orchestrator.runs.record import evaluated
from orchestrator.sweep.engine import Engine
from orchestrator.sweep.trial import TrialRun, Unit
from tests.unit.orchestrator.jobs import stage


def sweep_of(data: Path, tmp_path: Path, **changes: Any) -> SweepJob:
    settings = stage("seg", "segmentation", "tiny-voc", steps=8)
    settings |= {"evaluate": {"every": 2}, "checkpoint": {"every": 3}}
    raw = {
        "kind": "sweep",
        "name": "tiny",
        "storage": str(tmp_path),
        "data_root": str(data),
        "stages": [settings],
        "space": {"optimizer.lr": {"loguniform": [1e-3, 0.1]}},
        "objective": {"metric": "val/miou", "mode": "max"},
        "budget": {"trials": 1},
    }
    return SweepJob.model_validate(raw | changes)


def engine_of(job: SweepJob, tmp_path: Path) -> Engine:
    directory = tmp_path / "sweeps" / "tiny"
    directory.mkdir(parents=True, exist_ok=True)
    return Engine(job, directory, {})


def told_by(unit: Unit) -> list[dict[str, Any]]:
    told, trial = [], TrialRun(unit)
    while "outcome" not in (one := trial.next()):
        told.append(one)
    return [*told, one]


def test_a_trial_tells_each_evaluation_and_goes_on_where_it_paused(
    tiny_data: Path, tmp_path: Path
) -> None:
    engine = engine_of(sweep_of(tiny_data, tmp_path), tmp_path)
    unit = engine.next_unit()
    assert unit
    unit = Unit(**asdict(unit))
    first = told_by(replace(unit, pause_at=4))
    assert [one.get("step", one.get("outcome")) for one in first] == [2, 4, "paused"]
    newest = newest_checkpoint(engine.run_of(0).checkpoints)
    assert newest
    assert newest.step == 4
    assert told_by(replace(unit, pause_at=4)) == first  # killed before the sweep heard of it
    whole = told_by(unit)
    assert [one.get("step", one.get("outcome")) for one in whole] == [2, 4, 6, 8, "finished"]
    assert whole[:2] == first[:2]
    assert told_by(unit) == whole  # of a run that is done, its journal


def test_news_that_nobody_heard_are_in_the_journal(tiny_data: Path, tmp_path: Path) -> None:
    engine = engine_of(sweep_of(tiny_data, tmp_path), tmp_path)
    unit = engine.next_unit()
    assert unit
    told = {one["step"]: evaluated(one) for one in told_by(unit) if "step" in one}

    def results() -> dict[int, dict[str, float]]:
        return {e["step"]: e["metrics"] for e in engine.entries if e["kind"] == "result"}

    engine.take(0, 5, {})
    assert results() == {step: kept(told[step]) for step in (2, 4)}
    engine.ended(0, "finished")
    assert results() == {step: kept(told[step]) for step in (2, 4, 6, 8)}


def kept(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.count("/") < 2}


def test_a_generation_of_pbt_goes_on_from_a_copy_that_its_lineage_tells(
    tiny_data: Path, tmp_path: Path
) -> None:
    pbt = {"name": "pbt", "population": 2, "every": 0.5, "quantile": 0.5}
    engine = engine_of(sweep_of(tiny_data, tmp_path, scheduler=pbt, budget={}), tmp_path)
    while unit := engine.next_unit():
        *told, end = told_by(unit)
        for one in told:
            engine.take(unit.trial, one["step"], evaluated(one))
        engine.ended(unit.trial, end["outcome"], end["error"])
    ends = [entry["status"] for entry in engine.entries if entry["kind"] == "end"]
    assert ends == ["finished", "finished"]
    (copied,) = (e for e in engine.entries if e["kind"] == "start" and "from" in e)
    donor = engine.run_of(copied["from"]["trial"])
    newest = newest_checkpoint(engine.run_of(copied["trial"]).checkpoints)
    assert newest
    assert newest.step == 8
    assert f"started from a copy of {donor.path.name}, step 4" in "\n".join(as_lines(trace(newest)))
    for run in (tmp_path / "runs").iterdir():
        assert len(checkpoint_paths(run / "checkpoints")) == 1, run


def test_values_that_do_not_stay_finite_are_not_tried_again(
    tiny_data: Path, tmp_path: Path
) -> None:
    job = sweep_of(tiny_data, tmp_path, space={"optimizer.lr": {"choice": [1e30]}})
    engine = engine_of(job, tmp_path)
    unit = engine.next_unit()
    assert unit
    *told, end = told_by(unit)
    assert end["outcome"] == "nan"
    assert "is not finite" in end["error"]
    assert "max_rollbacks" not in end["error"]  # a sweep never goes back
    assert all(math.isfinite(one["val/miou"]) for one in told)
    assert not [event for event in engine.run_of(0).events() if event["kind"] == "rollback"]
