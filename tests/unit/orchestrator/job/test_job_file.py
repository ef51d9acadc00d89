import string
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import JobFileError
from orchestrator.job.config import PipelineJob, StageJob
from orchestrator.job.job_file import load_job
from tests.unit.orchestrator.jobs import pipeline_job, stage, stage_job, write

DATA = stage("tiny", "classification", "tiny-imagenet")["data"]
RECIPES = sorted(Path("jobs").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_recipes_are_valid_and_executable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATROUS_TEST_DATA", "/data")
    job = load_job(path)
    assert job.kind in ("stage", "pipeline", "sweep")
    assert path.read_text().startswith("#!/usr/bin/env -S python -m orchestrator\n")
    assert path.stat().st_mode & 0o111


def test_stage_and_pipeline_are_read(tmp_path: Path) -> None:
    job = load_job(write(tmp_path / "a.yaml", stage_job(tmp_path)))
    assert isinstance(job, StageJob)
    assert job.settings.name == "tiny-imagenet"
    assert not hasattr(job.settings, "storage")
    pipeline = load_job(write(tmp_path / "b.yaml", pipeline_job(tmp_path)))
    assert isinstance(pipeline, PipelineJob)
    assert pipeline.stages[0].start_from is not None
    assert pipeline.stages[0].start_from.checkpoint == "tiny-coco"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimiser": {}}, "optimiser: unknown key; did you mean 'optimizer'?"),
        ({"optimizer": {"lr": -1}}, "optimizer.lr: -1: should be greater than 0"),
        (
            {"schedule": {"name": "poly", "pow": 2}},
            "schedule.pow: unknown key; did you mean 'power'?",
        ),
        (
            {"schedule": {"name": "cosin"}},
            "schedule.name: 'cosin': did you mean 'cosine'? choose poly, cosine, ",
        ),
        ({"schedule": {"power": 2}}, "schedule.name: is required; choose poly, cosine, "),
        ({"schedule": {"name": "steps"}}, "schedule.milestones: is required"),
        (
            {"optimizer": {"name": "adamw", "lr": 1, "momentum": 0.9}},
            "optimizer.momentum: unknown key; known keys: betas, clip_norm, eps, lr, ",
        ),
        (
            {"optimizer": {"name": "adamw", "lr": 1, "betas": [0.9]}},
            "optimizer.betas[1]: is required",
        ),
        (
            {"model": {"backbone": "xception66"}},
            "model.backbone: 'xception66': did you mean 'xception65'? choose xception41, ",
        ),
        ({"model": {"multi_grid": [1, 2]}}, "model.multi_grid[2]: is required"),
        (
            {"model": {"decoder": {"low_level": ["conv2", "conv3"]}}},
            "model.decoder.low_level: choose [conv2] or [conv3, conv2]",
        ),
        ({"global_batch": None}, "global_batch: null: should be a whole number"),
        ({"evaluate": {"scales": [0.5]}}, "evaluate.scales is for segmentation"),
        ({"data": DATA | {"keep_pixels": True}}, "data.keep_pixels is for segmentation"),
        (
            {"data": DATA | {"keep_pixels": True, "cache": False}},
            "data.keep_pixels: there is no place with data.cache: false",
        ),
        ({"epochs": 3}, "give exactly one of steps and epochs"),
        ({"log_every": "3 days"}, "log_every: '3 days': must be a number of steps (1000) or of"),
        ({"cluster": {"workers": [4, 2]}}, "cluster: workers: [4, 2] is not [min, max]"),
        ({"cluster": {"gpus_per_worker": 2}}, "gpus_per_worker: 2: a worker computes on one GPU"),
        ({"cluster": {"workers": 2, "gpus_per_worker": 0.5}}, "cannot share one"),
        ({"cluster": {"workers": 99}}, "global_batch: 8 is smaller than cluster.workers: 99"),
        ({"storage": "${NOT_SET}"}, "the environment variable NOT_SET is not set; export"),
        ({"storage": "s3://B"}, "storage: 's3://B': "),
        ({"data_root": "gs://bucket/x"}, "data sets lie in local directories or under s3://"),
        ({"data_root": "s3://B"}, "not the name of a bucket"),
        ({"kind": "stge"}, "kind: 'stge' is not one of stage, pipeline"),
    ],
)
def test_errors_name_field_value_and_cure(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "job.yaml", stage_job(tmp_path) | changes)
    with pytest.raises(JobFileError) as error:
        load_job(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_missing_key_is_named(tmp_path: Path) -> None:
    job = stage_job(tmp_path)
    del job["data"]["val"]
    with pytest.raises(JobFileError, match=r"data\.val: is required"):
        load_job(write(tmp_path / "job.yaml", job))


def test_stages_of_a_pipeline_are_named(tmp_path: Path) -> None:
    job = pipeline_job(tmp_path)
    job["stages"][1]["model"]["bakbone"] = "x"
    with pytest.raises(
        JobFileError, match=r"stages\[1\] \(tiny-coco\)\.model\.bakbone: unknown key"
    ):
        load_job(write(tmp_path / "job.yaml", job))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda stages: stages.append(dict(stages[0])), "the name 'tiny-voc' is used twice"),
        (lambda stages: stages[2].update(start_from="tiny-voc"), "start from each other"),
        (lambda stages: stages.clear(), "stages: give at least one"),
    ],
)
def test_graphs_that_cannot_run(tmp_path: Path, edit: Any, message: str) -> None:
    job = pipeline_job(tmp_path)
    edit(job["stages"])
    with pytest.raises(JobFileError, match=message):
        load_job(write(tmp_path / "job.yaml", job))


