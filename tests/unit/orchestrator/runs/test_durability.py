"""Whatever becomes of the disk, of the thread that writes, or of the run: numbers stay the same."""

import errno
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import CheckpointError, StageFailed
from orchestrator.job.config import PipelineJob, StageSettings
from orchestrator.launch.stage import PlannedStage, finished_result, open_run
from orchestrator.runs import checkpoint_writer, run_writer
from orchestrator.runs.checkpoint import save_checkpoint
from orchestrator.runs.record import Metrics
from orchestrator.runs.run import append_journal, read_journal
from orchestrator.runs.run_writer import RunWriter
from orchestrator.runs.start import Start
from orchestrator.training import worker
from orchestrator.training.stage_checks import duration_warnings
from tests.unit.orchestrator.jobs import pipeline_job, stage
from tests.unit.orchestrator.training.test_training import plan, run, series

DELETIONS = {"os.remove", "os.rmdir"}
CHANGES = DELETIONS | {"os.chmod", "os.mkdir", "os.rename"}


@pytest.fixture(scope="module")
def undisturbed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> PlannedStage:
    planned = plan(tiny_data, tmp_path_factory.mktemp("undisturbed"))
    run(planned)
    return planned


def assert_same(planned: PlannedStage, undisturbed: PlannedStage) -> None:
    assert series(planned) == series(undisturbed)
    found, expected = finished_result(planned), finished_result(undisturbed)
    assert found is not None
    assert expected is not None
    assert found.checkpoint.digest == expected.checkpoint.digest
    assert found.metrics == expected.metrics


class Killed(BaseException):
    """The process is no more."""


@dataclass
class Death:
    """Of the process, at a change of the disk by the thread that writes checkpoints."""

    at: int
    directory: Path
    changes: int = 0

    def look(self, event: str, arguments: tuple[Any, ...]) -> None:
        thread = threading.current_thread()
        writes = thread.name.startswith("checkpoints")
        if (writes or thread is threading.main_thread()) and self.is_change(event, arguments):
            self.changes += writes
            if self.changes >= self.at:  # from then on nobody changes anything
                raise Killed

    def is_change(self, event: str, arguments: tuple[Any, ...]) -> bool:
        opened = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if event in DELETIONS and arguments[1] >= 0:  # by name in an open directory
            return True
        return (opened or event in CHANGES) and str(self.directory) in str(arguments[0])


_deaths: list[Death] = []
sys.addaudithook(lambda event, arguments: [death.look(event, arguments) for death in _deaths])


@contextmanager
def dies_at(change: int, directory: Path) -> Iterator[None]:
    _deaths.append(Death(change, directory))
    try:
        yield
    finally:
        _deaths.clear()


@pytest.mark.parametrize("change", range(1, 30, 4))
def test_killed_while_a_checkpoint_is_written_equals_undisturbed(
    undisturbed: PlannedStage, tiny_data: Path, tmp_path: Path, change: int
) -> None:
    planned = plan(tiny_data, tmp_path)
    with dies_at(change, planned.run.path), pytest.raises(Killed):
        run(planned)
    run(planned)
    assert_same(planned, undisturbed)


