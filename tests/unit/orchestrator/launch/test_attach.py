"""A second command for a job that another one runs: refused, or waits for its result."""

import io
import signal
import threading
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from rich.console import Console

from orchestrator.errors import StageFailed
from orchestrator.job.config import Job
from orchestrator.job.job_file import load_job
from orchestrator.launch.pipeline import run_job
from orchestrator.launch.report import Display
from orchestrator.launch.stage import PlannedStage, StageResult, open_run, plan_stage, train_stage
from orchestrator.runs.stop import Interrupted, Signals, asked_to_stop
from tests.unit.orchestrator.jobs import stage_job, write

FIRST = r"is being run by process \d+ on .*--attach to wait for its result"


@pytest.fixture(autouse=True)
def _untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.launch.graph.Tracker", MagicMock())


@pytest.fixture
def job(tiny_data: Path, tmp_path: Path) -> Job:
    return load_job(write(tmp_path / "job.yaml", stage_job(tiny_data)))


@pytest.fixture
def planned(job: Job) -> PlannedStage:
    return plan_stage(job.stages[0], Path(job.storage), job.data_directory)


def second(
    job: Job, signals: Signals | None = None, *, attach: bool = False
) -> tuple[list[StageResult], str]:
    stream = io.StringIO()
    with Display(Console(file=stream, width=1000)) as display:
        return run_job(job, display, signals, attach=attach), stream.getvalue()


def test_it_is_refused(job: Job, planned: PlannedStage) -> None:
    with planned.run.lock(), pytest.raises(StageFailed, match=f"not run: .*{FIRST}"):
        second(job)


def test_it_waits_for_the_result_of_the_first_one(job: Job, planned: PlannedStage) -> None:
    began = threading.Event()

    def first() -> None:
        with planned.run.lock():
            began.set()
            time.sleep(1)
            open_run(planned)
            train_stage(planned)

    thread = threading.Thread(target=first)
    thread.start()
    began.wait()
    (result,), _ = second(job, attach=True)
    thread.join()
    assert result.reused
    assert result.checkpoint.step == planned.steps
    assert planned.run.read()["attempts"] == 1


def test_it_goes_on_where_the_first_one_failed(job: Job, planned: PlannedStage) -> None:
    began = threading.Event()

    def first() -> None:
        with planned.run.lock():
            began.set()
            time.sleep(1)

    thread = threading.Thread(target=first)
    thread.start()
    began.wait()
    (result,), told = second(job, attach=True)
    thread.join()
    assert not result.reused
    assert told.count("this command waits for it") == 1


def test_its_own_end_does_not_stop_the_first_one(job: Job, planned: PlannedStage) -> None:
    signals = Signals()
    threading.Timer(2.0, setattr, (signals, "received", signal.SIGINT)).start()
    open_run(planned)
    with planned.run.lock(), pytest.raises(Interrupted):
        second(job, signals, attach=True)
    assert asked_to_stop(planned.run) is None