def test_not_yaml_not_there_and_keys_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("kind: stage\nkind: pipeline\n")
    with pytest.raises(JobFileError, match="the key 'kind' is given twice"):
        load_job(path)
    path.write_text("kind: [\n")
    with pytest.raises(JobFileError, match="not valid YAML"):
        load_job(path)
    with pytest.raises(JobFileError, match=r"no such file; did you mean .*job\.yaml"):
        load_job(tmp_path / "jobs.yaml")


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("!!python/object/apply:os.system ['touch pwned']\n")
    with pytest.raises(JobFileError, match="not valid YAML"):
        load_job(path)


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path / "job.yaml", stage_job(tmp_path))
    job = load_job(path, ("optimizer.lr=0.5", "cluster.workers=[1, 2]"))
    assert isinstance(job, StageJob)
    assert (job.optimizer.lr, job.cluster.workers) == (0.5, (1, 2))
    pipeline = load_job(
        write(tmp_path / "p.yaml", pipeline_job(tmp_path)), ("stages.tiny-coco.seed=7",)
    )
    assert isinstance(pipeline, PipelineJob)
    assert [stage.seed for stage in pipeline.stages] == [0, 7, 0]
    with pytest.raises(JobFileError, match="write FIELD=VALUE"):
        load_job(path, ("seed",))
    with pytest.raises(JobFileError, match="no item 'x'"):
        load_job(tmp_path / "p.yaml", ("stages.x.seed=7",))


def test_a_pipeline_may_name_stage_files(tmp_path: Path) -> None:
    write(tmp_path / "stage.yaml", stage_job(tmp_path))
    path = write(tmp_path / "p.yaml", {"kind": "pipeline", "name": "p", "stages": ["stage.yaml"]})
    job = load_job(path)
    assert isinstance(job, PipelineJob)
    assert job.stages[0].name == "tiny-imagenet"


def test_stage_files_bring_their_data_sets(tmp_path: Path) -> None:
    own = {"voc": {"format": "voc", "source": "/its"}, "coco": {"format": "coco", "source": "/its"}}
    write(tmp_path / "stage.yaml", stage_job(tmp_path) | {"datasets": own})
    whole = {"kind": "pipeline", "name": "p", "stages": ["stage.yaml"]}
    whole["datasets"] = {"coco": {"format": "coco", "source": "/ours"}}
    job = load_job(write(tmp_path / "p.yaml", whole))
    assert {name: one.source for name, one in job.datasets.items()} == {
        "voc": "/its",
        "coco": "/ours",
    }
    write(tmp_path / "stage.yaml", stage_job(tmp_path) | {"datasets": ["voc"]})
    with pytest.raises(JobFileError, match=r"datasets, or those of .* are not a mapping"):
        load_job(tmp_path / "p.yaml")


def test_a_deadline_has_a_time_zone(tmp_path: Path) -> None:
    path = write(tmp_path / "job.yaml", stage_job(tmp_path))
    for text in ("2026-12-01T08:00:00+01:00", "2026-12-01 07:00:00Z", "'2026-12-01T07:00Z'"):
        deadline = load_job(path, (f"deadline={text}",)).deadline
        assert deadline == datetime(2026, 12, 1, 7, tzinfo=UTC)
    with pytest.raises(JobFileError, match=r"deadline: .*needs its time zone, such as"):
        load_job(path, ("deadline=2026-12-01T08:00:00",))


@pytest.mark.parametrize("kind", ["stage", "pipeline"])
def test_a_cost_needs_a_price(kind: str, tmp_path: Path) -> None:
    one = stage_job(tmp_path)
    if kind == "pipeline":
        one = pipeline_job(tmp_path) | {"stages": [stage("a", "classification", "d")]}
    path = write(tmp_path / "job.yaml", one)
    cluster = "stages.a.cluster" if kind == "pipeline" else "cluster"
    with pytest.raises(JobFileError, match="max_cost is for GPUs, of which nothing takes any"):
        load_job(path, ("max_cost=5",))
    with_gpus = ("max_cost=5", f"{cluster}.workers=1", f"{cluster}.gpus_per_worker=1")
    with pytest.raises(JobFileError, match=r"max_cost needs cluster\.price_per_gpu_hour"):
        load_job(path, with_gpus)
    assert load_job(path, (*with_gpus, f"{cluster}.price_per_gpu_hour=2")).max_cost == 5


_SCALARS = st.none() | st.booleans() | st.integers() | st.text(string.ascii_letters, max_size=5)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
)


@given(field=st.sampled_from(sorted(stage_job(Path("/d")))), value=_VALUES)
def test_any_value_is_accepted_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, field: str, value: Any
) -> None:
    path = tmp_path_factory.mktemp("job") / "job.yaml"
    path.write_text(yaml.safe_dump(stage_job(Path("/d")) | {field: value}))
    refusal = None
    try:
        load_job(path)
    except JobFileError as error:
        refusal = str(error)
    assert refusal is None or refusal.startswith(str(path))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("tiny-imagenet", "stages: tiny-imagenet starts from itself"),
        ("tiny-coco", "stages: tiny-coco, tiny-imagenet start from each other, in a circle"),
        ("tiny-voc", "stages: tiny-voc, tiny-coco, tiny-imagenet start from each other"),
    ],
)
def test_only_the_stages_of_a_circle_are_named(tmp_path: Path, start: str, message: str) -> None:
    job = pipeline_job(tmp_path)
    job["stages"][2]["start_from"] = start
    with pytest.raises(JobFileError, match=message):
        load_job(write(tmp_path / "job.yaml", job))
