"""Run a job: prepare its data, then train its stages in the order of their links."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from orchestrator import cluster
from orchestrator.cluster import Resources
from orchestrator.config import Job, PipelineJob, Prepared, StageJob, StageSettings
from orchestrator.errors import AtrousError, StageFailed
from orchestrator.files import digest
from orchestrator.report import Display
from orchestrator.runs import Run
from orchestrator.stage import (
    PlannedStage,
    StageResult,
    finished_result,
    open_run,
    plan_stage,
    train_stage,
)
from orchestrator.tracking import Tracker

_TICK = 0.5  # seconds between looks at running stages


@dataclass(kw_only=True)
class _Branch:
    """A stage that is running in a thread of its own."""

    planned: PlannedStage
    takes: Resources
    thread: threading.Thread | None = None
    outcome: StageResult | Exception | None = None


@dataclass(kw_only=True)
class _Schedule:
    """Which stages wait, run, are done, or cannot run any more."""

    waiting: list[StageSettings]
    running: list[_Branch] = field(default_factory=list)
    done: dict[str, StageResult] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def ready(self) -> list[StageSettings]:
        """Waiting stages whose predecessors are done."""
        blocked = {stage.name for stage in self.waiting} | {
            branch.planned.stage.name for branch in self.running
        }
        return [stage for stage in self.waiting if predecessor(stage) not in blocked - {stage.name}]

    def drop_orphans(self) -> None:
        """Give up the stages whose predecessor failed."""
        for stage in list(self.waiting):
            if predecessor(stage) in self.failed:
                self.waiting.remove(stage)
                self.failed[stage.name] = f"not run: {predecessor(stage)} failed"


def predecessor(stage: StageSettings) -> str | None:
    """What a stage starts from, as its job file says."""
    return stage.start_from.checkpoint if stage.start_from else None


def run_job(job: Job, display: Display) -> list[StageResult]:
    """Run a stage or a pipeline to its end; what was done before is found and not done again.

    Raises:
        StageFailed: a stage failed; independent ones were still run.
        DataError, CheckpointError, RunError: something is not as the job needs it.
    """
    storage = Path(job.storage)
    storage.mkdir(parents=True, exist_ok=True)
    if isinstance(job, StageJob):
        return _run_stages((job.settings,), job, display, None)
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
            results = _run_stages(job.stages, job, display, tracker)
            parent.update(status="finished")
        except Exception:
            parent.update(status="failed")
            raise
        finally:
            tracker.close()
    return results


def prepare_datasets(job: PipelineJob, display: Display) -> None:
    """Prepare the data sets a pipeline names, those that are not there yet."""
    from data_pipeline.prepare import Settings, prepare

    for name, wanted in job.datasets.items():
        with display.preparing(name) as progress:
            prepare(
                wanted.format,
                _source(wanted, job.data_directory / "raw" / name),
                job.data_directory / name,
                Settings(limit=wanted.limit, on_broken=wanted.on_broken),
                splits=wanted.splits,
                progress=progress,
            )


def _source(wanted: Prepared, raw: Path) -> Path:
    if wanted.source is not None:
        return Path(wanted.source)
    from data_pipeline.formats.synthetic import synthesize

    options: dict[str, Any] = wanted.synthesize or {}
    try:
        return synthesize(raw, layouts=(wanted.format,), **options)[wanted.format]
    except TypeError as error:
        raise DataError(f"synthesize: {options}: {error}") from None


def _run_stages(
    stages: Sequence[StageSettings], job: Job, display: Display, parent: Tracker | None
) -> list[StageResult]:
    schedule = _Schedule(waiting=list(stages))
    get_cluster = _lazy_cluster()
    while schedule.waiting or schedule.running:
        for stage in schedule.ready():
            _start_if_possible(stage, schedule, job, display, parent, get_cluster)
        schedule.drop_orphans()
        if schedule.running:
            time.sleep(_TICK)
        display.update([branch.planned for branch in schedule.running])
        for branch in [b for b in schedule.running if b.outcome is not None]:
            _finish(branch, schedule, display)
    if schedule.failed:
        lines = [f"{name}: {reason}" for name, reason in schedule.failed.items()]
        raise StageFailed("\n".join(lines))
    return [schedule.done[stage.name] for stage in stages]


def _lazy_cluster() -> Callable[[], tuple[Resources, bool]]:
    """Connect at the first stage that trains on Ray; a job of finished stages needs no cluster."""

    def get() -> tuple[Resources, bool]:
        ray, ours = cluster.connect()
        return cluster.resources(ray), ours

    return get


def _start_if_possible(
    stage: StageSettings,
    schedule: _Schedule,
    job: Job,
    display: Display,
    parent: Tracker | None,
    get_cluster: Callable[[], tuple[Resources, bool]],
) -> None:
    """Start a ready stage, take its earlier result, or leave it waiting for room."""
    exclusive = stage.cluster.min_workers == 0
    if schedule.running and (exclusive or any(not b.takes.cpus for b in schedule.running)):
        return  # a stage in this process has the process for itself
    planned = plan_stage(stage, Path(job.storage), job.data_directory)
    earlier = finished_result(planned)
    takes = cluster.needed(stage.cluster)
    if earlier is None and not exclusive:
        total, ours = get_cluster()
        if ours:
            cluster.check_fits(stage.name, stage.cluster, total)
        for branch in schedule.running:
            total = total - branch.takes
        if schedule.running and not total.covers(takes):
            return
    schedule.waiting.remove(stage)
    if earlier is not None:
        schedule.done[stage.name] = earlier
        display.finished(earlier)
        return
    branch = _Branch(planned=planned, takes=takes)
    branch.thread = threading.Thread(
        target=_train, args=(branch, Path(job.storage), parent), name=stage.name, daemon=True
    )
    schedule.running.append(branch)
    display.started(planned)
    branch.thread.start()


def _train(branch: _Branch, storage: Path, parent: Tracker | None) -> None:
    planned = branch.planned
    try:
        with planned.run.lock():
            open_run(planned)
            tracker = Tracker(storage, planned.run, parent)
            try:
                outcome: StageResult | Exception = train_stage(planned)
            finally:
                tracker.close()
    except Exception as error:  # reported by the main thread, whatever it is
        outcome = error
    branch.outcome = outcome


def _finish(branch: _Branch, schedule: _Schedule, display: Display) -> None:
    schedule.running.remove(branch)
    name = branch.planned.stage.name
    if isinstance(branch.outcome, StageResult):
        schedule.done[name] = branch.outcome
        display.finished(branch.outcome)
    elif isinstance(branch.outcome, AtrousError):
        schedule.failed[name] = str(branch.outcome).removeprefix(f"{name}: ")
        display.failed(name, schedule.failed[name])
    elif branch.outcome is not None:
        raise branch.outcome
