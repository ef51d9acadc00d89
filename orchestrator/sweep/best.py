"""The job file of a trial: complete in itself, and with the fingerprint of the trial's run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestrator.bucket import BucketPath, storage_path
from orchestrator.errors import RunError
from orchestrator.job.config import PipelineJob, StageJob, StageSettings
from orchestrator.job.sweep import SweepJob
from orchestrator.runs.run import Run
from orchestrator.sweep.results import Trial


def write_job_file(path: Path, job: SweepJob, trial: Trial, about: Sequence[str]) -> None:
    """Write the job file of a trial, executable as those in jobs/ are; `about` are its comments.

    Raises:
        RunError: the trial never ran.
    """
    found = as_job(job, trial)
    values = {"kind": found.kind} | found.model_dump(mode="json", exclude_defaults=True)
    lines = ["#!/usr/bin/env -S python -m orchestrator", *(f"# {line}" for line in about)]
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + f"\n{text}", encoding="utf-8")
    if not isinstance(path, BucketPath):
        path.chmod(0o755)


def as_job(job: SweepJob, trial: Trial) -> StageJob | PipelineJob:
    """The sweep's stages with the trial's in place of the tuned one; a stage alone as a stage.

    Raises:
        RunError: the trial never ran.
    """
    record = Run(storage_path(job.storage) / trial.run).read() if trial.run else {}
    if "job" not in record:
        raise RunError(f"{job.name}: trial {trial.number} is {trial.state}: it has no run")
    tuned = StageSettings.model_validate(record["job"])
    shared: dict[str, Any] = {
        "storage": job.storage,
        "data_root": job.data_root,
        "datasets": job.datasets,
    }
    if len(job.stages) == 1:
        return StageJob(kind="stage", **shared, **dict(tuned))
    stages = tuple(tuned if stage.name == tuned.name else stage for stage in job.stages)
    return PipelineJob(kind="pipeline", name=f"{job.name[:58]}-best", **shared, stages=stages)
