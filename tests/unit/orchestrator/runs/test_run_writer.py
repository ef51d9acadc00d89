"""One writer of a run at a time; nothing of the journal is lost."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RunTakenOver
from orchestrator.job.sections import Checkpoints
from orchestrator.runs import run_writer
from orchestrator.runs.run import Run, append_journal, read_journal
from orchestrator.runs.run_writer import Fence, Lines, RunWriter
from tests.unit.orchestrator.runs.test_checkpoint_writer import contents, steps


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.update(attempts=1)
    return run


def test_an_older_attempt_may_not_write(run: Run) -> None:
    old = Fence(run, 1)
    old.check()
    run.update(attempts=2)
    with pytest.raises(RunTakenOver, match="attempt 2 goes on with this run; this worker is of at"):
        old.check()
    with pytest.raises(RunTakenOver):  # nor begin anew
        Fence(run, 1)
    Fence(run, 2).check()


def test_a_run_directory_that_is_away_is_a_matter_of_the_storage(run: Run, tmp_path: Path) -> None:
    fence = Fence(run, 1)
    run.path.rename(tmp_path / "away")
    with pytest.raises(OSError, match=r"run\.json"):
        fence.check()


def test_of_two_workers_of_one_attempt_the_later_one_writes(run: Run) -> None:
    """Ray started the workers again and does not know that an earlier one lives."""
    lost, new = Fence(run, 1), Fence(run, 1)
    new.check()
    with pytest.raises(RunTakenOver, match=rf"process {os.getpid()} on .* goes on with this run"):
        lost.check()


def test_a_worker_that_was_left_behind_changes_nothing(run: Run) -> None:
    settings = Checkpoints(keep=1)
    with RunWriter(run, 1, settings) as old:
        old.go_on_from(0)
        old.log(1, {"train/loss": 3.0})
        old.save(contents(1))
        old.finish(lambda _: None)
        run.update(attempts=2)
        with RunWriter(run, 2, settings) as new:
            before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
            for forbidden in (
                lambda: old.log(2, {"train/loss": 2.0}),
                lambda: old.go_on_from(0),
                lambda: (old.save(contents(2)), old.finish(lambda _: None)),
                old.check,
            ):
                with pytest.raises(RunTakenOver):
                    forbidden()
            after = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
            assert after == before
            assert steps(run.checkpoints) == [1]
            new.log(2, {"train/loss": 1.0})
    assert [record["metrics"]["train/loss"] for record in read_journal(run.journal)] == [3.0, 1.0]


def test_what_killed_writers_left_is_gone_before_anything_is_written(run: Run) -> None:
    left = run.checkpoints / ".step-00000004.99.tmp"
    left.mkdir(parents=True)
    RunWriter(run, 1, Checkpoints())
    assert not left.exists()


class Disk:
    """Where lines are appended, as long as it is not full."""

    full = False

    def append(self, path: Path, record: dict[str, Any]) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append_journal(path, record)


def test_a_full_disk_delays_the_journal_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk, path = Disk(), tmp_path / "journal.jsonl"
    monkeypatch.setattr(run_writer, "append_journal", disk.append)
    journal = Lines(path, lambda: None)
    for step in range(1, 6):
        disk.full = step in (2, 3)
        journal.append({"step": step})
    assert [record["step"] for record in read_journal(path)] == [1, 2, 3, 4, 5]
    assert "kept for later" in caplog.text
    disk.full = True
    journal.append({"step": 6})
    with pytest.raises(OSError, match="space"):  # no checkpoint comes to be without its metrics
        journal.sync()
    disk.full = False
    journal.sync()
    assert [record["step"] for record in read_journal(path)][-1] == 6


def test_the_time_of_checkpoints_is_logged_with_the_next_metrics(run: Run) -> None:
    with RunWriter(run, 1, Checkpoints()) as writer:
        writer.go_on_from(0)
        writer.log(1, {})
        writer.save(contents(1))
        writer.log(2, {})
        writer.log(3, {})
    logged = [record["metrics"] for record in read_journal(run.journal)]
    assert [list(metrics) for metrics in logged] == [[], ["train/checkpoint_stall_s"], []]


def test_a_checkpoint_that_is_not_written_is_an_event_of_the_run(run: Run) -> None:
    with RunWriter(run, 1, Checkpoints()) as writer:
        run.checkpoints.write_text("a file where the directory belongs")
        writer.go_on_from(0)
        writer.save(contents(1))
    (event,) = map(json.loads, (run.path / "events.jsonl").read_text().splitlines())
    assert event["kind"] == "storage"
    assert event["text"].startswith("checkpoint of step 1: not written")
