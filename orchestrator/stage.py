"""One stage on the driver's side: plan it, then train it with Ray Train."""

import difflib
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data_pipeline.config import as_size
from data_pipeline.dataset import Dataset, open_dataset
from orchestrator.checkpoint import Checkpoint, newest_checkpoint
from orchestrator.config import StageSettings
from orchestrator.duration import to_steps
from orchestrator.errors import RunError, StageFailed
from orchestrator.files import digest
from orchestrator.record import data_record
from orchestrator.runs import Run, run_directory
from orchestrator.start import HandOver, Start, plan_hand_over, read_shapes, resolve_start

# Fields that say where and how watchfully a stage runs, not what comes out of it.
_NOT_IN_FINGERPRINT: dict[str, Any] = {
    "name": True,
    "start_from": True,
    "cluster": True,
    "checkpoint": True,
    "log_every": True,
    "data": {
        "threads": True,
        "prefetch": True,
        "cache": True,
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
    _check_data(stage, train, val)
    start = resolve_start(stage, storage, results)
    shapes = _network_shapes(stage, train)
    names = train.manifest.class_names
    hand_over = (
        plan_hand_over(shapes, read_shapes(Path(start.weights)), start, names) if start else None
    )
    fingerprint = digest(
        {
            "stage": stage.model_dump(mode="json", exclude=_NOT_IN_FINGERPRINT),
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


def _check_data(stage: StageSettings, train: Dataset, val: Dataset) -> None:
    for split in (train, val):
        manifest = split.manifest
        if manifest.task != stage.task:
            raise RunError(
                f"{stage.name}: task: {stage.task!r}, but {manifest.dataset}/{manifest.split} "
                f"is a data set of {manifest.task}"
            )
        if not manifest.has_labels:
            raise RunError(
                f"{stage.name}: data: {manifest.dataset}/{manifest.split} has no labels to train "
                "on or to compare with; name another split"
            )
    if train.num_samples < stage.global_batch:
        raise RunError(
            f"{stage.name}: {train.num_samples} samples do not fill a global batch of "
            f"{stage.global_batch}; lower global_batch or add samples"
        )
    if train.manifest.class_names != val.manifest.class_names:
        raise RunError(
            f"{stage.name}: data: train has {len(train.manifest.class_names)} classes, val has "
            f"{len(val.manifest.class_names)}, or their names differ; prepare both from one source"
        )
    _check_class_weights(stage, train)
    if stage.task == "segmentation":
        _check_pooling(stage)
        _check_crop(stage, val)


def _check_class_weights(stage: StageSettings, train: Dataset) -> None:
    names = train.manifest.class_names
    for name in stage.loss.class_weights:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            cure = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names[:30])}"
            raise RunError(
                f"{stage.name}: loss.class_weights: {train.manifest.dataset} has no class "
                f"{name!r}; {cure}"
            )


def _check_pooling(stage: StageSettings) -> None:
    """Batch normalisation of one value per channel has no variance."""
    norm, workers = stage.model.batch_norm, max(1, stage.cluster.max_workers)
    together = stage.global_batch if norm.sync else stage.global_batch // workers
    pooled = stage.model.image_level_features and not norm.frozen
    if pooled and together < 2:
        raise RunError(
            f"{stage.name}: global_batch: {stage.global_batch} over {workers} workers leaves one "
            "image to a worker, and batch normalisation of the image-level features needs two; "
            "raise global_batch, lower cluster.workers, or set model.batch_norm.frozen, or "
            "model.batch_norm.sync where there are more workers"
        )


def _check_crop(stage: StageSettings, val: Dataset) -> None:
    """Evaluation pads images and never cuts them."""
    crop = stage.data.val.crop
    if crop is None:
        return
    height, width = as_size(crop)
    largest = val.largest_size()
    if height < largest[0] or width < largest[1]:
        raise RunError(
            f"{stage.name}: data.val.crop: {[height, width]} is smaller than the largest image "
            f"{list(largest)} (height, width); images are never cut: raise it to that"
        )


def _network_shapes(stage: StageSettings, train: Dataset) -> dict[str, tuple[int, ...]]:
    """Build the network without memory: what it refuses is known before any worker starts."""
    import torch

    from model.build import build_network
    from model.sync_batch_norm import synchronize_batch_norm

    try:
        with torch.device("meta"):
            network = build_network(stage.model, stage.task, len(train.manifest.class_names))
            if stage.model.batch_norm.sync:
                synchronize_batch_norm(network)
    except ValueError as error:
        raise RunError(f"{stage.name}: model: {error}") from None
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


def open_run(planned: PlannedStage) -> None:
    """Write the record of a run that starts or goes on; the caller holds its lock."""
    record = planned.run.read()
    planned.run.update(
        name=planned.stage.name,
        stage=planned.stage.name,
        fingerprint=planned.fingerprint,
        status="running",
        created=record.get("created", time.time()),
        attempts=record.get("attempts", 0) + 1,
        steps=planned.steps,
        job=planned.stage.model_dump(mode="json"),
        start=planned.start.as_json() if planned.start else None,
        hand_over=asdict(planned.hand_over) if planned.hand_over else None,
        data={"train": data_record(planned.train), "val": data_record(planned.val)},
    )


def train_stage(planned: PlannedStage) -> StageResult:
    """Train an opened run to its end with Ray Train.

    Raises:
        StageFailed: training ended with an error; the run directory holds the whole traceback.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    from orchestrator.worker import Assignment, train_worker

    stage, run = planned.stage, planned.run
    cluster = stage.cluster
    assignment = Assignment(
        stage=stage.model_dump(mode="json"),
        run=str(run.path),
        data_directory=planned.data_directory,
        fingerprint=planned.fingerprint,
        start=planned.start.as_json() if planned.start else None,
    )
    workers = cluster.workers
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=asdict(assignment),
        scaling_config=ScalingConfig(
            num_workers=workers if isinstance(workers, int) else tuple(workers),
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={"CPU": cluster.cpus_per_worker}
            | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}),
        ),
        run_config=RunConfig(
            name=f"attempt-{run.read()['attempts']:03d}",
            storage_path=str(run.path / "ray"),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        trainer.fit()
        checkpoint = newest_checkpoint(run.checkpoints)
        if checkpoint is None or checkpoint.step != planned.steps:
            raise RuntimeError(f"no valid checkpoint of step {planned.steps} in {run.checkpoints}")
    except Exception as error:
        (run.path / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        run.update(status="failed", error=cause(error))
        raise StageFailed(
            f"{stage.name}: {cause(error)} (all of it: {run.path / 'error.txt'})"
        ) from error
    run.update(
        status="finished",
        checkpoint=str(checkpoint.path.relative_to(run.path)),
        digest=checkpoint.digest,
        metrics=checkpoint.state["metrics"],
    )
    return _result(planned, checkpoint, reused=False)


def cause(error: BaseException) -> str:
    """The first worker's own error in one line, or the error itself."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, failure = min(failures.items())
        return f"worker {rank}: {cause(failure)}"
    text = str(error).strip()
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
