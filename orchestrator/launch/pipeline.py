"""Run a job: prepare its data, then train its stages in the order of their links."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.config import Shards
from data_pipeline.errors import DataError
from data_pipeline.storage import Place, is_local, join
from orchestrator.bucket import on_disk, storage_path
from orchestrator.errors import JobStopped, StageFailed
from orchestrator.files import digest
from orchestrator.job.config import Job, PipelineJob, Prepared, StageJob, StageSettings
from orchestrator.launch.budget import limit_reached
from orchestrator.launch.graph import Graph
from orchestrator.launch.report import Display
from orchestrator.launch.stage import StageResult, fingerprinted
from orchestrator.runs.bill import add_bills
from orchestrator.runs.run import Run
from orchestrator.runs.stop import Interrupted, Signals, let_run
from orchestrator.runs.tracking import Tracker


def run_job(
    job: Job,
    display: Display,
    signals: Signals | None = None,
    *,
    force: bool = False,
    attach: bool = False,
    overrides: Sequence[str] = (),
) -> list[StageResult]:
    """Run a stage or a pipeline to its end; what was done before is found and not done again.

    With `force` it is done again, and the earlier run set aside. With `attach` another command
    that runs it is waited for, and its result taken, or gone on from. `overrides` are those that
    made the job of its file, for the record.

    Raises:
        StageFailed: a stage failed; independent ones were still run.
        Interrupted: a signal came; running stages wrote a checkpoint and stopped.
        JobStopped: a limit was reached, or somebody stopped a stage; as above.
        DataError, CheckpointError, RunError: something is not as the job needs it.
    """
    storage, signals = storage_path(job.storage), signals or Signals()
    storage.mkdir(parents=True, exist_ok=True)
    if job.datasets and (why := limit_reached(job, ())):
        raise JobStopped(f"{job.name}: not started ({why})")
    prepare_datasets(job, display)
    if isinstance(job, StageJob):
        graph = Graph(job, display, signals, force=force, attach=attach, overrides=overrides)
        return graph.run()
    fingerprint = _identity(job)
    parent = Run(storage / "pipelines" / f"{job.name}-{fingerprint[:12]}")
    with parent.lock(display.say if attach else None):
        parent.update(
            name=job.name,
            fingerprint=fingerprint,
            status="running",
            reason=None,
            created=parent.read().get("created", time.time()),
            job=job.model_dump(mode="json"),
            overrides=list(overrides),
        )
        let_run(parent)
        tracker = Tracker(storage, parent)
        graph = Graph(
            job, display, signals, tracker, force=force, attach=attach, overrides=overrides
        )
        status, reason = "failed", None
        try:
            results = graph.run()
            status = "finished"
        except (Interrupted, JobStopped) as error:
            status, reason = "stopped", str(error)
            raise
        except StageFailed as error:
            reason = str(error)
            raise
        finally:
            try:
                bill = add_bills(graph.bills).as_record()
                parent.update(status=status, reason=reason, bill=bill)
            except OSError as error:  # the full disk that ended a stage, of which it would say less
                display.say(f"{parent.path}: not recorded: {error}")
            tracker.close()
    return results


def _identity(job: PipelineJob) -> str:
    """Digest of what comes out of a pipeline; larger limits, for instance, go on with it."""
    return digest([job.name, stage_values(job.stages)])


def stage_values(stages: Sequence[StageSettings]) -> list[list[Any]]:
    """Of each stage its name, where it starts, and what its result depends on."""
    return [
        [stage.name, stage.model_dump(mode="json")["start_from"], fingerprinted(stage)]
        for stage in stages
    ]


def prepare_datasets(job: Job, display: Display) -> None:
    """Prepare the data sets a job names, those that are not there yet."""
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


def _raw_directory(job: Job) -> Path:
    """Where drawn sources lie: beside the prepared data sets, if those lie on a disk."""
    local = is_local(job.data_directory)
    return (Path(job.data_directory) if local else on_disk(storage_path(job.storage))) / "raw"


def _source(wanted: Prepared, raw: Path) -> Place:
    if wanted.source is not None:
        return wanted.source
    from data_pipeline.formats.synthetic import synthesize

    options: dict[str, Any] = wanted.synthesize or {}
    try:
        return synthesize(raw, layouts=(wanted.format,), **options)[wanted.format]
    except TypeError as error:
        raise DataError(f"synthesize: {options}: {error}") from None
