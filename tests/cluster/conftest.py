"""Commands run as a user runs them, in processes of their own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.runs import Run, read_journal


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a command: runs land in the test's directory."""
    return os.environ | {"ATROUS_STORAGE": str(tmp_path / "storage"), "PYTHONUNBUFFERED": "1"}


Atrous = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def atrous(environment: dict[str, str]) -> Atrous:
    """Run `atrous ARGUMENTS` to its end."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "orchestrator", *map(str, arguments)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=500, check=False
        )

    return run


def only_run(storage: Path) -> Run | None:
    """The one run under a storage."""
    found = list((storage / "runs").glob("*/run.json"))
    return Run(found[0].parent) if found else None


def wait_for_step(storage: Path, step: int, seconds: float = 240) -> Run:
    """Wait until the journal of the only run reaches a step."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        run = only_run(storage)
        if run and any(record["step"] >= step for record in read_journal(run.journal)):
            return run
        time.sleep(0.1)
    raise TimeoutError(f"no step {step} under {storage} after {seconds} s")


def descendants(pid: int) -> list[tuple[int, str]]:
    """Process id and command of all processes below one."""
    listing = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 2) for line in listing.stdout.splitlines()]
    found, parents = [], {pid}
    while new := [row for row in rows if int(row[1]) in parents and row not in found]:
        found += new
        parents = {int(row[0]) for row in new}
    return [(int(row[0]), row[2]) for row in found]


def series(run: Run) -> list[tuple[int, str]]:
    """The journal without timings."""
    return [
        (
            record["step"],
            json.dumps(
                {
                    k: v
                    for k, v in record["metrics"].items()
                    if "second" not in k and "wait" not in k
                }
            ),
        )
        for record in read_journal(run.journal)
    ]
