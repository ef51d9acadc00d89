"""One stage on the driver's side: plan it, then train it with Ray Train."""

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from data_pipeline.dataset import Dataset, open_dataset
from orchestrator.bucket import on_disk
from orchestrator.errors import RunError, StageFailed, StageStopped
from orchestrator.files import digest
from orchestrator.job.config import StageSettings
from orchestrator.job.duration import to_steps
from orchestrator.runs.bill import begin, end
from orchestrator.runs.checkpoint import Checkpoint, newest_checkpoint
from orchestrator.runs.liveness import forget_workers
from orchestrator.runs.record import code_record, data_record
from orchestrator.runs.run import Run, run_directory
from orchestrator.runs.start import HandOver, Start, plan_hand_over, read_shapes, resolve_start
from orchestrator.runs.stop import asked_to_stop, let_run
from orchestrator.training.stage_checks import check_batch_norm, check_data

if TYPE_CHECKING:
    from model.build import Network

# Fields that say where and how watchfully a stage runs, not what comes out of it.
_NOT_IN_FINGERPRINT: dict[str, Any] = {
    "name": True,
    "start_from": True,
    "max_hours": True,
    "max_cost": True,
    "deadline": True,
    "cluster": True,
    "checkpoint": True,
    "log_every": True,
    "data": {
        "threads": True,
        "prefetch": True,
        "cache": True,
        "keep_pixels": True,
        "on_bad_sample": True,
        "max_bad_share": True,
    },
}


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """A stage whose data and starting point are resolved and checked."""

    stage: StageSettings
    data_directory: str
    train: Dataset
    val: Dataset
    start: Start | None
    hand_over: HandOver | None
    steps: int
    fingerprint: str
    run: Run
    pause_at: int | None = None  # the step after which it stops, with a checkpoint


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A finished stage."""

    name: str
    run: Run
    checkpoint: Checkpoint
    start: Start | None
    reused: bool

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Metrics of the last evaluation."""
        return dict(self.checkpoint.state["metrics"])


