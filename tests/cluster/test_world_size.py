"""A run whose number of workers changes in its middle keeps its batches and its losses."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.runs.run import Run, read_journal
from tests.cluster.conftest import Atrous, only_run, wait_for_step
from tests.unit.orchestrator.jobs import stage, write

pytestmark = pytest.mark.cluster
COMPARED = ("train/loss", "train/lr", "train/gradient_norm", "val/miou", "val/pixel_accuracy")


def metrics(storage: Path) -> list[tuple[int, dict[str, float]]]:
    run = only_run(storage)
    assert isinstance(run, Run)
    assert run.finished
    return [
        (record["step"], {k: v for k, v in record["metrics"].items() if k in COMPARED})
        for record in read_journal(run.journal)
    ]


def test_two_workers_then_one_then_two(
    tiny_data: Path, tmp_path: Path, atrous: Atrous, environment: dict[str, str]
) -> None:
    """Parts of 2 and 3, and passes of 2 within them; each change is a kill -9 of the command.

    Every step is logged: a sample in another batch, or twice, would be another loss. Batch norm is
    frozen and dropout off, as its masks are each worker's own.
    """
    settings = stage("tiny-voc", "segmentation", "tiny-voc")
    job = {"kind": "stage", "data_root": str(tiny_data)} | settings
    job["model"] |= {"batch_norm": {"frozen": True}, "dropout": 0.0}
    job["optimizer"]["lr"] = 0.01
    job |= {"global_batch": 5, "micro_batch": 2, "steps": 240, "log_every": 1}
    job |= {"evaluate": {"every": 120}, "checkpoint": {"every": 10}, "ema": {"decay": 0.9}}
    path, storage = tmp_path / "job.yaml", tmp_path / "changing"
    environment["OMP_NUM_THREADS"] = "1"  # two that wait for each other crawl on a busy machine
    command = [sys.executable, "-m", "orchestrator", "run", str(path)]
    for workers, step in ((2, 60), (0, 130)):
        write(path, job | {"cluster": {"workers": workers}})
        process = subprocess.Popen(
            command, env=environment | {"ATROUS_STORAGE": str(storage)}, stdout=subprocess.DEVNULL
        )
        try:
            wait_for_step(storage, step)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    for place, workers in ((storage, 2), (tmp_path / "one", 0)):
        environment["ATROUS_STORAGE"] = str(place)
        done = atrous("run", write(path, job | {"cluster": {"workers": workers}}))
        assert done.returncode == 0, done.stdout + done.stderr
    changing = only_run(storage)
    assert changing is not None
    assert changing.read()["attempts"] == 3
    found, expected = metrics(storage), metrics(tmp_path / "one")
    assert [step for step, _ in found] == [step for step, _ in expected] == list(range(1, 241))
    for (step, values), (_, others) in zip(found, expected, strict=True):
        assert values == pytest.approx(others, rel=1e-3), step
