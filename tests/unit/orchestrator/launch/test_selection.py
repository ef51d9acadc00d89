"""Parts of a pipeline, and the reasons why a stage runs again."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import JobFileError
from orchestrator.job.config import Job, PipelineJob, StageSettings
from orchestrator.launch.selection import select, why
from orchestrator.launch.stage import PlannedStage, open_run, plan_stage
from orchestrator.runs.run import all_runs
from tests.unit.orchestrator.jobs import pipeline_job, stage


def names(job: Job) -> list[str]:
    assert isinstance(job, PipelineJob)
    return [one.name for one in job.stages]


def test_only_some_or_from_one_on(tmp_path: Path) -> None:
    job = PipelineJob.model_validate(pipeline_job(tmp_path))
    assert names(select(job)) == ["tiny-voc", "tiny-coco", "tiny-imagenet"]
    assert names(select(job, only=["tiny-coco"])) == ["tiny-coco"]
    assert names(select(job, start_at="tiny-coco")) == ["tiny-voc", "tiny-coco"]
    with pytest.raises(JobFileError, match="no stage 'tiny-cocoo'; did you mean 'tiny-coco'"):
        select(job, only=["tiny-cocoo"])


def plan(root: Path, storage: Path, **changes: Any) -> PlannedStage:
    settings = StageSettings.model_validate(stage("tiny", "segmentation", "tiny-voc", **changes))
    return plan_stage(settings, storage, str(root))


def reasons(root: Path, storage: Path, **changes: Any) -> list[str]:
    return list(why(plan(root, storage, **changes), all_runs(storage)))


def test_the_value_that_changed_is_named(tiny_data: Path, tmp_path: Path) -> None:
    assert reasons(tiny_data, tmp_path) == []
    first = plan(tiny_data, tmp_path)
    open_run(first)
    name = first.run.path.name
    assert reasons(tiny_data, tmp_path) == [f"the same as {name}, which is running"]
    assert reasons(tiny_data, tmp_path, log_every=3) == [f"the same as {name}, which is running"]
    changed = reasons(tiny_data, tmp_path, seed=3, optimizer={"name": "sgd", "lr": 0.5})
    assert changed == [f"differs from {name}:", "  seed: 0 -> 3", "  optimizer.lr: 0.05 -> 0.5"]
    data = stage("tiny", "segmentation", "tiny-voc")["data"]
    data["val"]["split"] = "train"
    other = reasons(tiny_data, tmp_path, data=data)
    assert any(line.startswith("  data.val (manifest): ") for line in other)


def test_only_the_data_sets_of_the_chosen_stages_are_prepared(tmp_path: Path) -> None:
    drawn = {"format": "voc", "synthesize": {}}
    names = ("tiny-voc", "tiny-coco")
    whole = pipeline_job(tmp_path) | {"datasets": dict.fromkeys(names, drawn)}
    job = PipelineJob.model_validate(whole)
    assert select(job) is job
    part = select(job, only=["tiny-coco"])
    assert isinstance(part, PipelineJob)
    assert list(part.datasets) == ["tiny-coco"]
