"""What runs in every Ray Train worker: build the stage's parts, then `loop.train`."""

import gc
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray.train
import torch

from data_pipeline.dataset import Dataset, open_dataset
from data_pipeline.kept_pixels import keep_pixels
from data_pipeline.loader import Batch, TrainLoader
from data_pipeline.plan import slots_of_rank
from model.allocator import keep_freed_memory
from model.build import Network, build_network
from model.sync_batch_norm import synchronize_batch_norm
from orchestrator.bucket import storage_path
from orchestrator.errors import NonFiniteError
from orchestrator.files import digest, read_json
from orchestrator.job.config import StageSettings
from orchestrator.job.duration import to_steps
from orchestrator.job.sections import Cluster
from orchestrator.runs.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint
from orchestrator.runs.checkpoint_writer import Contents
from orchestrator.runs.liveness import Liveness
from orchestrator.runs.record import Metrics, data_record, evaluated, versions
from orchestrator.runs.run import Run
from orchestrator.runs.run_writer import RunWriter
from orchestrator.runs.start import Start, apply_hand_over
from orchestrator.training.artifacts import Predictions, keep_artifacts, split_classes
from orchestrator.training.bad_samples import BadSampleMeter
from orchestrator.training.evaluate import evaluate
from orchestrator.training.learner import Learner
from orchestrator.training.ledger import Ledger, came_up, note_device
from orchestrator.training.loop import Training, train
from orchestrator.training.meters import Meters
from orchestrator.training.optimizer import base_rate, make_schedule
from orchestrator.training.place import Place, find_place
from orchestrator.training.probe import Probe, micro_batch_metrics, naming_memory, settle_memory
from orchestrator.training.rollback import (
    GivenUp,
    RecentBatches,
    Window,
    agreed_windows,
    check_finite,
    first_trained,
    roll_back,
    rollback_metrics,
    with_gaps,
)
from orchestrator.training.task import make_loss
from orchestrator.training.train_state import TrainState, make_state
from orchestrator.training.trainer import watch

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a driver hands to its workers; plain values, so it travels as JSON."""

    stage: Mapping[str, Any]
    run: str
    attempt: int  # of the run; workers of an earlier one must not write
    overrides: Sequence[str]
    code: Mapping[str, Any]
    data_directory: str
    fingerprint: str
    start: Mapping[str, Any] | None
    pause_at: int | None = None  # stop after this step, with a checkpoint


@dataclass(frozen=True, kw_only=True)
class Work:
    """An assignment with its parts built."""

    assignment: Assignment
    stage: StageSettings
    run: Run
    writer: RunWriter | None  # the first worker's
    place: Place
    train_set: Dataset
    val_set: Dataset
    state: TrainState
    bad_samples: BadSampleMeter
    liveness: Liveness
    windows: Sequence[Window]  # passed over, after a loss or gradient that was not finite
    recent: RecentBatches

    @property
    def network(self) -> Network:
        """The network without DDP around it."""
        return self.state.network

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.train_set.num_samples // self.stage.global_batch

    @property
    def steps(self) -> int:
        """Length of the training."""
        return self.in_steps(self.stage.duration)

    def in_steps(self, duration: int | str) -> int:
        """A duration of the job file."""
        return to_steps(duration, self.steps_per_epoch)

    def writing(self) -> AbstractContextManager[object]:
        """When it ends, nothing is being written any more."""
        return self.writer or nullcontext()


def train_worker(config: dict[str, Any]) -> None:
    """Train one stage as one of its workers (`train_loop_per_worker` of Ray Train)."""
    assignment = Assignment(**config)
    cluster = Cluster.model_validate(assignment.stage["cluster"])
    run = Run(storage_path(assignment.run))
    context = ray.train.get_context()
    came_up(run, context.get_world_rank(), context.get_world_size())
    with watch(run, cluster) as liveness:
        try:
            while not _train(assignment, liveness):
                gc.collect()  # the network that is left behind leaves room for the next one
        except GivenUp as error:  # an error would have Ray start the workers anew, for nothing
            log.error("%s", error)


def _train(assignment: Assignment, liveness: Liveness) -> bool:
    """Train from where the run stands to its end; False when it went back instead."""
    began = time.perf_counter()
    liveness.builds()
    work = _build(assignment, liveness)
    own = _restore(work)
    start = own.step if own else 0
    liveness.started(start)
    if work.writer:
        work.writer.go_on_from(start)
    ideal_step = _ideal_step(work)  # before the loader's threads want the processors too
    try:
        with _open_loader(work, first_trained(start, work.windows)) as loader, work.writing():
            meters = Meters(
                loader,
                work.stage.global_batch,
                work.place.device,
                ideal_step=ideal_step,
                began=began,
            )
            if own:
                meters.go_on_from(own.state["meters"])
            if start != work.assignment.pause_at:  # a kill may come right after its checkpoint
                train(_training(work, loader, meters, start))
            if work.writer:
                work.writer.finish(work.liveness.alive)
            return True
    except NonFiniteError as error:
        trouble = error
    every = work.in_steps(work.stage.checkpoint.every)
    keys = work.recent.of(trouble.step)
    if work.writer:
        work.writer.check()
    roll_back(work.run, work.place, every, work.stage, trouble, keys)
    return False


def _ideal_step(work: Work) -> float | None:
    """Seconds of a step at the devices' peak; None but for the worker that writes metrics."""
    if work.writer is None:
        return None
    num_classes = len(work.train_set.manifest.class_names)
    return note_device(work.writer, work.stage, num_classes, work.network, work.place)


