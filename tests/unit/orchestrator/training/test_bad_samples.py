"""Bad samples in training: counted the same after a kill, limited, and no reason to start again."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.bad_samples import BadSample
from data_pipeline.config import DataConfig
from data_pipeline.dataset import Dataset, open_dataset
from data_pipeline.errors import DataError
from orchestrator.errors import StageFailed
from orchestrator.job.config import StageSettings
from orchestrator.launch.stage import (
    PlannedStage,
    StageResult,
    finished_result,
    open_run,
    plan_stage,
)
from orchestrator.launch.stage import train_stage as train
from orchestrator.runs import run_writer
from orchestrator.runs.run import append_journal, read_journal
from orchestrator.training.bad_samples import BadSampleMeter
from orchestrator.training.place import Place
from tests.unit.orchestrator.jobs import stage

DATASET = "tiny-imagenet"  # 48 samples, six steps of eight an epoch
ALONE = Place(rank=0, world=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def damaged(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set with two damaged training samples."""
    root = tmp_path_factory.mktemp("damaged")
    shutil.copytree(tiny_data / DATASET, root / DATASET)
    damage(root, "train", (7, 30))
    return root


def damage(root: Path, split: str, indices: tuple[int, ...]) -> None:
    """Overwrite the images of some samples with zeros."""
    dataset = open_dataset(root, DATASET, split)
    for index in indices:
        shard, row = dataset.locate(index)
        rows = dataset.manifest.read_rows(shard)
        path = root / DATASET / split / dataset.manifest.shards[shard].name
        content = bytearray(path.read_bytes())
        offset, size = rows["image_offset"][row].as_py(), rows["image_size"][row].as_py()
        content[offset : offset + size] = bytes(size)
        path.write_bytes(content)


def plan(root: Path, storage: Path, policy: dict[str, Any], **changes: Any) -> PlannedStage:
    settings = stage("tiny", "classification", DATASET, steps=12, evaluate={"every": 12}, **changes)
    settings["data"] |= policy
    return plan_stage(StageSettings.model_validate(settings), storage, root)


def run(planned: PlannedStage) -> StageResult:
    open_run(planned)
    return train(planned)


def counts(planned: PlannedStage) -> list[float | None]:
    records = read_journal(planned.run.journal)
    return [record["metrics"].get("train/bad_samples") for record in records]


SKIP = {"on_bad_sample": "skip"}


