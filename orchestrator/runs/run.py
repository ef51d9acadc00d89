"""Run directories: `<storage>/runs/<stage>-<fingerprint>`, the truth about every run.

run.json        status, resolved job, start, data, result     (written whole at each change)
journal.jsonl   one line of metrics per logged step
events.jsonl    what befell the run, for people and the bill; never shortened
checkpoints/    see `orchestrator.runs.checkpoint`
tracking.json   what of the journal MLflow has; see `orchestrator.runs.tracking`
lock            held by the process that drives the run
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from orchestrator.errors import RunError
from orchestrator.files import read_json, sync, write_json

_EVENTS = "events.jsonl"


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

    def note(self, kind: str, text: str = "", **fields: Any) -> None:
        """Add an event: `text` for people, if any, and fields for the bill.

        Raises:
            OSError: it cannot be written.
        """
        event = {"kind": kind, "time": time.time(), "text": text} | fields
        append_journal(self.path / _EVENTS, event)

    def events(self) -> list[dict[str, Any]]:
        """All events, in order."""
        return EventReader(self).new()

    @property
    def finished(self) -> bool:
        """Whether the run reached its end."""
        return self.read().get("status") == "finished"

    def set_aside(self) -> None:
        """Give the run another name, so that it is done again; the caller has seen it finished.

        Raises:
            RunError: another process drives it.
        """
        with self.lock():
            os.rename(self.path, self.path.with_name(f"{self.path.name}.{time.time_ns()}"))

    def is_driven(self) -> bool:
        """Whether a process owns the run at this moment."""
        try:
            with (self.path / "lock").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Own the run; the kernel gives it up with the process, however that dies.

        Raises:
            RunError: another process drives this run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("a+") as file:
            if not _acquire(file):
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise RunError(
                    f"{self.path.name} is being trained by {owner}; wait for it or stop it"
                )
            file.truncate(0)
            file.write(f"{_this_process()}\n")
            file.flush()
            yield


def _this_process() -> str:
    """Who and where this is, for people."""
    metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    job = metadata.get("job_submission_id")
    process = f"process {os.getpid()} on {os.uname().nodename}"
    return f"Ray job {job} ({process})" if job else process


class EventReader:
    """Reads a run's events as they come; a line that a power cut left in pieces is passed over."""

    def __init__(self, run: Run) -> None:
        self._path = run.path / _EVENTS
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        """Those since the last time."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        events = []
        for line in whole.splitlines():
            with suppress(ValueError):
                events.append(json.loads(line))
        return events


def _acquire(file: IO[str]) -> bool:
    """Lock a file, unless another process does; one that looks at the lock is soon gone."""
    for _ in range(5):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    return False


def run_directory(storage: Path, stage: str, fingerprint: str) -> Run:
    """The run of a stage with this fingerprint: the same job finds its own earlier work."""
    return Run(storage / "runs" / f"{stage}-{fingerprint[:12]}")


def all_runs(storage: Path) -> list[Run]:
    """Every run under `storage`, newest first."""
    runs = [Run(path.parent) for path in (storage / "runs").glob("*/run.json")]
    return sorted(runs, key=lambda run: run.read().get("created", 0), reverse=True)


def append_journal(path: Path, record: dict[str, Any]) -> None:
    """Add one line, or nothing of it where the disk is full.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("a+b", buffering=0) as file:
        line, end = json.dumps(record).encode() + b"\n", file.tell()
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
            line = b"\n" + line  # a power cut left a piece of a line
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(end)
            raise


def truncate_journal(path: Path, step: int) -> None:
    """Drop the records after `step`: the run goes on from there and writes them again."""
    kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


def read_journal(path: Path, after: int = 0) -> list[dict[str, Any]]:
    """The records of steps after `after`, in order."""
    return [record for record in read_lines(path) if record["step"] > after]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines."""
    return [json.loads(line) for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    """Whole lines; a last one without its newline was cut by a kill and is written again."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [line for line in text[: text.rfind("\n") + 1].splitlines() if line]