def _open_loader(work: Work, start: int) -> TrainLoader:
    stage, place = work.stage, work.place
    keep = stage.data.keep_pixels
    return TrainLoader(
        dataset=work.train_set,
        task=stage.task,
        data=stage.data.train,
        seed=stage.seed,
        global_batch=stage.global_batch,
        slots=slots_of_rank(stage.global_batch, place.rank, place.world),
        num_classes=len(work.train_set.manifest.class_names),
        start_step=min(start, work.steps),
        stop_step=work.steps,
        threads=stage.data.threads,
        prefetch=stage.data.prefetch,
        on_bad_sample=stage.data.on_bad_sample,
        mean_pixel=work.network.mean_pixel,
        kept_pixels=keep_pixels(work.train_set, stage.data.cache) if keep else None,
    )


def _training(work: Work, loader: TrainLoader, meters: Meters, start: int) -> Training:
    stage, place = work.stage, work.place
    loss = make_loss(stage, work.train_set.manifest, work.steps_per_epoch, place.device)
    learner = Learner(work.state, stage, place, loss, meters, work.liveness.wish)
    ledger = Ledger(work.writer, meters)

    def update(step: int, batch: Batch, rate: float) -> None:
        work.recent.add(step, batch.keys)
        work.bad_samples.add(step, batch.bad)
        with naming_memory(stage, place, batch.images.shape):
            learner.update(step, batch, rate)
        if step + 1 == work.assignment.pause_at:
            learner.must_save = learner.must_stop = True
        ledger.step(step + 1)
        work.liveness.alive("between steps", step=step + 1)

    def validate() -> Metrics:
        seen, alive = Predictions(), work.liveness.alive
        with meters.paused("evaluation"), learner.evaluating():
            metrics = evaluate(work.network, stage, work.val_set, place, alive, seen.add)
            metrics, tables = split_classes(metrics)
            if work.writer:
                keep_artifacts(work.run, work.writer.check, seen.files() | tables)
        return metrics

    def save(step: int, metrics: Metrics) -> None:
        learner.settle()
        work.liveness.alive("saves a checkpoint")
        with meters.paused("checkpoint stall"):
            check_finite(work.network, step - 1, place)
            _save(work, meters, step, metrics)
        ledger.save(step)
        work.liveness.saved()

    return Training(
        start=start,
        steps=work.steps,
        log_every=work.in_steps(stage.log_every),
        evaluate_every=work.in_steps(stage.evaluate.every),
        checkpoint_every=work.in_steps(stage.checkpoint.every),
        batches=with_gaps(work.liveness.watched(loader, "waits for data"), start, work.windows),
        seed=lambda step: _seed_step(stage.seed, step, place.rank),
        schedule=make_schedule(
            stage.schedule,
            base_rate(stage.optimizer, stage.global_batch),
            work.steps,
            work.steps_per_epoch,
        ),
        update=update,
        read_meters=lambda: learner.read() | meters.read() | work.bad_samples.read(),
        evaluate=validate,
        log=partial(_log, work, meters),
        save=save,
        must_save=learner.take_must_save,
        must_stop=lambda: learner.must_stop,
    )