@pytest.fixture(scope="module")
def undisturbed(damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> PlannedStage:
    torch.set_num_threads(1)  # this fixture comes before the one that does it for each test
    planned = plan(damaged, tmp_path_factory.mktemp("undisturbed"), SKIP)
    run(planned)
    return planned


def test_bad_samples_are_counted(undisturbed: PlannedStage) -> None:
    found = counts(undisturbed)
    assert len(found) == 12
    assert found == sorted(found)
    assert found[5] in (2, 3)  # each once an epoch; a substitute may be the other one
    assert found[11] in (4, 5, 6)


@pytest.mark.parametrize("step", [2, 5, 7, 10])
def test_killed_and_restarted_equals_undisturbed(
    undisturbed: PlannedStage,
    damaged: Path,
    tmp_path: Path,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def die(path: Path, record: dict[str, Any]) -> None:
        append_journal(path, record)
        if "metrics" in record and record["step"] == step:
            raise KeyboardInterrupt("killed")

    planned = plan(damaged, tmp_path, SKIP)
    monkeypatch.setattr(run_writer, "append_journal", die)
    with pytest.raises(KeyboardInterrupt):
        run(planned)
    monkeypatch.undo()
    result = run(planned)
    assert counts(planned) == counts(undisturbed)
    expected = finished_result(undisturbed)
    assert expected is not None
    assert result.checkpoint.digest == expected.checkpoint.digest


def test_a_stage_that_failed_goes_on_when_it_may_skip(
    undisturbed: PlannedStage, damaged: Path, tmp_path: Path
) -> None:
    failing = plan(damaged, tmp_path, {}, cluster={"workers": 0, "max_failures": 0})
    with pytest.raises(StageFailed, match="checksum"):
        run(failing)
    skipping = plan(damaged, tmp_path, SKIP)
    assert skipping.run.path == failing.run.path
    result = run(skipping)
    expected = finished_result(undisturbed)
    assert expected is not None
    assert result.checkpoint.digest == expected.checkpoint.digest
    again = plan(damaged, tmp_path, {}, cluster={"workers": 0, "max_failures": 0})
    assert finished_result(skipping) is not None
    assert finished_result(again) is None
    with pytest.raises(StageFailed, match=r"replaced \d bad samples.*on_bad_sample is now fail"):
        run(again)


def test_without_bad_samples_the_policies_are_one(tiny_data: Path, tmp_path: Path) -> None:
    failing = plan(tiny_data, tmp_path, {})
    result = run(failing)
    assert set(counts(failing)) == {None}
    found = finished_result(plan(tiny_data, tmp_path, SKIP))
    assert found is not None
    assert found.checkpoint.digest == result.checkpoint.digest


def test_a_bad_validation_sample_is_an_error_in_any_case(tiny_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_data / DATASET, root / DATASET)
    damage(root, "val", (3,))
    planned = plan(root, tmp_path / "storage", SKIP, cluster={"workers": 0, "max_failures": 0})
    with pytest.raises(StageFailed, match="evaluation counts every sample"):
        run(planned)


@pytest.fixture
def train_set(tiny_data: Path) -> Dataset:
    return open_dataset(tiny_data, DATASET, "train")


def meter(train_set: Dataset, place: Place = ALONE, **policy: Any) -> BadSampleMeter:
    data = {"train": {"dataset": DATASET, "crop": 33}, "val": {"dataset": DATASET}}
    config = DataConfig.model_validate(data | SKIP | policy)
    return BadSampleMeter(config, train_set, 6, place)


def bad(*rows: int) -> list[BadSample]:
    return [BadSample(shard="00000.tar", row=row, reason=f"picture{row}: torn") for row in rows]


def test_more_than_the_allowed_share_stops_the_run(train_set: Dataset) -> None:
    few = meter(train_set)  # eight, as 0.1 % of 48 is less
    few.add(5, bad(*range(8)))
    assert few.read() == {"train/bad_samples": 8}
    few.add(5, bad(8))
    with pytest.raises(DataError, match=r"9 bad samples in 1 epochs.*allows 8.*picture0: torn; "):
        few.read()
    half = meter(train_set, max_bad_share=0.5)
    half.add(0, bad(*range(24)))
    assert half.read() == {"train/bad_samples": 24}
    half.add(6, bad(*range(24)))  # the next epoch
    assert half.read() == {"train/bad_samples": 48}
    half.add(11, bad(0))
    with pytest.raises(DataError, match="49 bad samples in 2 epochs"):
        half.read()


def test_what_a_checkpoint_counted_is_counted_on(train_set: Dataset) -> None:
    restored = meter(train_set)
    restored.go_on_from(8)
    assert restored.read() == {"train/bad_samples": 8}
    restored.add(0, bad(1))
    with pytest.raises(DataError, match="9 bad samples"):
        restored.read()
    with pytest.raises(DataError, match="replaced 8 bad samples"):
        meter(train_set, on_bad_sample="fail").go_on_from(8)
    meter(train_set, on_bad_sample="fail").go_on_from(0)


def test_each_bad_sample_is_logged_once_with_its_place(
    train_set: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    third = Place(rank=3, world=1, device=torch.device("cpu"))
    counted = meter(train_set, third)
    counted.add(0, bad(1, 2))
    counted.add(1, bad(2, 1))
    assert counted.read() == {"train/bad_samples": 4}
    assert [record.getMessage() for record in caplog.records] == [
        f"worker 3: bad sample, row {row} of 00000.tar, replaced by another: picture{row}: torn"
        for row in (1, 2)
    ]
