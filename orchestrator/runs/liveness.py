"""Whether workers get on: heartbeats, stacks of those that hang, and their end.

workers/rank-NNNN.json           heartbeat: the last finished step, what the worker does, since when
stacks/attempt-N-rank-NNNN.txt   stacks of all threads of a worker that hung
"""

import faulthandler
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

from orchestrator.bucket import hasty
from orchestrator.files import append_text, read_json, write_json
from orchestrator.runs.run import Run
from orchestrator.runs.stop import Wish, asked_to_stop

T = TypeVar("T")
Beat = dict[str, Any]

_TICK = 1.0  # seconds between looks
_STOOD_STILL = (
    5.0  # seconds that a tick takes when the whole process was stopped (Ctrl-Z) and goes on
)
_RECENT = 10.0  # seconds since a checkpoint that a notice need not repeat
START = 3.0  # times as patient until the first step: reading, building, compiling
EXIT_HUNG = 70

log = logging.getLogger(__name__)


def beat_every(hang_after: float) -> float:
    """Seconds between heartbeats: few for a file system that hundreds of workers share."""
    return min(max(_TICK, hang_after / 40), 15.0)


class Liveness:
    """Tells others that this worker gets on; asks to stop for it; ends it when it hangs.

    It hangs when `hang_after` seconds pass without a mark (`alive`) of its own or of the first
    worker, which may be busy alone (a checkpoint) while the others wait for it. It then writes
    stacks, waits for the other workers to do the same, and ends the process: Ray Train starts the
    workers again from the last checkpoint.

    Args:
        notice: what this worker wishes because it will be taken away; None where it is the
            command's own process, which nobody starts again.
    """

    def __init__(
        self, run: Run, rank: int, world: int, hang_after: float, notice: Callable[[], Wish] | None
    ) -> None:
        self._run = Run(hasty(run.path))  # a storage that is away must not stop the watch
        self._rank, self._world = rank, world
        self._hang_after = hang_after
        self._notice = notice
        self._attempt = run.read().get("attempts", 0)
        self._marks, self._step, self._doing = 0, 0, "starting"
        self._patience = START * hang_after
        self._moved_at = time.monotonic()
        self._first_marks = -1
        self._away = False
        self._wish = Wish.NONE
        self._noticed_at: float | None = None
        self._saved_at = -math.inf
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)

    def __enter__(self) -> "Liveness":
        for name in ("workers", "stacks"):
            (self._run.path / name).mkdir(parents=True, exist_ok=True)
        self._beat()
        self._wish = self._look_for_wish()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def alive(self, doing: str, step: int | None = None) -> None:
        """A mark of progress: what comes next, and the number of steps done where it grew."""
        self._doing = doing
        self._marks += 1
        self._moved_at = time.monotonic()
        if step is not None:
            self._patience = self._hang_after
            self._step = step

    def watched(self, items: Iterable[T], waiting: str) -> Iterator[T]:
        """The items, with a mark before and after each."""
        iterator = iter(items)
        while True:
            self.alive(waiting)
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.alive("computes")
            yield item

    def wish(self) -> Wish:
        """What this worker wishes that all do; costs nothing."""
        return self._wish

    def saved(self) -> None:
        """A checkpoint was written."""
        self._saved_at = time.monotonic()
        if self._wish is Wish.SAVE:
            self._wish = Wish.NONE

    def builds(self) -> None:
        """A start, or one anew after a rollback: patience until the first step."""
        self._patience = START * self._hang_after
        self.alive("builds its parts")

    def started(self, step: int) -> None:
        """All parts are built, training goes on from a step."""
        self._step = step
        if self._rank == 0:
            how = f"step {step}, number of workers: {self._world}"
            self._run.note("start", f"starts at {how}", step=step, world=self._world)

    def _watch(self) -> None:
        every, beaten = beat_every(self._hang_after), time.monotonic()
        while (slept := self._sleep()) is not None:
            self._moved_at += slept if slept > _STOOD_STILL else 0
            if self._notice is not None:
                # Where this thread itself stands still, because something keeps the interpreter.
                faulthandler.dump_traceback_later(self._patience + 60, exit=True, file=2)
            try:
                self._wish = self._look_for_wish()
                if time.monotonic() - beaten >= every:
                    beaten = time.monotonic()
                    self._beat()
                    self._away = False
                    if self._rank > 0:
                        self._look_at_first()
            except OSError as error:  # a storage that is away for a while
                self._tell(error)
            silence = time.monotonic() - self._moved_at
            if silence > self._patience:
                self._end(silence)

    def _tell(self, error: OSError) -> None:
        """Once while a storage is away, or its disk full: every beat would fill the screen."""
        if not self._away:
            log.warning("heartbeats wait: %s", error)
        self._away = True

    def _sleep(self) -> float | None:
        """Seconds that it took; None when the watch is over."""
        began = time.monotonic()
        return None if self._ended.wait(_TICK) else time.monotonic() - began

    def _look_for_wish(self) -> Wish:
        if self._wish is Wish.STOP or asked_to_stop(self._run):
            return Wish.STOP
        wish = self._notice() if self._notice else Wish.NONE
        if wish is not Wish.SAVE:
            return wish
        self._noticed_at = self._noticed_at or time.monotonic()
        return Wish.NONE if self._saved_at > self._noticed_at - _RECENT else Wish.SAVE

    def _beat(self, *, hung: bool = False) -> None:
        beat = {
            "rank": self._rank,
            "world": self._world,
            "attempt": self._attempt,
            "node": os.uname().nodename,
            "pid": os.getpid(),
            "step": self._step,
            "doing": self._doing,
            "marks": self._marks,
            "time": time.time(),
            "hung": hung,
        }
        write_json(_beat_file(self._run, self._rank), beat)

    def _look_at_first(self) -> None:
        beat = read_json(_beat_file(self._run, 0)) or {}
        marks = beat.get("marks", -1)
        if marks != self._first_marks and not beat.get("hung"):
            self._first_marks = marks
            self._moved_at = time.monotonic()

    def _end(self, silence: float) -> None:
        """Write down where this worker stands, wait for the others' word, report, and end."""
        try:
            self._dump(silence)
            self._beat(hung=True)
            beats = self._wait_for_others()
            if min(beat["rank"] for beat in beats if beat["hung"]) == self._rank:
                text = f"no progress for {silence:.0f} s: {who_is_behind(beats, self._world)}"
                text += f"; stacks: {self._run.path / 'stacks'}"
                fields = {"attempt": self._attempt, "step": self._step, "silence": silence}
                self._run.note("hang", text, **fields)
                if self._notice is None:
                    print(f"error: {text}", file=sys.__stderr__, flush=True)
        finally:
            os._exit(EXIT_HUNG)

    def _dump(self, silence: float) -> None:
        name = f"attempt-{self._attempt}-rank-{self._rank:04d}.txt"
        with TemporaryFile("w+", encoding="utf-8") as file:
            file.write(
                f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self._rank} of {self._world} on "
                f"{os.uname().nodename}, process {os.getpid()}: step {self._step} done, "
                f"{self._doing}, no progress for {silence:.0f} s\n"
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            append_text(self._run.path / "stacks" / name, f"{file.read()}\n")

    def _wait_for_others(self) -> list[Beat]:
        deadline = time.monotonic() + 2 * beat_every(self._hang_after) + 2
        while True:
            beats = [beat for beat in read_beats(self._run) if beat["world"] == self._world]
            hung = sum(beat["hung"] for beat in beats)
            if hung >= self._world or time.monotonic() > deadline:
                return beats
            time.sleep(_TICK / 2)


