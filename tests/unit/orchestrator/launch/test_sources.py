"""Data sets that a job prepares first: what is wrong with them is known before."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RunError
from orchestrator.job.config import Prepared, StageSettings
from orchestrator.launch.sources import (
    check_task,
    published_size,
    size_to_come,
    source_problems,
)
from tests.unit.orchestrator.jobs import MODEL, stage


def settings(task: str = "segmentation", split: str = "trainaug") -> StageSettings:
    values = stage("tiny", task, "mine")
    values["data"]["train"]["split"] = split
    return StageSettings.model_validate(values)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"splits": ["trainaug", "val"]}, None),
        ({"splits": ["trainaug", "vall"]}, "no split 'vall'; did you mean 'val'? there are"),
        ({"splits": ["trainaug"]}, "splits: tiny needs 'val' too; there are trainaug"),
        ({"source": "gone"}, "gone does not exist, and mine is not prepared yet"),
        ({"source": None, "synthesize": {"sed": 1}}, "no option 'sed'; did you mean 'seed'?"),
        ({"source": None, "synthesize": {"counts": 5}}, "counts should be a section"),
        ({"source": None, "synthesize": {"counts": {"voc/trn": 5}}}, "counts has no 'voc/trn'"),
    ],
)
def test_problems(tiny_data: Path, changes: dict[str, Any], problem: str | None) -> None:
    values = {"format": "voc", "source": str(tiny_data / "raw/voc")} | changes
    wanted = Prepared.model_validate(values)
    found = list(source_problems("mine", wanted, [settings()], prepared=False))
    assert (found == []) if problem is None else (problem in " ".join(found))


def test_a_split_that_the_source_lacks_and_one_that_is_there_already(tiny_data: Path) -> None:
    wanted = Prepared(format="voc", source=str(tiny_data / "raw/voc"))
    stages = [settings(split="train_aug")]
    (problem,) = source_problems("mine", wanted, stages, prepared=False)
    assert "no split 'train_aug'; did you mean 'trainaug'?" in problem
    assert list(source_problems("mine", wanted, stages, prepared=True)) == []


def test_a_format_is_for_a_task(tmp_path: Path) -> None:
    check_task(Prepared(format="voc", source=str(tmp_path)), settings(), "mine")
    with pytest.raises(RunError, match="mine is of format imagenet, which is for classification"):
        check_task(Prepared(format="imagenet", source=str(tmp_path)), settings(), "mine")
    values = stage("tiny", "classification", "mine", model=MODEL)
    classifier = StageSettings.model_validate(values)
    check_task(Prepared(format="imagenet", source=str(tmp_path)), classifier, "mine")


@pytest.mark.parametrize(
    ("values", "split", "size"),
    [
        ({"format": "voc", "source": "/raw"}, "trainaug", (10_582, 21)),
        ({"format": "voc", "source": "/raw", "limit": 100}, "trainaug", (100, 21)),
        ({"format": "voc", "source": "/raw"}, "mine", None),
        ({"format": "voc", "synthesize": {}}, "trainaug", (480, 21)),
        ({"format": "imagenet", "synthesize": {"counts": {"imagenet/train": 7}}}, "train", (7, 8)),
        ({"format": "multilabel", "synthesize": {}}, "val", (160, 8)),
        ({"format": "folder", "source": "/raw"}, "train", None),
    ],
)
def test_sizes(values: dict[str, Any], split: str, size: tuple[int, int] | None) -> None:
    assert size_to_come(Prepared.model_validate(values), split) == size


def test_a_small_source_is_listed_and_a_damaged_one_is_not(tiny_data: Path, tmp_path: Path) -> None:
    small = Prepared(format="voc", source=str(tiny_data / "raw/voc"))
    assert size_to_come(small, "train") == (24, 21)
    assert size_to_come(small, "nothing") is None
    assert size_to_come(Prepared(format="voc", source=str(tmp_path)), "val") == (1449, 21)


def test_published_sizes_go_by_the_beginning_of_the_name() -> None:
    assert published_size("voc2012", "val") == (1449, 21)
    assert published_size("jft", "train") is None