def _build(assignment: Assignment, liveness: Liveness) -> Work:
    stage = StageSettings.model_validate(assignment.stage)
    place = find_place(stage.cluster.gpus_per_worker, stage.precision)
    if place.device.type == "cpu":
        keep_freed_memory()
    run, data = Run(storage_path(assignment.run)), assignment.data_directory
    cache = stage.data.cache
    writer = None if place.rank else RunWriter(run, assignment.attempt, stage.checkpoint)
    train_set = open_dataset(data, stage.data.train.dataset, stage.data.train.split, cache)
    torch.manual_seed(stage.seed)
    network = build_network(stage.model, stage.task, len(train_set.manifest.class_names))
    if stage.model.batch_norm.sync:
        synchronize_batch_norm(network)
    # The layout of the loader's batches; quicker on the CPU too (docs/log.md).
    network.to(device=place.device).to(memory_format=torch.channels_last)
    val_set = open_dataset(data, stage.data.val.dataset, stage.data.val.split, cache)
    steps_per_epoch = train_set.num_samples // stage.global_batch
    probe = Probe(
        stage=stage,
        place=place,
        network=network,
        loss=make_loss(stage, train_set.manifest, steps_per_epoch, place.device),
        num_classes=len(train_set.manifest.class_names),
    )
    stage = settle_memory(probe, run, val_set)
    return Work(
        assignment=assignment,
        stage=stage,
        run=run,
        writer=writer,
        place=place,
        train_set=train_set,
        val_set=val_set,
        state=make_state(network, stage, place),
        bad_samples=BadSampleMeter(stage.data, train_set, steps_per_epoch, place),
        liveness=liveness,
        windows=agreed_windows(run, place),
        recent=RecentBatches(),
    )


def _restore(work: Work) -> Checkpoint | None:
    """Load the run's own newest valid checkpoint, or else start_from, or else nothing."""
    own = agreed_checkpoint(work.run, work.place)
    if own is not None:
        work.state.load(own.weights(), own.optimizer(), own.ema())
        work.bad_samples.go_on_from(own.state.get("bad_samples", 0))
        log.info("goes on from %s", own.path)
        return own
    start = work.assignment.start
    if start is not None:
        source = Start.from_json(start)
        plan = apply_hand_over(work.network, source, work.train_set.manifest.class_names)
        work.state.restart_from_network()
        log.info("starts from %s: %s", source.place, plan.report())
    return None


def agreed_checkpoint(run: Run, place: Place) -> Checkpoint | None:
    """The newest valid checkpoint as the first worker sees it, which alone reads all for digests.

    Others may see another one as the newest, where nodes cache what a shared directory holds.
    """
    own = None if place.rank else newest_checkpoint(run.checkpoints)
    path = place.gather(own and own.path)[0]
    return read_checkpoint(path, verify=False) if path and place.rank else own


def _seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step, so that no generator state has to be saved."""
    torch.manual_seed(int(digest([seed, step, rank])[:15], 16))


def _log(work: Work, meters: Meters, step: int, metrics: Metrics) -> None:
    metrics |= rollback_metrics(work.windows, step)
    metrics |= micro_batch_metrics(work.assignment.stage["micro_batch"], work.stage)
    if work.writer:
        work.writer.log(step, metrics)
    if evaluation := evaluated(metrics):
        with meters.paused("evaluation"):  # all workers wait for each other there
            ray.train.report({"step": step, **evaluation})


def _save(work: Work, meters: Meters, step: int, metrics: Metrics) -> None:
    """Have the first worker write a checkpoint, which comes to be in the background."""
    work.bad_samples.read()
    if work.writer:
        work.writer.save(
            Contents(
                weights=work.network.state_dict(),
                optimizer=work.state.optimizer_state(),
                state=_state(work, step, metrics) | {"meters": meters.state()},
                ema=work.state.averaged_weights,
            )
        )


def _state(work: Work, step: int, metrics: Metrics) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    stage, start = work.stage, work.assignment.start
    return {
        "stage": stage.name,
        "task": stage.task,
        "fingerprint": work.assignment.fingerprint,
        "step": step,
        "steps": work.steps,
        "epoch": step // work.steps_per_epoch,
        "seed": stage.seed,
        "world": work.place.world,
        "metrics": metrics,
        "bad_samples": work.bad_samples.total,
        "model": stage.model.model_dump(mode="json"),
        "class_names": work.train_set.manifest.class_names,
        "data": {"train": data_record(work.train_set), "val": data_record(work.val_set)},
        "parents": [start] if start else [],
        "mlflow_run_id": _mlflow_run_id(work.run),
        "versions": versions(),
        "code": work.assignment.code,
        "overrides": work.assignment.overrides,
        "time": time.time(),
    }


def _mlflow_run_id(run: Run) -> str | None:
    try:
        return (read_json(run.tracking) or {}).get("run_id")
    except OSError:  # a storage that is away for a while costs the record this id
        return None
