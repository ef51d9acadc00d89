"""The job file of a trial: whole, and it finds the trial's own run."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.errors import RunError
from orchestrator.job.config import PipelineJob, StageJob
from orchestrator.job.job_file import load_job
from orchestrator.job.space import with_values
from orchestrator.launch.pipeline import run_job
from orchestrator.launch.report import Display
from orchestrator.launch.stage import StageResult, plan_stage
from orchestrator.runs.run import Run
from orchestrator.sweep.best import as_job, write_job_file
from orchestrator.sweep.decisions import read
from orchestrator.sweep.report import write_best
from orchestrator.sweep.results import Trial, fold
from orchestrator.sweep.sweep import check_inputs
from tests.unit.orchestrator.jobs import stage
from tests.unit.orchestrator.sweep.finished import ended, evaluated, record, sweep_job

VALUES: dict[str, Any] = {
    "optimizer.lr": 0.0123456789,
    "model.output_stride": 8,
    "model.batch_norm": {"frozen": False, "momentum": 0.2},
    "optimizer.lr_multipliers": {"logits": 10.0, "logits.bias": 20.0},
    "data.train.crop": [33, 49],
}


def train(job: Any) -> dict[str, StageResult]:
    with Display(Console(file=io.StringIO())) as display:
        return {result.name: result for result in run_job(job, display)}


@pytest.mark.parametrize("shared", [False, True])
def test_it_finds_the_trial_done(tiny_data: Path, tmp_path: Path, shared: bool) -> None:
    earlier = [stage("tiny-coco", "segmentation", "tiny-coco", steps=1)] if shared else []
    changes = {"start_from": "tiny-coco"} if shared else {}
    last = stage("tiny-voc", "segmentation", "tiny-voc", steps=2, **changes)
    job = sweep_job(tmp_path / "storage", data_root=str(tiny_data), stages=[*earlier, last])
    places: Any = {"storage": job.storage, "data_root": job.data_root}
    stages = (*job.earlier, with_values(job.tuned, VALUES))
    ran = train(PipelineJob(kind="pipeline", name="by-hand", **places, stages=stages))
    run = ran["tiny-voc"].run
    sweep = record(
        job,
        [
            {"kind": "suggest", "trial": 0, "values": VALUES},
            {"kind": "start", "trial": 0, "run": f"runs/{run.path.name}", "steps": 2},
            evaluated(0, 2, 0.25),
            ended(0),
        ],
    )
    [trial] = fold(read(sweep.path))
    path = tmp_path / "elsewhere" / "best.yaml"
    write_best(path, job, trial, [trial])

    best = load_job(path)
    assert isinstance(best, PipelineJob if shared else StageJob)
    results = train(best)
    assert all(result.reused for result in results.values())
    assert results["tiny-voc"].run.path == run.path
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env -S python -m orchestrator\n# Trial 0 of ")
    assert "of the sweep tune-tiny, number 1 of 1: val/miou 0.25" in text
    assert path.stat().st_mode & 0o111


@pytest.mark.parametrize("recipe", sorted(Path("jobs").glob("[fp]*_*.yaml")), ids=str)
def test_it_says_all_that_the_trial_says(recipe: Path, tmp_path: Path) -> None:
    wanted = load_job(recipe)
    assert isinstance(wanted, StageJob)
    job = sweep_job(tmp_path).model_copy(update={"stages": (wanted.settings,)})
    run = Run(tmp_path / "runs" / "a")
    run.update(job=wanted.settings.model_dump(mode="json"))
    write_job_file(tmp_path / "best.yaml", job, Trial(number=0, run="runs/a"), [])
    best = load_job(tmp_path / "best.yaml")
    assert isinstance(best, StageJob)
    assert best.settings == wanted.settings


def test_a_trial_that_never_ran_has_none(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="trial 3 is invalid: it has no run"):
        as_job(sweep_job(tmp_path), Trial(number=3, state="invalid"))


def test_a_sweep_does_not_go_on_with_other_data(tiny_data: Path, tmp_path: Path) -> None:
    job = sweep_job(tmp_path, data_root=str(tiny_data))
    values = {"optimizer.lr": 0.01, "model.output_stride": 16}
    planned = plan_stage(with_values(job.tuned, values), tmp_path, str(tiny_data))
    suggested = {"kind": "suggest", "trial": 0, "values": values}
    start = {"kind": "start", "trial": 0, "fingerprint": planned.fingerprint}
    check_inputs(job, {}, [suggested, start])
    with pytest.raises(RunError, match=r"the data, or the weights .* have changed"):
        check_inputs(job, {}, [suggested, start | {"fingerprint": "of other data"}])
