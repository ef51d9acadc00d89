"""A command that is asked to stop: a checkpoint, an exit code, and the same numbers afterwards."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.errors import RunError, StageFailed
from orchestrator.job.config import Job
from orchestrator.job.job_file import load_job
from orchestrator.launch import stage
from orchestrator.launch.graph import Branch
from orchestrator.launch.pipeline import run_job
from orchestrator.launch.report import Display
from orchestrator.runs.bill import add_bills
from orchestrator.runs.run import Run, all_runs, read_journal
from tests.unit.orchestrator.jobs import pipeline_job, stage_job, write

SIGNALS = """
import os, signal, sys
from orchestrator.runs.stop import Interrupted, Signals

signals = Signals()
signals.listen()
signals.patient = sys.argv[1] == "patient"
try:
    os.kill(os.getpid(), signal.SIGINT)
except Interrupted as interrupted:
    sys.exit(f"interrupted by {interrupted}")
print(signals.received.name, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("still here")
"""
HOLDS = """
import sys, time
from pathlib import Path
from orchestrator.runs.run import Run

with Run(Path(sys.argv[1])).lock():
    print("holds", flush=True)
    time.sleep(600)
"""


def python(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )


def test_the_second_signal_ends_the_process_at_once() -> None:
    process = python(SIGNALS, "patient")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert output == "SIGINT\n"
    assert "the last checkpoint stays" in errors


def test_the_first_one_interrupts_where_nothing_trains() -> None:
    process = python(SIGNALS, "impatient")
    output, errors = process.communicate(timeout=60)
    assert (output, errors) == ("", "interrupted by SIGINT\n")


def run(job: Job) -> list[stage.StageResult]:
    with Display(Console(file=io.StringIO())) as display:
        return run_job(job, display)


def series(run: Run) -> list[tuple[int, dict[str, Any]]]:
    """Losses and metrics; no times."""
    kept = ("train/loss", "train/lr", "train/gradient_norm", "val/top1", "val/loss")
    return [
        (record["step"], {k: v for k, v in record["metrics"].items() if k in kept})
        for record in read_journal(run.journal)
    ]


def stop(path: Path, storage: Path, ready: Callable[[], bool]) -> tuple[int, str]:
    """Run a job file as a command; SIGTERM as soon as it is ready. Its exit code and output."""
    command = [sys.executable, "-m", "orchestrator", "run", str(path)]
    environment = os.environ | {"ATROUS_STORAGE": str(storage), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not ready() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def test_a_stopped_stage_goes_on_to_the_numbers_of_an_undisturbed_one(
    tiny_data: Path, tmp_path: Path
) -> None:
    changes = {"steps": 100, "log_every": 10, "evaluate": {"every": 50}}
    settings = stage_job(tiny_data, **changes) | {"checkpoint": {"every": 100}}
    path = write(tmp_path / "job.yaml", settings)
    stopped = tmp_path / "stopped"
    code, output = stop(path, stopped, lambda: any(stopped.glob("runs/*/stop.json")))
    assert code == 128 + signal.SIGTERM, output
    assert "tiny-imagenet: stopped (SIGTERM) at step" in output
    assert "SIGTERM: the same command goes on" in output
    (interrupted,) = all_runs(stopped)
    assert interrupted.read()["status"] == "stopped"

    results = {}
    for storage in (stopped, tmp_path / "undisturbed"):
        job = load_job(path, (f"storage={storage}",))
        (results[storage],) = run(job)
    one, other = results.values()
    assert one.run.read()["attempts"] == 2
    assert one.checkpoint.digest == other.checkpoint.digest
    assert one.metrics == other.metrics
    assert series(one.run) == series(other.run)


def test_a_stopped_pipeline_starts_no_more_stages(tiny_data: Path, tmp_path: Path) -> None:
    settings = pipeline_job(tiny_data)
    settings["stages"][2]["steps"] = 100
    storage = tmp_path / "storage"
    path = write(tmp_path / "job.yaml", settings)
    code, output = stop(path, storage, lambda: any(storage.glob("runs/*/stop.json")))
    assert code == 128 + signal.SIGTERM, output
    assert "not started: tiny-voc, tiny-coco" in output
    assert [run.read()["status"] for run in all_runs(storage)] == ["stopped"]
    (record,) = storage.glob("pipelines/*/run.json")
    assert Run(record.parent).read()["status"] == "stopped"


def test_a_job_that_runs_is_not_run_a_second_time(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    first = python(HOLDS, run.path)
    assert first.stdout is not None
    assert first.stdout.readline() == "holds\n"
    who = f"run is being run by process {first.pid} on {os.uname().nodename}"
    with pytest.raises(RunError, match=who), run.lock():
        pass
    first.kill()
    first.communicate(timeout=60)
    with run.lock():  # what a dead process left behind holds nobody up
        pass


def test_the_owner_of_a_run_is_told_as_a_ray_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = '{"metadata": {"job_submission_id": "raysubmit_x"}}'
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", config)
    run = Run(tmp_path / "run")
    with run.lock(), pytest.raises(RunError, match=r"by Ray job raysubmit_x \(process"), run.lock():
        pass


def test_a_stage_without_workers_is_not_waited_for(tiny_data: Path, tmp_path: Path) -> None:
    from orchestrator.launch.cluster import needed
    from orchestrator.runs.liveness import Liveness

    job = load_job(write(tmp_path / "job.yaml", stage_job(tiny_data, cluster={"workers": 2})))
    planned = stage.plan_stage(job.settings, tmp_path, job.data_directory)  # type: ignore[union-attr]
    bill = add_bills(())
    branch = Branch(planned=planned, needs=needed(planned.stage.cluster), bill=bill)
    assert branch.abandoned()  # none has started
    planned.run.update(attempts=1)
    (planned.run.path / "workers").mkdir()
    worker = Liveness(planned.run, 0, 2, hang_after=600, notice=None)
    worker._beat()
    assert not branch.abandoned()
    branch.heard -= 100
    assert branch.abandoned()  # none beats any more
    worker._beat()
    assert not branch.abandoned()


def test_a_stage_that_hung_too_often_says_who_hung(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WorkerHealthCheckFailedError(Exception):  # as Ray calls a worker that is gone
        pass

    def lose(planned: stage.PlannedStage, _: object) -> Any:
        planned.run.note("hang", "rank 1 on a last finished step 7", attempt=1, step=7, silence=9)
        error = RuntimeError("Training failed")
        error.worker_failures = {0: WorkerHealthCheckFailedError()}  # type: ignore[attr-defined]
        raise error

    job = load_job(write(tmp_path / "job.yaml", stage_job(tiny_data)))
    planned = stage.plan_stage(job.settings, tmp_path, job.data_directory)  # type: ignore[union-attr]
    stage.open_run(planned)
    monkeypatch.setattr(stage, "_train", lose)
    with pytest.raises(StageFailed, match="rank 1 on a last finished step 7"):
        stage.train_stage(planned)
    assert planned.run.read()["status"] == "failed"
