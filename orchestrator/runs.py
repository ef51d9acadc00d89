"""Run directories: `<storage>/runs/<stage>-<fingerprint>`, the truth about every run.

run.json        status, resolved job, start, data, result     (written whole at each change)
journal.jsonl   one line of metrics per logged step
checkpoints/    see `orchestrator.checkpoint`
tracking.json   what of the journal MLflow has; see `orchestrator.tracking`
lock            held by the process that drives the run
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import RunError
from orchestrator.files import read_json, write_json


@dataclass(frozen=True)
class Run:
    """One run directory."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Directory of the run's checkpoints."""
        return self.path / "checkpoints"

    @property
    def journal(self) -> Path:
        """File of the run's metrics."""
        return self.path / "journal.jsonl"

    @property
    def tracking(self) -> Path:
        """File of what the tracking server has of this run."""
        return self.path / "tracking.json"

    def read(self) -> dict[str, Any]:
        """The record; empty before the first `update`."""
        return read_json(self.path / "run.json") or {}

    def update(self, **fields: Any) -> None:
        """Change fields of the record. Only the driver that holds the lock does this."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "run.json", self.read() | fields | {"updated": time.time()})

    @property
    def finished(self) -> bool:
        """Whether the run reached its end."""
        return self.read().get("status") == "finished"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Own the run; the kernel gives it up with the process, however that dies.

        Raises:
            RunError: another process drives this run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise RunError(
                    f"{self.path.name} is being trained by {owner}; wait for it or stop it"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            file.flush()
            yield


def run_directory(storage: Path, stage: str, fingerprint: str) -> Run:
    """The run of a stage with this fingerprint: the same job finds its own earlier work."""
    return Run(storage / "runs" / f"{stage}-{fingerprint[:12]}")


def all_runs(storage: Path) -> list[Run]:
    """Every run under `storage`, newest first."""
    runs = [Run(path.parent) for path in (storage / "runs").glob("*/run.json")]
    return sorted(runs, key=lambda run: run.read().get("created", 0), reverse=True)


def append_journal(path: Path, record: dict[str, Any]) -> None:
    """Add one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def truncate_journal(path: Path, step: int) -> None:
    """Drop the records after `step`: the run goes on from there and writes them again."""
    kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def read_journal(path: Path, after: int = 0) -> list[dict[str, Any]]:
    """The records of steps after `after`, in order."""
    records = [json.loads(line) for line in _lines(path)]
    return [record for record in records if record["step"] > after]


def _lines(path: Path) -> list[str]:
    """Whole lines; a last one without its newline was cut by a kill and is written again."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [line for line in text[: text.rfind("\n") + 1].splitlines() if line]
