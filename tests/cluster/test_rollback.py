"""A loss that is NaN on one of two workers, and a kill in the midst of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.runs.run import Run
from orchestrator.training.rollback import ROLLBACKS, read_windows
from tests.cluster.conftest import only_run, series
from tests.unit.orchestrator.jobs import stage_job, write

pytestmark = pytest.mark.cluster

POISONED = """
import math, sys

from orchestrator.training import trainer
from orchestrator.cli.main import main

make_trainer = trainer.make_trainer


def poisoned(config):
    import ray.train

    from orchestrator.training import worker

    make_loss, rank = worker.make_loss, ray.train.get_context().get_world_rank()

    def make(*arguments):
        good = make_loss(*arguments)

        def loss(outputs, labels, step):
            total, count = good(outputs, labels, step)
            return total * math.nan if rank == 1 and step in (35, 75) else total, count

        return loss

    worker.make_loss = make
    try:
        worker.train_worker(config)
    finally:
        worker.make_loss = make_loss


trainer.make_trainer = lambda _, *rest, **named: make_trainer(poisoned, *rest, **named)
main()
"""


def start(job: Path, storage: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", POISONED, "run", str(job)],
        env=os.environ | {"ATROUS_STORAGE": str(storage)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str], storage: Path) -> tuple[Run, str]:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    run = only_run(storage)
    assert run is not None
    return run, output


def killed_once_it_goes_back(process: subprocess.Popen[str], storage: Path) -> None:
    deadline = time.monotonic() + 240
    while not list(storage.glob(f"runs/*/{ROLLBACKS}")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_loss_that_is_nan_on_one_worker(tiny_data: Path, tmp_path: Path) -> None:
    job = write(
        tmp_path / "job.yaml",
        stage_job(
            tiny_data,
            steps=120,
            evaluate={"every": 60},
            checkpoint={"every": 20},
            log_every=5,
            cluster={"workers": 2},
        ),
    )
    undisturbed, output = finished(start(job, tmp_path / "a"), tmp_path / "a")
    windows = read_windows(undisturbed)
    assert [(window.start, window.stop) for window in windows] == [(20, 36), (60, 76)]
    assert [list(window.samples) for window in windows] == [["1"], ["1"]]
    assert all(len(window.samples["1"]) == 4 for window in windows)
    assert "the loss of step 35 is not finite (workers: 1; samples:" in output

    killed_once_it_goes_back(start(job, tmp_path / "b"), tmp_path / "b")
    killed, _ = finished(start(job, tmp_path / "b"), tmp_path / "b")
    assert killed.read()["digest"] == undisturbed.read()["digest"]
    assert series(killed) == series(undisturbed)
    assert read_windows(killed) == windows
    rollbacks = [json.loads(metrics).get("train/rollbacks") for _, metrics in series(killed)]
    assert rollbacks[0] is None
    assert rollbacks[-1] == 2
