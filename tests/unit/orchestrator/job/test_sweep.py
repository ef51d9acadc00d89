from pathlib import Path
from typing import Any

import pytest
import yaml

from model.metrics import ClassificationMetrics, SegmentationMetrics
from orchestrator.errors import JobFileError
from orchestrator.job.job_file import load_job
from orchestrator.job.space import Domain, in_order, split_path, with_values
from orchestrator.job.sweep import METRICS, SweepJob
from tests.unit.orchestrator.jobs import stage

SPACE = {
    "optimizer.lr": {"loguniform": [1e-4, 0.1]},
    "optimizer.name": {"choice": ["sgd", "adamw"]},
    "optimizer.momentum": {"uniform": [0.5, 0.95], "when": {"optimizer.name": "sgd"}},
    "optimizer.lr_multipliers.logits.bias": {"choice": [1, 10]},
    "data.train.crop": {"quniform": [33, 65, 16]},
    "ema.decay": {"uniform": [0.9, 0.99]},
}


def load(path: Path, **changes: Any) -> SweepJob:
    raw = {
        "kind": "sweep",
        "name": "tiny",
        "stages": [stage("seg", "segmentation", "tiny-voc")],
        "space": SPACE,
        "objective": {"metric": "val/miou", "mode": "max"},
        "budget": {"trials": 4},
    } | changes
    (path / "sweep.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    job = load_job(path / "sweep.yaml")
    assert isinstance(job, SweepJob)
    return job


def test_the_last_stage_is_tuned_and_the_others_are_shared(tmp_path: Path) -> None:
    stages = [
        stage("coco", "segmentation", "tiny-coco"),
        stage("voc", "segmentation", "tiny-voc", start_from="coco"),
    ]
    job = load(tmp_path, stages=stages)
    assert (job.tuned.name, [one.name for one in job.earlier]) == ("voc", ["coco"])
    with pytest.raises(JobFileError, match="voc starts from coco, which is tuned"):
        load(tmp_path, stages=stages, tune="coco")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"space": {"optimizer.lrr": {"choice": [1]}}}, "did you mean optimizer.lr?"),
        ({"space": {"modle.width": {"choice": [1]}}}, "did you mean model?"),
        ({"space": {"optimizer.lr.x": {"choice": [1]}}}, "optimizer.lr has no fields"),
        ({"space": {"optimizer.lr": {"uniform": [-1, 1]}}}, "-1.0: input should be greater than 0"),
        ({"space": {"model.output_stride": {"choice": [8, 9]}}}, "9: input should be 8, 16 or 32"),
        ({"space": {"global_batch": {"uniform": [1, 9]}}}, "should be a valid integer"),
        ({"space": {"cluster.workers": {"choice": [1, 2]}}}, "does not change a stage's result"),
        ({"space": {"optimizer.lr": {"loguniform": [2, 1]}}}, "2 is not below 1"),
        ({"space": {"optimizer.lr": {"logunifrom": [1, 2]}}}, "did you mean 'loguniform'?"),
        ({"space": {"optimizer.lr": {"choice": [1], "when": {"optimizer.nam": 1}}}}, "not tuned"),
        ({"space": {}}, "give at least one field"),
        ({"objective": {"metric": "val/miuo", "mode": "max"}}, "did you mean val/miou?"),
        ({"tune": "sge"}, "did you mean 'seg'?"),
        ({"scheduler": {"name": "ahsa"}}, "did you mean 'asha'?"),
        ({"search": {"name": "grid"}}, "grid needs choice, quniform or randint"),
        ({"budget": {}}, "the search has no end"),
        ({"budget": {"gpu_hours": 1}}, "of which the stage takes none"),
        ({"scheduler": {"name": "pbt"}}, "pbt has scheduler.population"),
        ({"scheduler": {"name": "pbt"}, "budget": {}}, "changes values while training"),
        ({"max_hours": 1}, "a sweep has budget"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(JobFileError) as error:
        load(tmp_path, **changes)
    assert told in str(error.value)


def test_values_are_put_where_they_belong(tmp_path: Path) -> None:
    tuned = load(tmp_path).tuned
    values = {
        "optimizer.name": "adamw",
        "optimizer.lr_multipliers.logits.bias": 10,
        "data.train.crop": 49,
        "ema.decay": 0.95,
    }
    found = with_values(tuned, values)
    assert found.optimizer.name == "adamw"
    assert found.optimizer.lr_multipliers == {"logits.bias": 10}
    assert found.data.train.crop == 49
    assert found.ema is not None
    assert found.ema.decay == 0.95
    assert with_values(tuned, {}) == tuned


def test_a_key_of_a_mapping_may_have_dots() -> None:
    assert split_path("optimizer.lr_multipliers.logits.bias")[-1] == "logits.bias"


def test_fields_come_after_those_they_depend_on(tmp_path: Path) -> None:
    space = load(tmp_path, space=dict(reversed(SPACE.items()))).space
    names = in_order(space)
    assert names.index("optimizer.name") < names.index("optimizer.momentum")
    assert sorted(names) == sorted(SPACE)


def test_steps_of_a_quantized_range_have_no_noise() -> None:
    assert Domain(quniform=(0.1, 0.5, 0.1)).finite == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert Domain(quniform=(33, 70, 16)).finite == (33, 49, 65)
    assert Domain(randint=(2, 4)).finite == (2, 3, 4)


def test_objectives_are_metrics_that_the_model_has() -> None:
    segmentation = SegmentationMetrics(["a", "b"], 255)
    segmentation.confusion[0, 0] = 1
    names = {f"val/{name}" for name in segmentation.compute()}
    assert {n for n in METRICS["segmentation"] if not n.endswith("/")} <= names
    assert any(name.startswith("val/iou/") for name in names)
    assert METRICS["classification"] == tuple(f"val/top{k}" for k in ClassificationMetrics().top)