def full_disk(step: int, tries: int) -> Any:
    """Instead of `save_checkpoint`: a disk that is full at a step, for so many tries."""

    def save(*arguments: Any) -> Any:
        nonlocal tries
        if arguments[3]["step"] == step and tries:
            tries -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save_checkpoint(*arguments)

    return save


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_disk_that_is_full_for_a_while_changes_nothing(
    undisturbed: PlannedStage,
    tiny_data: Path,
    tmp_path: Path,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", full_disk(step, 1))
    planned = plan(tiny_data, tmp_path)
    run(planned)
    assert_same(planned, undisturbed)
    assert f"checkpoint of step {step}: not written" in (
        planned.run.path / "events.jsonl"
    ).read_text(encoding="utf-8")


def test_a_disk_that_stays_full_is_told_and_the_run_goes_on_later(
    undisturbed: PlannedStage, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", full_disk(6, 1000))
    monkeypatch.setattr(checkpoint_writer, "PATIENCE", 0.0)
    planned = plan(tiny_data, tmp_path)
    told = r"the last checkpoint \(step 6\) could not be written in 0 s: .*No space.*from step 4"
    with pytest.raises(StageFailed, match=told):
        run(planned)
    monkeypatch.undo()
    run(planned)
    assert_same(planned, undisturbed)
    assert read_journal(planned.run.journal)[-1]["step"] == 6


def test_a_storage_that_is_away_for_a_while_changes_nothing(
    undisturbed: PlannedStage, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(tiny_data, tmp_path)
    runs, away = planned.run.path.parent, tmp_path / "away"
    log = RunWriter.log

    def unmounted(self: RunWriter, step: int, metrics: Metrics) -> None:
        if step == 3:
            runs.rename(away)
        if step == 6:
            assert not runs.exists()  # nothing was made where no storage is
            away.rename(runs)
        log(self, step, metrics)

    monkeypatch.setattr(RunWriter, "log", unmounted)
    run(planned)
    assert_same(planned, undisturbed)


def test_workers_of_an_attempt_that_was_given_up_end(
    undisturbed: PlannedStage, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is given again while they still train."""
    planned = plan(tiny_data, tmp_path)

    def again(path: Path, record: dict[str, Any]) -> None:
        append_journal(path, record)
        if "metrics" in record and record["step"] == 3:
            open_run(planned)

    monkeypatch.setattr(run_writer, "append_journal", again)
    message = "tiny: .*: attempt 2 goes on with this run; this worker is of attempt 1"
    with pytest.raises(StageFailed, match=message):
        run(planned)
    monkeypatch.undo()
    assert [step for step, _ in series(planned)] == [1, 2, 3]
    run(planned)
    assert_same(planned, undisturbed)


def test_a_stage_starts_from_the_last_or_the_best(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.1, 0.3, 0.2, 0.3, 0.1, 0.2])
    monkeypatch.setattr(worker, "evaluate", lambda *_: {"val/miou": next(scores)})
    every = {"evaluate": {"every": 1}, "checkpoint": {"every": 1, "keep": 1, "keep_best": 1}}
    earlier = plan(tiny_data, tmp_path, **every)
    run(earlier)

    def start(which: str, place: Path | str) -> Start:
        wanted = {"checkpoint": str(place), "which": which}
        found = plan(tiny_data, tmp_path, start_from=wanted).start
        assert found is not None
        return found

    for place in ("tiny", earlier.run.checkpoints):
        assert start("last", place).step == 6
        assert start("best", place).step == 4
    assert start("last", "tiny").digest != start("best", "tiny").digest
    single = earlier.run.checkpoints / "step-00000006"
    assert start("last", single).step == 6
    with pytest.raises(CheckpointError, match=r"which: best: .*step-00000006 is one checkpoint"):
        start("best", single)


def test_the_best_of_a_run_that_did_not_keep_it_is_refused(
    undisturbed: PlannedStage, tiny_data: Path
) -> None:
    wanted = {"checkpoint": str(undisturbed.run.checkpoints), "which": "best"}
    with pytest.raises(CheckpointError, match=r"which: best: .*checkpoint\.keep_best: 1"):
        plan(tiny_data, undisturbed.run.path, start_from=wanted)


def test_a_job_that_would_find_no_best_is_told_beforehand() -> None:
    def warnings(evaluate: int, checkpoint: int, keep_best: int) -> list[str]:
        changes = {
            "evaluate": {"every": evaluate},
            "checkpoint": {"every": checkpoint, "keep_best": keep_best},
        }
        settings = StageSettings.model_validate(
            stage("tiny", "segmentation", "tiny-voc", **changes)
        )
        found = duration_warnings(settings, steps=6, steps_per_epoch=3)
        return [text for text in found if "keep_best" in text]

    assert warnings(3, 2, keep_best=0) == []
    assert warnings(2, 2, keep_best=1) == []
    assert len(warnings(3, 2, keep_best=1)) == 1  # steps 3 and 6, 2, 4 and 6


def test_a_pipeline_whose_stage_wants_a_best_that_is_not_kept_is_refused(tmp_path: Path) -> None:
    job = pipeline_job(tmp_path)
    job["stages"][0]["start_from"] = {"checkpoint": "tiny-coco", "which": "best"}
    for each in job["stages"][1:]:
        if isinstance(each.get("start_from"), str):
            each["start_from"] = {"checkpoint": each["start_from"]}
    with pytest.raises(ValueError, match=r"best checkpoint of tiny-coco, .*keep_best: 1"):
        PipelineJob.model_validate(job)
    job["stages"][1]["checkpoint"] |= {"keep_best": 1}
    PipelineJob.model_validate(job)
