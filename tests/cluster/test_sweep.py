"""A sweep that is killed decides and trains what an undisturbed one does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.sweep import decisions
from tests.cluster.conftest import Atrous
from tests.unit.orchestrator.jobs import stage, write

pytestmark = pytest.mark.cluster


def test_killed_twice_it_is_the_same_sweep(
    tiny_data: Path, tmp_path: Path, atrous: Atrous, environment: dict[str, str]
) -> None:
    settings = stage("seg", "segmentation", "tiny-voc", steps=6)
    settings |= {"evaluate": {"every": 2}, "checkpoint": {"every": 3}}
    job = {
        "kind": "sweep",
        "name": "tiny",
        "data_root": str(tiny_data),
        "stages": [settings],
        "space": {"optimizer.lr": {"loguniform": [1e-4, 0.5]}},
        "scheduler": {"name": "asha", "reduction": 2, "grace": 0.25},
        "objective": {"metric": "val/pixel_accuracy", "mode": "max"},
        "budget": {"trials": 2},
        "max_concurrent": 1,
    }
    here = write(tmp_path / "here.yaml", job)
    settings["cluster"] = {"workers": 1}  # reports by Ray Train's callback; the same numbers
    file = write(tmp_path / "job.yaml", job)
    environment["ATROUS_STORAGE"] = str(tmp_path / "whole")
    done = atrous("run", here)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = log_of(tmp_path / "whole")
    assert [entry["kind"] for entry in whole].count("end") == 2

    environment["ATROUS_STORAGE"] = str(tmp_path / "killed")
    for entries in (len(whole) // 3, 2 * len(whole) // 3):
        kill_at(entries, file, environment, tmp_path / "killed")
    done = atrous("run", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert log_of(tmp_path / "killed") == whole


def log_of(storage: Path) -> list[dict[str, Any]]:
    return [entry for path in (storage / "sweeps").glob("*") for entry in decisions.read(path)]


def kill_at(entries: int, file: Path, environment: dict[str, str], storage: Path) -> None:
    """Kill the command and all that it started once its log has so many entries."""
    command = [sys.executable, "-m", "orchestrator", "run", str(file)]
    driver = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while len(log_of(storage)) < entries:
        assert driver.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
