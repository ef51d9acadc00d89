"""The stages of a job: which wait, run, are done, or cannot run any more."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from data_pipeline.errors import DataError
from orchestrator.bucket import storage_path
from orchestrator.errors import AtrousError, JobStopped, StageFailed, StageStopped
from orchestrator.job.config import Job, StageSettings
from orchestrator.launch import cluster
from orchestrator.launch.budget import limit_reached
from orchestrator.launch.cluster import Resources
from orchestrator.launch.report import Display
from orchestrator.launch.stage import (
    PlannedStage,
    StageResult,
    finished_result,
    open_run,
    plan_stage,
    train_stage,
)
from orchestrator.runs.bill import Account, Bill, end, read_bill
from orchestrator.runs.liveness import beat_every, last_beat
from orchestrator.runs.run import EventReader
from orchestrator.runs.stop import Interrupted, Signals, ask_to_stop, asked_to_stop
from orchestrator.runs.tracking import Tracker, is_tracked

_TICK = 0.5  # seconds between looks at running stages


@dataclass(kw_only=True)
class Branch:
    """A stage that is to run, or runs in a thread of its own."""

    planned: PlannedStage
    needs: Resources
    bill: Bill  # earlier commands included
    ready_since: int = 0  # so many stages were settled when it got ready
    events: EventReader | None = None  # since this command has opened the run
    account: Account = field(default_factory=Account)
    owned: bool = False  # by this command, no longer or not yet by another
    outcome: StageResult | Exception | None = None
    beat: Any | None = None
    heard: float = 0.0  # time of the last change of the beat

    def abandoned(self) -> bool:
        """Whether no worker is there that could obey: none has started, or all are lost."""
        beat, now = last_beat(self.planned.run), time.monotonic()
        if beat != self.beat:
            self.beat, self.heard = beat, now
        patience = 10 + 2 * beat_every(self.planned.stage.cluster.hang_after)
        return self.outcome is None and (beat is None or now - self.heard > patience)

    def reckon(self) -> None:
        """Bring the bill up to this moment."""
        if self.events is not None:
            for event in self.events.new():
                self.account.take(event)
            self.bill = self.account.bill(time.time())


class Graph:
    """Runs the stages of a job, as its links and the cluster's room allow."""

    def __init__(
        self,
        job: Job,
        display: Display,
        signals: Signals,
        parent: Tracker | None = None,
        *,
        force: bool = False,
        attach: bool = False,
        overrides: Sequence[str] = (),
    ) -> None:
        self._job = job
        self._storage = storage_path(job.storage)
        self._display = display
        self._signals = signals
        self._parent = parent
        self._force = force
        self._attach = attach
        self._overrides = overrides
        self._waiting = list(job.stages)  # for another stage
        self._ready: list[Branch] = []  # wait for room
        self._running: list[Branch] = []
        self._done: dict[str, StageResult] = {}
        self._failed: dict[str, str] = {}
        self._stopped: dict[str, str] = {}
        self._bills: dict[str, Bill] = {}

    def run(self) -> list[StageResult]:
        """Run all that can run; the results in the order of the job file.

        Raises:
            StageFailed: a stage failed; independent ones were still run.
            Interrupted: a signal came.
            JobStopped: a limit was reached, or somebody stopped a stage.
        """
        while self._waiting or self._ready or self._running:
            self._find_ready()
            self._stop_what_must()
            self._start_what_fits()
            self._signals.patient = bool(self._running)
            if self._running:
                time.sleep(_TICK)
            self._display.update([branch.planned for branch in self._running])
            for branch in [branch for branch in self._running if branch.outcome is not None]:
                self._running.remove(branch)
                self._settle(branch)
        if self._failed:
            raise StageFailed("\n".join(f"{name}: {why}" for name, why in self._failed.items()))
        if self._stopped and self._signals.received:
            raise Interrupted(self._signals.received)
        if self._stopped:
            raise JobStopped("\n".join(f"{name}: {why}" for name, why in self._stopped.items()))
        return [self._done[stage.name] for stage in self._job.stages]

    @property
    def bills(self) -> list[Bill]:
        """Of all stages that have run, earlier commands included."""
        return list(self._bills.values())

    def _find_ready(self) -> None:
        """Take earlier results of stages, and plan those whose predecessor is done."""
        while found := [stage for stage in self._waiting if self._is_next(stage)]:
            for stage in found:
                self._waiting.remove(stage)
                before = stage.start_from.checkpoint if stage.start_from else None
                if before in self._failed:
                    self._give_up(stage.name, f"not run: {before} failed")
                elif before in self._stopped:
                    self._put_off(stage.name, f"not started: {before} was stopped")
                else:
                    self._plan(stage)

    def _is_next(self, stage: StageSettings) -> bool:
        """Whether no stage is left that this one starts from."""
        unfinished = {other.name for other in self._waiting}
        unfinished |= {branch.planned.stage.name for branch in (*self._ready, *self._running)}
        return not stage.start_from or stage.start_from.checkpoint not in unfinished

    def _plan(self, stage: StageSettings) -> None:
        try:
            results = {name: result.checkpoint for name, result in self._done.items()}
            planned = plan_stage(stage, self._storage, self._job.data_directory, results)
            if self._force and planned.run.finished:
                planned.run.set_aside()
            earlier = finished_result(planned)
        except (AtrousError, DataError) as error:
            self._give_up(stage.name, str(error).removeprefix(f"{stage.name}: "))
            return
        self._bills[stage.name] = bill = read_bill(planned.run)
        if earlier is None:
            needs = cluster.needed(stage.cluster)
            settled = len(self._done) + len(self._failed)
            branch = Branch(planned=planned, needs=needs, bill=bill, ready_since=settled)
            self._ready.append(branch)
            return
        if not is_tracked(earlier.run):
            Tracker(self._storage, earlier.run, self._parent).close()
        self._done[stage.name] = earlier
        self._display.finished(earlier)

    def _stop_what_must(self) -> None:
        """All at a signal or a limit of the job, a stage at a limit of its own."""
        for branch in self._running:
            branch.reckon()
            self._bills[branch.planned.stage.name] = branch.bill
        signal, pipeline = self._signals.received, self._parent and self._parent.run
        why = signal.name if signal else pipeline and asked_to_stop(pipeline)
        why = why or limit_reached(self._job, self.bills)
        if why:
            names = [stage.name for stage in self._waiting]
            names = [branch.planned.stage.name for branch in self._ready] + names
            if names:
                self._display.say(f"not started: {', '.join(names)}")
            self._stopped |= dict.fromkeys(names, f"not started ({why})")
            self._waiting, self._ready = [], []
        for branch in [*self._ready, *self._running]:
            if own := why or limit_reached(branch.planned.stage, [branch.bill]):
                self._stop(branch, own)

    def _stop(self, branch: Branch, why: str) -> None:
        """Ask a stage to stop, again until it hears; one that waits is not started."""
        run, name = branch.planned.run, branch.planned.stage.name
        if branch in self._ready:
            self._ready.remove(branch)
            self._put_off(name, f"not started ({why})")
        elif not branch.owned:
            self._running.remove(branch)
            self._put_off(name, f"not started ({why})")
        elif not asked_to_stop(run):
            ask_to_stop(run, why)
            again = "; again: at once" if self._signals.received else ""
            self._display.say(f"{name}: {why}: stops after a checkpoint{again}")
        elif branch.planned.stage.cluster.max_workers and branch.abandoned():
            end(run, "stopped", reason=why)
            self._running.remove(branch)
            self._put_off(name, f"stopped ({why}): it had no workers")

    def _start_what_fits(self) -> None:
        """Start stages that there is room for.

        One that got ready after another that waits for room waits too: else small ones could keep
        a large one waiting for ever.
        """
        held_since = None
        for branch in list(self._ready):
            if held_since is not None and branch.ready_since > held_since:
                return
            if self._has_room(branch.needs):
                self._ready.remove(branch)
                self._start(branch)
            elif held_since is None:
                held_since = branch.ready_since

    def _has_room(self, needs: Resources) -> bool:
        """Whether a stage fits beside the running ones; one in this process runs alone."""
        if not self._running:
            return True
        if not needs.cpus or any(not branch.needs.cpus for branch in self._running):
            return False
        free = self._cluster.total
        for branch in self._running:
            free = free - branch.needs
        return free.covers(needs)

    @cached_property
    def _cluster(self) -> cluster.Connection:
        """Connected at the first stage that trains on Ray: finished jobs need no cluster."""
        longest = max(stage.cluster.hang_after for stage in self._job.stages)
        return cluster.connect(hang_after=longest)

    def _start(self, branch: Branch) -> None:
        stage = branch.planned.stage
        try:
            if stage.cluster.min_workers:
                self._cluster.check_fits(stage.name, stage.cluster)
        except AtrousError as error:
            self._give_up(stage.name, str(error).removeprefix(f"{stage.name}: "))
            return
        self._running.append(branch)
        self._display.started(branch.planned)
        threading.Thread(target=self._train, args=(branch,), name=stage.name, daemon=True).start()

    def _train(self, branch: Branch) -> None:
        planned = branch.planned
        try:
            with planned.run.lock(self._display.say if self._attach else None):
                if branch not in self._running:
                    return
                branch.owned = True
                if earlier := finished_result(planned):  # by whom it was waited for
                    branch.outcome = earlier
                    return
                open_run(planned, self._overrides)
                branch.events = EventReader(planned.run)
                tracker = Tracker(self._storage, planned.run, self._parent)
                try:
                    outcome: StageResult | Exception = train_stage(planned)
                finally:
                    tracker.close()
        except Exception as error:  # told by the main thread, whatever it is
            outcome = error
        branch.outcome = outcome

    def _settle(self, branch: Branch) -> None:
        name, outcome = branch.planned.stage.name, branch.outcome
        branch.reckon()
        self._bills[name] = branch.bill
        if isinstance(outcome, StageResult):
            self._done[name] = outcome
            self._display.finished(outcome)
        elif isinstance(outcome, StageStopped):
            self._put_off(name, outcome.reason)
        elif isinstance(outcome, AtrousError):
            why = str(outcome).removeprefix(f"{name}: ")
            self._give_up(name, why if branch.owned else f"not run: {why}")
        elif outcome is not None:
            raise outcome

    def _put_off(self, name: str, how: str) -> None:
        self._stopped[name] = how
        self._display.stopped(name, how)

    def _give_up(self, name: str, reason: str) -> None:
        self._failed[name] = reason
        self._display.failed(name, reason)
