"""The wish to stop: from a signal to the driver, by a file of the run, to every worker."""

import os
import signal
from enum import IntEnum
from types import FrameType

from orchestrator.files import read_json, write_json
from orchestrator.runs.run import Run

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_FILE = "stop.json"
_STDERR = 2


class Wish(IntEnum):
    """What a worker wishes that all workers do."""

    NONE = 0
    SAVE = 1  # a checkpoint, and go on
    STOP = 2  # a checkpoint, and stop


class Interrupted(KeyboardInterrupt):
    """The command ends because of a signal; the same command goes on from the last checkpoint."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


class Signals:
    """SIGTERM and SIGINT (Ctrl-C): the first is a wish, the second ends the process at once.

    Where nobody is there to obey a wish (`patient` is False), the first one raises Interrupted.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.patient = False

    def listen(self) -> None:
        """Take over the signals."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            os.write(_STDERR, b"ended at once; the last checkpoint stays\n")
            os._exit(128 + number)
        self.received = signal.Signals(number)
        if not self.patient:
            raise Interrupted(self.received)


def let_run(run: Run) -> None:
    """Forget an earlier wish: an attempt begins."""
    write_json(run.path / _FILE, {"stop": None})


def ask_to_stop(run: Run, why: str) -> None:
    """Ask a run's workers to write a checkpoint and to stop."""
    write_json(run.path / _FILE, {"stop": why})


def asked_to_stop(run: Run) -> str | None:
    """Why a run is to stop, if it is.

    The file always exists: NFS answers from its cache that a new name is not there, but looks anew
    at the server when an old one is opened.
    """
    return (read_json(run.path / _FILE) or {}).get("stop")
