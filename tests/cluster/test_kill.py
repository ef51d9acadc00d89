"""Killed and run again equals never stopped, with real processes and real Ray workers."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import Atrous, descendants, only_run, series, wait_for_step
from tests.unit.orchestrator.jobs import stage_job, write

pytestmark = pytest.mark.cluster


def job(data: Path, place: Path, workers: int) -> Path:
    # Slow enough to be killed in the middle: about 100 steps a second in one process.
    return write(
        place / "job.yaml",
        stage_job(
            data,
            steps=240,
            evaluate={"every": 120},
            checkpoint={"every": 20},
            log_every=5,
            cluster={"workers": workers},
        ),
    )


def digest(storage: Path) -> str:
    run = only_run(storage)
    assert run is not None
    assert run.finished
    return run.read()["digest"]


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_of_the_command(
    tiny_data: Path,
    tmp_path: Path,
    atrous: Atrous,
    environment: dict[str, str],
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = job(tiny_data, tmp_path, workers)
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "orchestrator", "run", str(path)]
    process = subprocess.Popen(
        command, env=environment | {"ATROUS_STORAGE": str(killed)}, stdout=subprocess.DEVNULL
    )
    wait_for_step(killed, 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    interrupted = only_run(killed)
    assert interrupted is not None
    assert not interrupted.finished

    environment["ATROUS_STORAGE"] = str(killed)
    resumed = atrous("run", path)
    assert resumed.returncode == 0, resumed.stderr
    environment["ATROUS_STORAGE"] = str(tmp_path / "undisturbed")
    undisturbed = atrous("run", path)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert digest(killed) == digest(tmp_path / "undisturbed")
    other = only_run(tmp_path / "undisturbed")
    assert other is not None
    assert series(interrupted) == series(other)
    assert interrupted.read()["attempts"] == 2


def test_kill_9_of_a_worker_is_survived(
    tiny_data: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    path = job(tiny_data, tmp_path, 2)
    storage = tmp_path / "storage"
    command = [sys.executable, "-m", "orchestrator", "run", str(path)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    run = wait_for_step(storage, 60)
    workers = [pid for pid, command in descendants(process.pid) if "RayTrainWorker" in command]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert run.finished
    assert run.read()["attempts"] == 1  # Ray Train restarted the workers within the attempt
    steps = [step for step, _ in series(run)]
    assert steps == list(range(5, 241, 5))
