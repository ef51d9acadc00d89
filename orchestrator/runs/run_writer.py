"""What the first worker writes into its run directory: journal and checkpoints, behind a fence.

writer.json   who may write: {"attempt", "token", "node", "pid"}; whoever comes later takes over
"""

import errno
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.errors import RunTakenOver
from orchestrator.files import read_json, sync, write_json
from orchestrator.job.sections import Checkpoints
from orchestrator.runs.checkpoint import delete_unfinished
from orchestrator.runs.checkpoint_writer import CheckpointWriter, Contents
from orchestrator.runs.record import Metrics
from orchestrator.runs.run import Run, append_journal, truncate_journal

log = logging.getLogger(__name__)

_WRITER = "writer.json"


class Fence:
    """Keeps workers out of the run directory once others have begun to go on with the run.

    A killed command may leave workers behind, and so may Ray on a node it has lost sight of.
    """

    def __init__(self, run: Run, attempt: int) -> None:
        """Take the run over.

        Raises:
            RunTakenOver: a newer attempt did already.
        """
        self._run, self._attempt, self._token = run, attempt, uuid.uuid4().hex
        self._check_attempt()
        owner = {"attempt": attempt, "token": self._token}
        place = {"node": os.uname().nodename, "pid": os.getpid()}
        write_json(run.path / _WRITER, owner | place)

    def check(self) -> None:
        """Called right before each change of the run directory.

        Raises:
            RunTakenOver: another attempt, or another worker of this one, writes there now.
            OSError: the run directory cannot be read, or is not there.
        """
        self._check_attempt()
        owner = _read(self._run.path / _WRITER)
        if owner["token"] != self._token:
            raise RunTakenOver(
                f"{self._run.path.name}: process {owner['pid']} on {owner['node']} goes on "
                "with this run; this worker was given up and ends"
            )

    def _check_attempt(self) -> None:
        newest = _read(self._run.path / "run.json")["attempts"]
        if newest != self._attempt:
            raise RunTakenOver(
                f"{self._run.path.name}: attempt {newest} goes on with this run; this worker is of "
                f"attempt {self._attempt} and ends"
            )


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if content is None:  # such as a storage that is not mounted
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return content


class Journal:
    """A run's metrics; what a full disk does not take is kept and written with the next ones."""

    def __init__(self, path: Path, check: Callable[[], None]) -> None:
        self._path = path
        self._check = check
        self._unwritten: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def append(self, record: dict[str, Any]) -> None:
        """Add a line; an OSError is told, not raised."""
        self._unwritten.append(record)
        try:
            self._write()
        except OSError as error:
            log.warning("%s: kept for later, not written: %s", self._path, error)

    def sync(self) -> None:
        """Force all lines to disk: a checkpoint comes to be after the metrics of its steps.

        Raises:
            OSError: they cannot be written.
        """
        self._write()
        sync(self._path)

    def _write(self) -> None:
        with self._lock:
            self._check()
            while self._unwritten:
                append_journal(self._path, self._unwritten[0])
                del self._unwritten[0]


class RunWriter:
    """The one writer of a run's journal and checkpoints."""

    def __init__(self, run: Run, attempt: int, settings: Checkpoints) -> None:
        """Take the run over; raises as `Fence`."""
        self._run = run
        self._fence = Fence(run, attempt)
        delete_unfinished(run.checkpoints)
        self._journal = Journal(run.journal, self._fence.check)
        self._checkpoints = CheckpointWriter(
            run.checkpoints, settings, self._journal.sync, self._tell
        )

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until nothing is being written any more."""
        self._checkpoints.close()

    def check(self) -> None:
        """Called before others change the run directory; raises as `Fence.check`."""
        self._fence.check()

    def go_on_from(self, step: int) -> None:
        """Drop the journal's lines after `step`."""
        self._fence.check()
        truncate_journal(self._run.journal, step)

    def log(self, step: int, metrics: Metrics) -> None:
        """Add metrics to the journal, and the time that checkpoints have cost since the last."""
        metrics = metrics | self._checkpoints.read_stall()
        self._journal.append({"step": step, "time": time.time(), "metrics": metrics})

    def save(self, contents: Contents) -> None:
        """Have a checkpoint written; raises as `CheckpointWriter.save`."""
        self._checkpoints.save(contents)

    def finish(self, alive: Callable[[str], None]) -> None:
        """Return when the last checkpoint is complete; raises as `CheckpointWriter.finish`."""
        self._checkpoints.finish(alive)

    def note(self, kind: str, text: str = "", **fields: Any) -> None:
        """Add an event; an OSError is told, not raised."""
        try:
            self._fence.check()
            self._run.note(kind, text, **fields)
        except OSError as error:
            log.warning("%s: %s", self._run.path, error)

    def _tell(self, text: str) -> None:
        log.warning("%s", text)
        self.note("storage", text)
