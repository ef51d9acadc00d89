"""A trial where it is trained: an ordinary run of a stage, whose evaluations are told as they come.

Workers of Ray Train tell them to Tune by its `TuneReportCallback`; where there are none, the lines
of the run's journal are told. Either way it is news, no more: what a kill lost of it is in the
journal, from which the sweep takes it.
"""

import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from orchestrator.bucket import storage_path
from orchestrator.errors import AtrousError, StageFailed, StageStopped
from orchestrator.files import read_json
from orchestrator.job.config import StageSettings
from orchestrator.launch.stage import (
    PlannedStage,
    finished_result,
    open_run,
    plan_stage,
    train_stage,
)
from orchestrator.runs.checkpoint import newest_checkpoint, read_checkpoint
from orchestrator.runs.record import evaluated
from orchestrator.runs.run import Run, read_journal, run_directory, truncate_journal
from orchestrator.runs.start import Start
from orchestrator.runs.stop import ask_to_stop

_TICK = 0.5  # seconds between looks at the journal

Told = dict[str, Any]
"""{"step", "val/..."} of an evaluation, or at the end {"outcome", "error"}."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Work for one actor: a trial until its end, or until it pauses. Plain values."""

    trial: int
    stage: Mapping[str, Any]
    storage: str
    data_directory: str
    results: Mapping[str, str]  # earlier stage -> its checkpoint
    fingerprint: str
    copied: bool  # it goes on from a copy of another trial's checkpoint
    pause_at: int | None
    overrides: Sequence[str]


def plan_unit(unit: Unit) -> PlannedStage:
    """Resolve the stage of a unit, here and now.

    Raises:
        DataError, CheckpointError, RunError: as `plan_stage`.
    """
    storage = storage_path(unit.storage)
    stage = StageSettings.model_validate(unit.stage)
    results = {name: read_checkpoint(storage_path(path)) for name, path in unit.results.items()}
    planned = plan_stage(stage, storage, unit.data_directory, results)
    if unit.copied:
        planned = as_copy(planned, unit.fingerprint, storage)
    return replace(planned, pause_at=unit.pause_at)


def as_copy(planned: PlannedStage, fingerprint: str, storage: Path) -> PlannedStage:
    """The same in the run that holds the copy, whose checkpoints say where it is from."""
    run = run_directory(storage, planned.stage.name, fingerprint)
    copy = newest_checkpoint(run.checkpoints)
    start = Start.from_json(copy.state["parents"][0]) if copy else None
    return replace(planned, run=run, fingerprint=fingerprint, start=start, hand_over=None)


def train_unit(
    unit: Unit, begun: Callable[[Run, int], None], callbacks: Sequence[Any] = ()
) -> Told:
    """Train a unit to its end, and tell how that was.

    `begun` is called with its run and the step that it goes on from, once the journal is of the
    path that is trained; `callbacks` are Ray Train's.

    Raises:
        Exception: what befell this process, rather than the training.
    """
    try:
        planned = plan_unit(unit)
        if finished_result(planned):
            begun(planned.run, planned.steps)
            return {"outcome": "finished", "error": ""}
        with planned.run.lock(attach=lambda _: None):  # of a node that was lost with its trial
            open_run(planned, unit.overrides)
            begun(planned.run, _cut_journal(planned.run))
            return _train(planned, callbacks)
    except (AtrousError, DataError) as error:
        return {"outcome": "failed", "error": str(error)}


def _cut_journal(run: Run) -> int:
    """Drop what training will write again; the step that it goes on from."""
    checkpoint = newest_checkpoint(run.checkpoints)
    step = checkpoint.step if checkpoint else 0
    truncate_journal(run.journal, step)
    return step


def _train(planned: PlannedStage, callbacks: Sequence[Any]) -> Told:
    run = planned.run
    try:
        train_stage(_without_rollbacks(planned), callbacks)
    except StageStopped as stop:
        checkpoint = newest_checkpoint(run.checkpoints)
        paused = checkpoint is not None and checkpoint.step == planned.pause_at
        return {"outcome": "paused" if paused else "stopped", "error": stop.reason}
    except StageFailed as error:
        not_finite = _not_finite(run)
        return {"outcome": "nan" if not_finite else "failed", "error": not_finite or str(error)}
    return {"outcome": "finished", "error": ""}


class TrialRun:
    """Trains a unit in a thread of its own, without workers of Ray Train."""

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        self._run: Run | None = None  # once its journal is of the path that is trained
        self._told = 0
        self._outcome: Told = {}
        self._error: Exception | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._work, name=f"trial {unit.trial}", daemon=True).start()

    def next(self) -> Told:
        """Wait for the next evaluation, or for the end.

        Raises:
            Exception: what befell this process, rather than the training.
        """
        while True:
            ended = self._ended.is_set()  # before the last look at the journal
            if told := self._look():
                return told
            if ended and self._error:
                raise self._error
            if ended:
                return self._outcome
            self._ended.wait(_TICK)

    def stop(self, why: str) -> None:
        """Have it write a checkpoint and stop."""
        if self._run and not self._ended.is_set():
            ask_to_stop(self._run, why)

    def _look(self) -> Told | None:
        for line in read_journal(self._run.journal, after=self._told) if self._run else []:
            if evaluation := evaluated(line["metrics"]):
                self._told = line["step"]
                return {"step": line["step"], **evaluation}
        return None

    def _begun(self, run: Run, _: int) -> None:
        self._run = run

    def _work(self) -> None:
        try:
            self._outcome = train_unit(self._unit, self._begun)
        except Exception as error:
            traceback.print_exc()
            self._error = error
        finally:
            self._ended.set()


def _not_finite(run: Run) -> str | None:
    """What was not finite, and where, if that ended the run; a sweep has other cures than the
    error names, and never goes back."""
    from orchestrator.training.rollback import TROUBLE, Window, verdict_of

    if verdict_of(run) is None:
        return None
    windows = (read_json(run.path / TROUBLE) or {})["windows"]
    return f"{Window(**windows[-1])}; all of it: {run.path / TROUBLE}"


def _without_rollbacks(planned: PlannedStage) -> PlannedStage:
    """Values with which training does not stay finite are not worth a second try."""
    settings = planned.stage.checkpoint.model_copy(update={"max_rollbacks": 0})
    return replace(planned, stage=planned.stage.model_copy(update={"checkpoint": settings}))
