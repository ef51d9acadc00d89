"""Run directories: `<storage>/runs/<stage>-<fingerprint>`, the truth about every run.

run.json        status, resolved job, start, data, result     (written whole at each change)
journal.jsonl   one line of metrics per logged step
events.jsonl    what befell the run, for people and the bill; never shortened
checkpoints/    see `orchestrator.runs.checkpoint`
artifacts/      pictures and tables of its evaluations, one folder for each kind
tracking.json   what of the journal MLflow has; see `orchestrator.runs.tracking`
owner.json      the process that drives the run; see `orchestrator.runs.lease`
"""

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.bucket import BucketPath
from orchestrator.files import read_json, sync, write_json
from orchestrator.runs import lease


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

    @property
    def artifacts(self) -> Path:
        """Directory of folders with pictures and tables, for people."""
        return self.path / "artifacts"

    @property
    def events_file(self) -> Path:
        """File of the run's events."""
        return self.path / "events.jsonl"

    def read(self) -> dict[str, Any]:
        """The record; empty before the first `update`."""
        return read_json(self.path / "run.json") or {}

    def update(self, **fields: Any) -> None:
        """Change fields of the record. Only the driver that owns the run does this.

        Raises:
            RunTakenOver: it no longer is the owner.
            OSError: it cannot be written.
        """
        lease.check(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "run.json", self.read() | fields | {"updated": time.time()})

    def note(self, kind: str, text: str = "", **fields: Any) -> None:
        """Add an event: `text` for people, if any, and fields for the bill.

        Raises:
            RunTakenOver: this process was the owner, and no longer is.
            OSError: it cannot be written.
        """
        lease.check(self.path)
        append_journal(self.events_file, event(kind, text, **fields))

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
        name = f"{self.path.name}.{time.time_ns()}"
        with self.lock():
            if isinstance(self.path, BucketPath):
                _move(self.path, self.path.with_name(name))
            else:
                os.rename(self.path, self.path.with_name(name))

    def is_driven(self) -> bool:
        """Whether a process owns the run; takes seconds where that is on another machine."""
        return lease.is_held(self.path)

    @contextmanager
    def lock(self, attach: Callable[[str], None] | None = None) -> Iterator[None]:
        """Own the run; `attach`: where another does, tell of it, and wait until it no longer does.

        Raises:
            RunError: another process drives this run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with lease.hold(self.path, attach):
            yield


def event(kind: str, text: str = "", **fields: Any) -> dict[str, Any]:
    """What `Run.note` writes."""
    return {"kind": kind, "time": time.time(), "text": text} | fields


def _move(source: BucketPath, target: BucketPath) -> None:
    """Move a run: whatever comes in between, it is whole at one of the places, and done at one."""
    marks = ("manifest.json", "run.json")
    paths = [path for path, _ in source.below() if path != lease.file_of(source)]
    rest = [path for path in paths if path.name not in marks]
    last = sorted(set(paths) - set(rest), key=lambda path: marks.index(path.name))
    for path in (*rest, *last):
        path.copy_to(target / path.relative_to(source))
    for path in (*last, *rest):
        path.unlink()


class EventReader:
    """Reads a run's events as they come; a line that a power cut left in pieces is passed over."""

    def __init__(self, run: Run) -> None:
        self._path = run.events_file
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        """Those since the last time."""
        try:
            text = self._path.read_bytes()[self._offset :]
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        events = []
        for line in whole.splitlines():
            with suppress(ValueError):
                events.append(json.loads(line))
        return events


def run_directory(storage: Path, stage: str, fingerprint: str) -> Run:
    """The run of a stage with this fingerprint: the same job finds its own earlier work."""
    return Run(storage / "runs" / f"{stage}-{fingerprint[:12]}")


def all_runs(storage: Path, kind: str = "runs") -> list[Run]:
    """Every run (or of "pipelines") under `storage`, newest first."""
    paths = list((storage / kind).glob("*"))
    with ThreadPoolExecutor(16) as threads:  # in a bucket each takes a round trip
        records = list(threads.map(_record, paths))
    found = [(record, path) for record, path in zip(records, paths, strict=True) if record]
    found.sort(key=lambda pair: pair[0].get("created", 0), reverse=True)
    return [Run(path) for _, path in found]


def _record(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path / "run.json")
    except NotADirectoryError:
        return None


def append_journal(path: Path, record: dict[str, Any]) -> None:
    """Add one line, or nothing of it where the disk is full; in a bucket for what comes rarely.

    Raises:
        OSError: it cannot be written.
    """
    line = as_line(record)
    if isinstance(path, BucketPath):
        path.append([line])
        return
    with path.open("a+b", buffering=0) as file:
        end = file.tell()
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
            line = b"\n" + line  # a power cut left a piece of a line
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(end)
            raise


def as_line(record: dict[str, Any]) -> bytes:
    """A record as it is written."""
    return json.dumps(record).encode() + b"\n"


def truncate_journal(path: Path, step: int) -> None:
    """Drop the records after `step`: the run goes on from there and writes them again."""
    kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
    text = "".join(f"{line}\n" for line in kept)
    if isinstance(path, BucketPath):
        path.write_text(text)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
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
