"""Run a job: prepare its data, then train its stages in the order of their links."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipeline.config import Shards
from data_pipeline.errors import DataError
from data_pipeline.storage import Place, is_local, join
from orchestrator.errors import AtrousError, StageFailed, StageStopped
from orchestrator.files import digest
from orchestrator.job.config import Job, PipelineJob, Prepared, StageJob, StageSettings
from orchestrator.launch import cluster
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
from orchestrator.runs.bill import add_bills, end, read_bill
from orchestrator.runs.liveness import beat_every, last_beat
from orchestrator.runs.run import Run
from orchestrator.runs.stop import Interrupted, Signals, ask_to_stop, asked_to_stop
from orchestrator.runs.tracking import Tracker, is_tracked

_TICK = 0.5  # seconds between looks at running stages


def run_job(
    job: Job, display: Display, signals: Signals | None = None, *, force: bool = False
) -> list[StageResult]:
    """Run a stage or a pipeline to its end; what was done before is found and not done again.

    With `force` it is done again, and the earlier run set aside.

    Raises:
        StageFailed: a stage failed; independent ones were still run.
        Interrupted: a signal came; running stages wrote a checkpoint and stopped.
        DataError, CheckpointError, RunError: something is not as the job needs it.
    """
    storage, signals = Path(job.storage), signals or Signals()
    storage.mkdir(parents=True, exist_ok=True)
    if isinstance(job, StageJob):
        return _Graph((job.settings,), job, display, signals, force=force).run()
    prepare_datasets(job, display)
    record = job.model_dump(mode="json")
    fingerprint = digest(record | {"storage": None, "data_root": None})
    parent = Run(storage / "pipelines" / f"{job.name}-{fingerprint[:12]}")
    with parent.lock():
        created = parent.read().get("created", time.time())
        parent.update(
            name=job.name, fingerprint=fingerprint, status="running", created=created, job=record
        )
        tracker = Tracker(storage, parent)
        try:
            results = _Graph(job.stages, job, display, signals, tracker, force=force).run()
            bill = add_bills([read_bill(result.run) for result in results])
            parent.update(status="finished", bill=bill.as_record())
        except Interrupted:
            parent.update(status="stopped")
            raise
        except Exception:
            parent.update(status="failed")
            raise
        finally:
            tracker.close()
    return results


def prepare_datasets(job: PipelineJob, display: Display) -> None:
    """Prepare the data sets a pipeline names, those that are not there yet."""
    from data_pipeline.prepare import Settings, prepare
    from orchestrator.launch.ray_tasks import on_cluster

    for name, wanted in job.datasets.items():
        if wanted.shards is not None:
            _index_shards(name, wanted, wanted.shards, job.data_directory, display)
            continue
        with display.preparing(name) as progress:
            manifests = prepare(
                wanted.format,
                _source(wanted, _raw_directory(job) / name),
                join(job.data_directory, name),
                Settings(limit=wanted.limit, on_broken=wanted.on_broken),
                splits=wanted.splits,
                workers=on_cluster(),
                progress=progress,
            )
        if wanted.source is not None:  # drawn data sets never have the official counts
            display.prepared(manifests.values())


def _index_shards(
    name: str, wanted: Prepared, shards: Shards, data_directory: str, display: Display
) -> None:
    """Index shards that others wrote; those indexed before only if they have changed."""
    from data_pipeline.shard_index import index_shards

    assert wanted.source is not None  # checked with the job file
    contents = shards.below(wanted.source)
    with display.preparing(name) as progress:
        manifests = [
            index_shards(
                places,
                join(data_directory, name),
                split,
                contents,
                on_broken=wanted.on_broken,
                progress=progress,
            )
            for split, places in contents.places.items()
        ]
    display.prepared(manifests)


def _raw_directory(job: PipelineJob) -> Path:
    """Where drawn sources lie: beside the prepared data sets, if those lie on a disk."""
    local = is_local(job.data_directory)
    return (Path(job.data_directory) if local else Path(job.storage)) / "raw"


def _source(wanted: Prepared, raw: Path) -> Place:
    if wanted.source is not None:
        return wanted.source
    from data_pipeline.formats.synthetic import synthesize

    options: dict[str, Any] = wanted.synthesize or {}
    try:
        return synthesize(raw, layouts=(wanted.format,), **options)[wanted.format]
    except TypeError as error:
        raise DataError(f"synthesize: {options}: {error}") from None


@dataclass(kw_only=True)
class _Branch:
    """A stage that is running in a thread of its own."""

    planned: PlannedStage
    needs: Resources
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


class _Graph:
    """The stages of a job: which wait, run, are done, or cannot run any more."""

    def __init__(
        self,
        stages: Sequence[StageSettings],
        job: Job,
        display: Display,
        signals: Signals,
        parent: Tracker | None = None,
        *,
        force: bool = False,
    ) -> None:
        self._stages = stages
        self._force = force
        self._storage = Path(job.storage)
        self._data_directory = job.data_directory
        self._display = display
        self._signals = signals
        self._parent = parent
        self._waiting = list(stages)
        self._running: list[_Branch] = []
        self._done: dict[str, StageResult] = {}
        self._failed: dict[str, str] = {}

    def run(self) -> list[StageResult]:
        """Run all that can run; the results in the order of the job file."""
        while self._waiting or self._running:
            for stage in self._ready():
                self._try_to_start(stage)
            self._signals.patient = bool(self._running)
            if self._running:
                time.sleep(_TICK)
            if self._signals.received:
                self._stop(self._signals.received.name)
            self._display.update([branch.planned for branch in self._running])
            for branch in [branch for branch in self._running if branch.outcome is not None]:
                self._running.remove(branch)
                self._settle(branch)
        if self._failed:
            raise StageFailed("\n".join(f"{name}: {why}" for name, why in self._failed.items()))
        if self._signals.received and len(self._done) < len(self._stages):
            raise Interrupted(self._signals.received)
        return [self._done[stage.name] for stage in self._stages]

    def _ready(self) -> list[StageSettings]:
        """Waiting stages whose predecessor is done; those whose predecessor failed are given up."""
        for stage in [s for s in self._waiting if _predecessor(s) in self._failed]:
            self._give_up(stage.name, f"not run: {_predecessor(stage)} failed")
        unfinished = {stage.name for stage in self._waiting}
        unfinished |= {branch.planned.stage.name for branch in self._running}
        return [stage for stage in self._waiting if _predecessor(stage) not in unfinished]

    def _try_to_start(self, stage: StageSettings) -> None:
        """Start a ready stage, take its earlier result, or leave it waiting for room."""
        if not self._has_room(cluster.needed(stage.cluster)):
            return
        try:
            results = {name: result.checkpoint for name, result in self._done.items()}
            planned = plan_stage(stage, self._storage, self._data_directory, results)
            if self._force and planned.run.finished:
                planned.run.set_aside()
            earlier = finished_result(planned)
            if earlier is None and stage.cluster.min_workers:
                self._cluster.check_fits(stage.name, stage.cluster)
        except (AtrousError, DataError) as error:
            self._give_up(stage.name, str(error).removeprefix(f"{stage.name}: "))
            return
        self._waiting = [other for other in self._waiting if other.name != stage.name]
        if earlier is not None:
            if not is_tracked(earlier.run):
                Tracker(self._storage, earlier.run, self._parent).close()
            self._done[stage.name] = earlier
            self._display.finished(earlier)
        else:
            self._start(_Branch(planned=planned, needs=cluster.needed(stage.cluster)))

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
        longest = max(stage.cluster.hang_after for stage in self._stages)
        return cluster.connect(hang_after=longest)

    def _start(self, branch: _Branch) -> None:
        self._running.append(branch)
        self._display.started(branch.planned)
        name = branch.planned.stage.name
        threading.Thread(target=self._train, args=(branch,), name=name, daemon=True).start()

    def _train(self, branch: _Branch) -> None:
        planned = branch.planned
        try:
            with planned.run.lock():
                open_run(planned)
                tracker = Tracker(self._storage, planned.run, self._parent)
                try:
                    outcome: StageResult | Exception = train_stage(planned)
                finally:
                    tracker.close()
        except Exception as error:  # told by the main thread, whatever it is
            outcome = error
        branch.outcome = outcome

    def _stop(self, why: str) -> None:
        """Start nothing more, and ask what runs to stop, again until it hears."""
        if self._waiting:
            self._display.say(f"not started: {', '.join(stage.name for stage in self._waiting)}")
            self._waiting = []
        for branch in list(self._running):
            run, name = branch.planned.run, branch.planned.stage.name
            if branch.planned.stage.cluster.max_workers and branch.abandoned():
                end(run, "stopped")
                self._running.remove(branch)
                self._display.stopped(name, "stopped: it had no workers")
            elif not asked_to_stop(run):
                ask_to_stop(run, why)
                self._display.say(f"{name}: {why}: stops after a checkpoint; again: at once")

    def _settle(self, branch: _Branch) -> None:
        name, outcome = branch.planned.stage.name, branch.outcome
        if isinstance(outcome, StageResult):
            self._done[name] = outcome
            self._display.finished(outcome)
        elif isinstance(outcome, StageStopped):
            self._display.stopped(name, str(outcome).removeprefix(f"{name}: "))
        elif isinstance(outcome, AtrousError):
            self._give_up(name, str(outcome).removeprefix(f"{name}: "))
        elif outcome is not None:
            raise outcome

    def _give_up(self, name: str, reason: str) -> None:
        self._waiting = [stage for stage in self._waiting if stage.name != name]
        self._failed[name] = reason
        self._display.failed(name, reason)


def _predecessor(stage: StageSettings) -> str | None:
    """What a stage starts from, as its job file says."""
    return stage.start_from.checkpoint if stage.start_from else None
