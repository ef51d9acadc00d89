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

from orchestrator.bucket import BucketPath
from orchestrator.errors import RunTakenOver
from orchestrator.files import read_json, sync, write_json
from orchestrator.job.sections import Checkpoints
from orchestrator.runs.checkpoint import delete_unfinished
from orchestrator.runs.checkpoint_writer import CheckpointWriter, Contents
from orchestrator.runs.record import Metrics
from orchestrator.runs.run import Run, append_journal, as_line, event, truncate_journal

log = logging.getLogger(__name__)

_WRITER = "writer.json"
# In a bucket lines are written together, after so long, and the longer the larger the file is.
_SECONDS, _BYTES_PER_SECOND = 2.0, 256 << 10


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


class Lines:
    """A growing file of lines; what a full disk does not take is written with the next ones.

    In a bucket, where nothing can be appended to an object, a thread writes it again as a whole, so
    that training does not wait for it. Segments would save traffic, but this file is the same there
    and on a disk: a prefix that is copied goes on anywhere, and readers need no listing.
    """

    def __init__(self, path: Path, check: Callable[[], None]) -> None:
        self._path = path
        self._check = check
        self._unwritten: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._taken_over: RunTakenOver | None = None

    def append(self, record: dict[str, Any]) -> None:
        """Add a line; an OSError is told, not raised."""
        if self._taken_over:
            raise self._taken_over
        self._unwritten.append(record)
        if not isinstance(self._path, BucketPath):
            self._try_to_write()
        elif self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._path.name, daemon=True)
            self._thread.start()

    def sync(self) -> None:
        """Force all lines to disk: a checkpoint comes to be after the metrics of its steps.

        Raises:
            OSError: they cannot be written.
        """
        self._write()
        sync(self._path)

    def close(self) -> None:
        """Write what is left."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        size = 0
        try:
            while not self._closed.wait(_SECONDS + size / _BYTES_PER_SECOND):
                size = self._try_to_write() if self._unwritten else size
            self._try_to_write()
        except RunTakenOver as error:
            self._taken_over = error

    def _try_to_write(self) -> int:
        try:
            return self._write()
        except OSError as error:
            log.warning("%s: kept for later, not written: %s", self._path, error)
            return 0

    def _write(self) -> int:
        """The size of an object in a bucket."""
        with self._lock:
            self._check()
            if isinstance(self._path, BucketPath):
                written = len(self._unwritten)
                size = self._path.append([as_line(one) for one in self._unwritten[:written]])
                del self._unwritten[:written]
                return size
            while self._unwritten:
                append_journal(self._path, self._unwritten[0])
                del self._unwritten[0]
            return 0


class RunWriter:
    """The one writer of a run's journal and checkpoints."""

    def __init__(self, run: Run, attempt: int, settings: Checkpoints) -> None:
        """Take the run over; raises as `Fence`."""
        self._run = run
        self._fence = Fence(run, attempt)
        delete_unfinished(run.checkpoints)
        self._journal = Lines(run.journal, self._fence.check)
        self._events = Lines(run.events_file, self._fence.check)
        self._checkpoints = CheckpointWriter(
            run.checkpoints, settings, self._journal.sync, self._tell
        )

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until nothing is being written any more."""
        self._checkpoints.close()
        self._journal.close()
        self._events.close()

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
        self._events.append(event(kind, text, **fields))

    def _tell(self, text: str) -> None:
        log.warning("%s", text)
        self.note("storage", text)