def who_is_behind(beats: Sequence[Beat], world: int) -> str:
    """The workers that no longer answer, or else where each stands, the last step first."""
    silent = [beat for beat in beats if not beat["hung"]]
    missing = sorted(set(range(world)) - {beat["rank"] for beat in beats})
    if silent or missing:
        parts = [f"{_place(beat)} and does not answer" for beat in silent]
        parts += [f"rank {rank} never spoke" for rank in missing]
    else:
        parts = [_place(beat) for beat in sorted(beats, key=lambda beat: beat["step"])]
    more = f"; and {len(parts) - 8} more" if len(parts) > 8 else ""
    return "; ".join(parts[:8]) + more


def _place(beat: Beat) -> str:
    return (
        f"rank {beat['rank']} on {beat['node']} last finished step {beat['step']} ({beat['doing']})"
    )


def _beat_file(run: Run, rank: int) -> Path:
    return run.path / "workers" / f"rank-{rank:04d}.json"


def read_beats(run: Run) -> list[Beat]:
    """The last heartbeat of each worker."""
    found = [read_json(path) for path in sorted((run.path / "workers").glob("rank-*.json"))]
    return [beat for beat in found if beat is not None]


def last_beat(run: Run) -> Any | None:
    """Changes as long as the first worker lives; None where none has started in this attempt."""
    beat = read_json(_beat_file(run, 0))
    return (beat["pid"], beat["time"]) if beat else None


def forget_workers(run: Run) -> None:
    """Remove the heartbeats of an earlier attempt."""
    for path in (run.path / "workers").glob("rank-*.json"):
        path.unlink()