def plan_stage(
    stage: StageSettings,
    storage: Path,
    data_directory: str,
    results: Mapping[str, Checkpoint] = MappingProxyType({}),
) -> PlannedStage:
    """Resolve a stage's data and starting point, check that they fit, and name its run.

    `results` are the checkpoints of the finished stages of the same job.

    Raises:
        DataError, CheckpointError, RunError: say what is wrong and the cure.
    """
    train = open_dataset(data_directory, stage.data.train.dataset, stage.data.train.split)
    val = open_dataset(data_directory, stage.data.val.dataset, stage.data.val.split)
    check_data(stage, train, val)
    start = resolve_start(stage, storage, results)
    shapes = shapes_of(build_on_meta(stage, len(train.manifest.class_names)))
    names = train.manifest.class_names
    hand_over = plan_hand_over(shapes, read_shapes(start.file()), start, names) if start else None
    fingerprint = digest(
        {
            "stage": fingerprinted(stage),
            "train": train.manifest.digest,
            "val": val.manifest.digest,
            "start": [start.digest, start.take] if start else None,
        }
    )
    return PlannedStage(
        stage=stage,
        data_directory=data_directory,
        train=train,
        val=val,
        start=start,
        hand_over=hand_over,
        steps=to_steps(stage.duration, train.num_samples // stage.global_batch),
        fingerprint=fingerprint,
        run=run_directory(storage, stage.name, fingerprint),
    )


def fingerprinted(stage: StageSettings) -> dict[str, Any]:
    """The values of a stage that its result depends on."""
    return stage.model_dump(mode="json", exclude=_NOT_IN_FINGERPRINT)


def build_on_meta(stage: StageSettings, num_classes: int) -> "Network":
    """Build the network without memory: what it refuses is known before any worker starts.

    Raises:
        RunError: the values of model, optimizer.lr_multipliers or the batch do not fit together.
    """
    import torch

    from model.build import build_network, parameter_groups
    from model.sync_batch_norm import synchronize_batch_norm

    try:
        with torch.device("meta"):
            network = build_network(stage.model, stage.task, num_classes)
            if stage.model.batch_norm.sync:
                synchronize_batch_norm(network)
    except ValueError as error:
        raise RunError(f"{stage.name}: model: {error}") from None
    try:
        groups = parameter_groups(network, 0.0, stage.optimizer.lr_multipliers)
    except ValueError as error:
        raise RunError(f"{stage.name}: optimizer.{error}") from None
    if not any(group["lr_multiplier"] for group in groups):
        raise RunError(
            f"{stage.name}: optimizer.lr_multipliers: {dict(stage.optimizer.lr_multipliers)} leave "
            "every parameter as it is, so nothing is trained; give one of them more than 0"
        )
    check_batch_norm(stage, network)
    return network


def shapes_of(network: "Network") -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's tensors, as in its checkpoints."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def finished_result(planned: PlannedStage) -> StageResult | None:
    """The result of an earlier run with the same fingerprint, if it finished and is still whole."""
    if not planned.run.finished:
        return None
    checkpoint = newest_checkpoint(planned.run.checkpoints)
    if checkpoint is None or checkpoint.step != planned.steps:
        return None
    if checkpoint.state.get("bad_samples") and planned.stage.data.on_bad_sample == "fail":
        return None  # whoever goes on from it says why it cannot
    return _result(planned, checkpoint, reused=True)


def _result(planned: PlannedStage, checkpoint: Checkpoint, *, reused: bool) -> StageResult:
    return StageResult(
        name=planned.stage.name,
        run=planned.run,
        checkpoint=checkpoint,
        start=planned.start,
        reused=reused,
    )


def open_run(planned: PlannedStage, overrides: Sequence[str] = ()) -> None:
    """Write the record of a run that starts or goes on; the caller holds its lock.

    `overrides` are those of the command line.
    """
    record = planned.run.read()
    planned.run.update(
        name=planned.stage.name,
        stage=planned.stage.name,
        fingerprint=planned.fingerprint,
        status="running",
        reason=None,
        error=None,
        created=record.get("created", time.time()),
        attempts=record.get("attempts", 0) + 1,
        steps=planned.steps,
        job=planned.stage.model_dump(mode="json"),
        overrides=list(overrides),
        code=code_record(),
        start=planned.start.as_json() if planned.start else None,
        hand_over=asdict(planned.hand_over) if planned.hand_over else None,
        data={"train": data_record(planned.train), "val": data_record(planned.val)},
    )
    begin(planned.run, planned.stage.cluster)
    forget_workers(planned.run)
    let_run(planned.run)


def train_stage(planned: PlannedStage, callbacks: Sequence[Any] = ()) -> StageResult:
    """Train an opened run to its end with Ray Train, which calls `callbacks`.

    Raises:
        StageStopped: it was asked to stop, and did so after a checkpoint.
        StageFailed: training ended with an error; the run directory holds the whole traceback.
    """
    run, name = planned.run, planned.stage.name
    try:
        checkpoint = _train(planned, callbacks)
    except StageStopped as stop:
        end(run, "stopped", reason=stop.reason)
        raise
    except Exception as error:
        if run.read().get("status") == "stopped":  # without workers; the command is ending
            raise StageStopped(name, 0, planned.steps, "without workers") from error
        why = _hang_of_this_attempt(run, error) or cause(error)
        raise StageFailed(f"{name}: {why} ({_record_failure(run, why)})") from error
    end(
        run,
        "finished",
        checkpoint=str(checkpoint.path.relative_to(run.path)),
        digest=checkpoint.digest,
        metrics=checkpoint.state["metrics"],
    )
    return _result(planned, checkpoint, reused=False)


def _record_failure(run: Run, why: str) -> str:
    """Write down the error that is being handled; where all of it is."""
    try:
        (run.path / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        end(run, "failed", error=why)
    except OSError as error:  # the full disk that ended the stage
        return f"not recorded in {run.path}: {error}"
    return f"all of it: {run.path / 'error.txt'}"


def _train(planned: PlannedStage, callbacks: Sequence[Any]) -> Checkpoint:
    """Train until the last step; workers that were told to leave do so after a checkpoint, and
    training goes on with what is left."""
    from orchestrator.training.rollback import verdict_of
    from orchestrator.training.trainer import make_trainer
    from orchestrator.training.worker import Assignment, train_worker

    stage, run = planned.stage, planned.run
    record = run.read()
    assignment = Assignment(
        stage=stage.model_dump(mode="json"),
        run=str(run.path),
        attempt=record["attempts"],
        overrides=record["overrides"],
        code=record["code"],
        data_directory=planned.data_directory,
        fingerprint=planned.fingerprint,
        start=planned.start.as_json() if planned.start else None,
        pause_at=planned.pause_at,
    )
    reached = 0
    for part in count(1):
        trainer = make_trainer(
            train_worker,
            asdict(assignment),
            stage.cluster,
            name=f"{run.path.name}-{assignment.attempt:03d}-{part}",
            storage=str(on_disk(run.path) / "ray"),  # a marker, no more: checkpoints are ours
            callbacks=callbacks,
        )
        trainer.fit()
        if verdict := verdict_of(run):
            raise RunError(verdict)
        checkpoint = newest_checkpoint(run.checkpoints)
        if checkpoint is not None and checkpoint.step == planned.steps:
            return checkpoint
        if checkpoint is not None and checkpoint.step == planned.pause_at:
            raise StageStopped(stage.name, checkpoint.step, planned.steps, "pauses")
        if why := asked_to_stop(run):
            raise StageStopped(stage.name, checkpoint.step if checkpoint else 0, planned.steps, why)
        if checkpoint is None or checkpoint.step <= reached:
            break
        reached = checkpoint.step
        run.note("leave", f"a worker was told to leave; checkpoint of step {reached} written")
    raise RuntimeError(f"no valid checkpoint of step {planned.steps} in {run.checkpoints}")


def _hang_of_this_attempt(run: Run, error: BaseException) -> str | None:
    """What the workers said before they ended themselves, where that is what failed the stage."""
    attempt, hangs = run.read()["attempts"], [e for e in run.events() if e["kind"] == "hang"]
    hangs = [event for event in hangs if event["attempt"] == attempt]
    failures = getattr(error, "worker_failures", {}).values()
    lost = any(type(failure).__name__ == "WorkerHealthCheckFailedError" for failure in failures)
    return hangs[-1]["text"] if hangs and lost else None


def cause(error: BaseException) -> str:
    """The first worker's own error in one line, or the error itself."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, failure = min(failures.items())
        return f"worker {rank}: {cause(failure)}"
    text = str(error).strip()
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
