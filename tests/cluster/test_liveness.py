"""Workers that hang, nodes that die or are taken away, and a driver that is told to stop."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.runs.checkpoint import newest_checkpoint
from orchestrator.runs.run import read_journal
from tests.cluster.conftest import Nodes, descendants, wait_for_event, wait_for_step
from tests.unit.orchestrator.jobs import stage_job, write

pytestmark = pytest.mark.cluster


@contextmanager
def command(
    path: Path, environment: dict[str, str], **more: str
) -> Iterator["subprocess.Popen[str]"]:
    """`atrous run`, killed if the test fails."""
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "run", str(path)],
        env=environment | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def job(data: Path, place: Path, workers: Any, hang_after: float) -> Path:
    """Long enough for everything that befalls it; it is stopped in the end."""
    settings = stage_job(data, steps=4000, evaluate={"every": 4000}, log_every=5)
    settings |= {"checkpoint": {"every": 20}}
    settings |= {"cluster": {"workers": workers, "hang_after": hang_after}}
    return write(place / "job.yaml", settings)


def test_a_worker_that_hangs_is_told_and_started_again_and_the_driver_stops(
    tiny_data: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """SIGSTOP of one of two; then SIGTERM to the command."""
    path = job(tiny_data, tmp_path, workers=2, hang_after=8)
    with command(path, environment) as process:
        run = wait_for_step(tmp_path / "storage", 40)
        started = [pid for pid, args in descendants(process.pid) if "RayTrainWorker" in args]
        assert len(started) == 2
        os.kill(started[1], signal.SIGSTOP)
        hang = wait_for_event(run, "hang")
        again = wait_for_event(run, "start", number=2)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "does not answer" in hang["text"]
    assert hang["text"] in output
    (stacks,) = (run.path / "stacks").iterdir()  # of the one that could write them
    assert "liveness" in stacks.read_text()
    assert again["step"] <= hang["step"] + 1
    assert again["step"] >= hang["step"] - 20
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    assert run.read()["status"] == "stopped"
    steps = [record["step"] for record in read_journal(run.journal)]
    assert steps == list(range(5, steps[-1] + 1, 5))


def test_a_run_goes_on_with_the_nodes_that_are_left(
    tiny_data: Path, tmp_path: Path, environment: dict[str, str], nodes: Nodes
) -> None:
    """kill -9 of one of two nodes, then Ctrl-C."""
    path = job(tiny_data, tmp_path, workers=[1, 2], hang_after=60)
    with command(path, environment, RAY_ADDRESS=nodes.address) as process:
        run = wait_for_step(tmp_path / "storage", 40)
        first = wait_for_event(run, "start")
        nodes.kill_last()
        second = wait_for_event(run, "start", number=2)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT, output
    assert (first["world"], second["world"]) == (2, 1)
    assert second["step"] >= 20
    assert run.read()["status"] == "stopped"
    steps = [record["step"] for record in read_journal(run.journal)]
    assert steps == list(range(5, steps[-1] + 1, 5))


def test_a_notice_makes_a_checkpoint_before_the_node_goes(
    tiny_data: Path, tmp_path: Path, environment: dict[str, str], nodes: Nodes
) -> None:
    """Nothing is lost with the node, though no checkpoint was due; no failure is counted."""
    path = job(tiny_data, tmp_path, workers=[1, 2], hang_after=60)
    path.write_text(path.read_text().replace("every: 20", "every: 4000"))
    with command(path, environment, RAY_ADDRESS=nodes.address) as process:
        run = wait_for_step(tmp_path / "storage", 20)
        nodes.drain_last(seconds=12)
        wait_for_event(run, "leave")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    checkpoint = newest_checkpoint(run.checkpoints)
    assert checkpoint is not None
    logged = [record["step"] for record in read_journal(run.journal)]
    assert logged[-1] <= checkpoint.step
    assert "a worker was told to leave" in output
