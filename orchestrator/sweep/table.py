"""What a person sees of a sweep: its trials while they run, and the best of them at the end."""

import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.table import Table

from orchestrator.bucket import storage_path
from orchestrator.job.duration import as_time
from orchestrator.job.sweep import SweepJob
from orchestrator.runs.run import Run, read_journal
from orchestrator.sweep.results import (
    ENDED,
    Trial,
    as_scores,
    as_values,
    brief,
    front,
    ranked,
)

_STYLE = {"running": "bold", "nan": "red", "failed": "red", "invalid": "yellow", "stopped": "dim"}
_AROUND = 8  # lines of a terminal that are not trials
_WHY = 100  # characters of a reason in the table; `atrous sweep show --json` has all


@dataclass(kw_only=True)
class _Progress:
    """How far a trial came under this command."""

    first: int
    step: int
    steps: int


class SweepDisplay:
    """A table of the trials on a terminal, a line for each event elsewhere (a Ray job's log)."""

    def __init__(self, console: Console, job: SweepJob, num_trials: int | None) -> None:
        self._console = console
        self._job = job
        self._storage = storage_path(job.storage)
        self._num_trials = num_trials  # None: as many as the budget's hours or money allow
        self._trials: dict[int, Trial] = {}
        self._progress: dict[int, _Progress] = {}
        self._began = time.monotonic()
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> "SweepDisplay":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str, style: str = "") -> None:
        """One line above the table."""
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def take(self, entry: Mapping[str, Any], *, told: bool = False) -> None:
        """A decision was recorded; `told`: by an earlier command, to whom it was shown."""
        if "trial" not in entry:
            if not told:
                self.say(entry["why"], "yellow")
            return
        number = entry["trial"]
        trial = self._trials.setdefault(number, Trial(number=number))
        trial.take(entry)
        line = self._line(trial, entry)
        if line and not told:
            style = _STYLE.get(trial.state, "") if entry["kind"] == "end" else ""
            self.say(f"trial {number}: {line}", style)

    def _line(self, trial: Trial, entry: Mapping[str, Any]) -> str:
        """What an event is told as; empty where it is not."""
        kind, scores = entry["kind"], as_scores(trial, self._job.objectives)
        if kind == "end":
            told = f"{trial.state} at step {trial.step}" if trial.step else trial.state
            return ": ".join(filter(None, (told, scores, trial.why))) + f" ({self._so_far()})"
        if self._console.is_terminal:
            return ""  # the table shows it
        if kind == "start":
            return f"{as_values(trial.values)}, run {entry['run']}"
        if kind == "result":
            return f"step {entry['step']}: {scores}"
        if kind == "decide" and entry["action"] == "exploit":
            return f"goes on from trial {entry['from']} with {as_values(trial.values)}"
        return ""

    def update(self) -> None:
        """Look at the running trials; draw the table anew."""
        for trial in self._trials.values():
            if trial.state == "running" and trial.run:
                self._look_at(trial, Run(self._storage / trial.run))
        if self._console.is_terminal:
            self._live.update(self._table(), refresh=True)

    def _look_at(self, trial: Trial, run: Run) -> None:
        journal = read_journal(run.journal)
        step = journal[-1]["step"] if journal else 0
        known = self._progress.get(trial.number)
        first = min(known.first, step) if known else step
        self._progress[trial.number] = _Progress(first=first, step=step, steps=trial.steps)

    def _table(self) -> Table:
        trials = ranked(self._trials.values(), self._job.objectives)
        shown = [t for t in trials if t.state == "running"]
        shown += [t for t in trials if t.state != "running"]
        table = trials_table(
            shown[: max(1, self._console.height - _AROUND)], self._job, self._progress
        )
        table.title = f"sweep {self._job.name}: {self._so_far()}"
        return table

    def _so_far(self) -> str:
        of = f" of {self._num_trials}" if self._num_trials else ""
        left = self._seconds_left()
        time_left = "" if left is None else f", at most {as_time(left)} left"
        return f"{self._num_ended}{of} trials ended{time_left}"

    @property
    def _num_ended(self) -> int:
        """Without those whose values were refused: the budget does not count them either."""
        return sum(t.state in ENDED and t.state != "invalid" for t in self._trials.values())

    def _seconds_left(self) -> float | None:
        """Until all trials are at their last step, at the pace of this command; None: unknown.

        Trials that a scheduler stops make it less.
        """
        seen = self._progress.values()
        done = sum(one.step - one.first for one in seen)
        if self._num_trials is None or not done:
            return None
        running = [n for n, trial in self._trials.items() if trial.state == "running"]
        to_come = self._num_trials - self._num_ended
        length = sum(one.steps for one in seen) / len(seen)
        left = (to_come - len(running)) * length
        left += sum(one.steps - one.step for n, one in self._progress.items() if n in running)
        return left / done * (time.monotonic() - self._began)


def trials_table(
    trials: Iterable[Trial], job: SweepJob, progress: Mapping[int, _Progress] | None = None
) -> Table:
    """A line for each trial, in the order given; a star where it is of the best that finished."""
    trials, progress = list(trials), progress or {}
    best = {trial.number for trial in front(trials, job.objectives)}
    table = Table(title_justify="left", box=SIMPLE)
    names = list(job.space)
    metrics = [one.metric for one in job.objectives]
    for column in ("trial", *_short(names), "step", *metrics, "state", ""):
        table.add_column(column, overflow="fold")
    for trial in trials:
        known = progress.get(trial.number)
        table.add_row(
            f"{trial.number}{' *' if trial.number in best else ''}",
            *(brief(trial.values.get(name)) for name in names),
            f"{known.step}/{known.steps}" if known else str(trial.step or "-"),
            *(brief(trial.metrics.get(name)) for name in metrics),
            trial.state,
            textwrap.shorten(trial.why, _WHY, placeholder=" ..."),
            style=_STYLE.get(trial.state, ""),
        )
    return table


def _short(names: Sequence[str]) -> list[str]:
    """The last part of each field's name where that tells them apart."""
    lasts = [name.rpartition(".")[2] for name in names]
    return [
        last if lasts.count(last) == 1 else name for name, last in zip(names, lasts, strict=True)
    ]
