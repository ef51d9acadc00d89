"""Only what nobody needs is found, and nothing goes before it is asked for."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli.main import app
from orchestrator.runs.garbage import find_garbage
from orchestrator.runs.run import Run, run_directory


def make(storage: Path, fingerprint: str, status: str, *steps: int, **fields: Any) -> Run:
    run = run_directory(storage, "tiny", fingerprint)
    job = {"task": "segmentation", "checkpoint": {"keep_best": 0}}
    last = f"checkpoints/step-{max(steps):08d}" if status == "finished" else None
    values = {"stage": "tiny", "status": status, "steps": 9, "job": job, "checkpoint": last}
    run.update(fingerprint=fingerprint, **(values | fields))
    for step in steps:
        path = run.checkpoints / f"step-{step:08d}"
        path.mkdir(parents=True)
        (path / "manifest.json").write_text("{}")
    return run


def names(storage: Path, older_than: float = 30) -> set[str]:
    return {one.path.name for one in find_garbage(storage, older_than)}


def test_the_last_and_what_others_started_from_stay(tmp_path: Path) -> None:
    make(tmp_path, "a" * 12, "finished", 2, 4, 6)
    start = {"fingerprint": "a" * 12, "step": 4}
    make(tmp_path, "b" * 12, "finished", 9, start=start)
    assert names(tmp_path) == {"step-00000002"}


def test_best_checkpoints_stay_where_the_job_keeps_them(tmp_path: Path) -> None:
    job = {"task": "segmentation", "checkpoint": {"keep_best": 1}}
    make(tmp_path, "a" * 12, "finished", 2, 4, job=job)
    assert names(tmp_path) == set()


def test_unfinished_runs_go_when_they_are_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path, "a" * 12, "failed", 2)
    assert names(tmp_path) == set()
    later = time.time() + 31 * 86400
    monkeypatch.setattr(time, "time", lambda: later)
    assert names(tmp_path) == {run.path.name}
    with run.lock():
        run.update(status="running", updated=0)
        assert names(tmp_path) == set()


def test_leftovers_of_killed_writers(tmp_path: Path) -> None:
    run = make(tmp_path, "a" * 12, "stopped", 2)
    os.mkdir(run.checkpoints / ".step-00000004.1.tmp")
    assert names(tmp_path) == {".step-00000004.1.tmp"}


def test_nothing_goes_before_it_is_asked_for(tmp_path: Path) -> None:
    run = make(tmp_path, "a" * 12, "finished", 2, 4)
    arguments = ["gc", "--storage", str(tmp_path)]
    assert "1 to delete" in CliRunner().invoke(app, arguments).output
    assert (run.checkpoints / "step-00000002").exists()
    assert "1 deleted" in CliRunner().invoke(app, [*arguments, "--delete"]).output
    assert not (run.checkpoints / "step-00000002").exists()
    assert (run.checkpoints / "step-00000004/manifest.json").exists()
