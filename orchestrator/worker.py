"""What runs in every Ray Train worker: build the stage's parts, then `orchestrator.loop.train`."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch

from data_pipeline.dataset import Dataset, open_dataset
from data_pipeline.loader import Batch, TrainLoader
from data_pipeline.plan import slots_of_rank
from model.build import Network, build_network, decay_groups
from model.sync_batch_norm import synchronize_batch_norm
from orchestrator.bad_samples import BadSampleMeter
from orchestrator.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from orchestrator.config import StageSettings
from orchestrator.duration import to_steps
from orchestrator.evaluate import evaluate
from orchestrator.files import digest, read_json
from orchestrator.learner import Learner
from orchestrator.loop import Metrics, Training, train
from orchestrator.meters import Meters
from orchestrator.optimizer import make_optimizer, make_schedule
from orchestrator.place import Place, find_place
from orchestrator.record import data_record, versions
from orchestrator.runs import Run, append_journal, truncate_journal
from orchestrator.start import Start, apply_hand_over
from orchestrator.task import make_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a driver hands to its workers; plain values, so it travels as JSON."""

    stage: Mapping[str, Any]
    run: str
    data_directory: str
    fingerprint: str
    start: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Work:
    """An assignment with its parts built."""

    assignment: Assignment
    stage: StageSettings
    run: Run
    place: Place
    train_set: Dataset
    val_set: Dataset
    network: Network
    optimizer: torch.optim.Optimizer
    bad_samples: BadSampleMeter

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


def train_worker(config: dict[str, Any]) -> None:
    """Train one stage as one of its workers (`train_loop_per_worker` of Ray Train)."""
    work = _build(Assignment(**config))
    own = _restore(work)
    start = own.step if own else 0
    if work.place.rank == 0:
        truncate_journal(work.run.journal, start)
    with _open_loader(work, start) as loader:
        meters = Meters(loader, work.stage.global_batch, work.place.device)
        if own:
            meters.go_on_from(own.state["meters"])
        train(_training(work, loader, meters, start))


def _open_loader(work: Work, start: int) -> TrainLoader:
    stage, place = work.stage, work.place
    return TrainLoader(
        dataset=work.train_set,
        task=stage.task,
        data=stage.data.train,
        seed=stage.seed,
        global_batch=stage.global_batch,
        slots=slots_of_rank(stage.global_batch, place.rank, place.world),
        num_classes=len(work.train_set.manifest.class_names),
        start_step=start,
        stop_step=work.steps,
        threads=stage.data.threads,
        prefetch=stage.data.prefetch,
        on_bad_sample=stage.data.on_bad_sample,
        mean_pixel=work.network.mean_pixel,
    )


def _training(work: Work, loader: TrainLoader, meters: Meters, start: int) -> Training:
    stage, place = work.stage, work.place
    loss = make_loss(stage, work.train_set.manifest, work.steps_per_epoch, place.device)
    learner = Learner(
        work.network, stage, place, loss, work.optimizer, meters, asked_to_stop=lambda: False
    )

    def update(step: int, batch: Batch, rate: float) -> None:
        work.bad_samples.add(step, batch.bad)
        learner.update(step, batch, rate)

    def validate() -> Metrics:
        with meters.paused():
            return evaluate(work.network, stage, work.val_set, place)

    def save(step: int, metrics: Metrics) -> None:
        learner.settle()
        with meters.paused():
            _save(work, meters, step, metrics)

    return Training(
        start=start,
        steps=work.steps,
        log_every=work.in_steps(stage.log_every),
        evaluate_every=work.in_steps(stage.evaluate.every),
        checkpoint_every=work.in_steps(stage.checkpoint.every),
        batches=iter(loader),
        seed=lambda step: _seed_step(stage.seed, step, place.rank),
        schedule=make_schedule(
            stage.schedule, stage.optimizer.lr, work.steps, work.steps_per_epoch
        ),
        update=update,
        read_meters=lambda: meters.read() | work.bad_samples.read(),
        evaluate=validate,
        log=partial(_log, work),
        save=save,
        must_stop=lambda: learner.must_stop,
    )


def _build(assignment: Assignment) -> Work:
    stage = StageSettings.model_validate(assignment.stage)
    place = find_place(stage.cluster.gpus_per_worker, stage.precision)
    data, cache = assignment.data_directory, stage.data.cache
    train_set = open_dataset(data, stage.data.train.dataset, stage.data.train.split, cache)
    torch.manual_seed(stage.seed)
    network = build_network(stage.model, stage.task, len(train_set.manifest.class_names))
    if stage.model.batch_norm.sync:
        synchronize_batch_norm(network)
    # The layout of the loader's batches; quicker on the CPU too (docs/log.md).
    network.to(device=place.device).to(memory_format=torch.channels_last)
    groups = decay_groups(network, stage.optimizer.weight_decay)
    steps_per_epoch = train_set.num_samples // stage.global_batch
    return Work(
        assignment=assignment,
        stage=stage,
        run=Run(Path(assignment.run)),
        place=place,
        train_set=train_set,
        val_set=open_dataset(data, stage.data.val.dataset, stage.data.val.split, cache),
        network=network,
        optimizer=make_optimizer(stage.optimizer, groups),
        bad_samples=BadSampleMeter(stage.data, train_set, steps_per_epoch, place),
    )


def _restore(work: Work) -> Checkpoint | None:
    """Load the run's own newest valid checkpoint, or else start_from, or else nothing."""
    own = newest_checkpoint(work.run.checkpoints)
    if own is not None:
        work.network.load_state_dict(own.weights())
        work.optimizer.load_state_dict(own.optimizer())
        work.bad_samples.go_on_from(own.state.get("bad_samples", 0))
        log.info("goes on from %s", own.path)
        return own
    start = work.assignment.start
    if start is not None:
        source = Start.from_json(start)
        plan = apply_hand_over(work.network, source, work.train_set.manifest.class_names)
        log.info("starts from %s: %s", source.place, plan.report())
    return None


def _seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step, so that no generator state has to be saved."""
    torch.manual_seed(int(digest([seed, step, rank])[:15], 16))


def _log(work: Work, step: int, metrics: Metrics) -> None:
    if work.place.rank == 0:
        append_journal(work.run.journal, {"step": step, "time": time.time(), "metrics": metrics})


def _save(work: Work, meters: Meters, step: int, metrics: Metrics) -> None:
    """Checkpoint from the first worker; reporting to Ray Train makes the others wait for it."""
    work.bad_samples.read()
    if work.place.rank == 0:
        weights = {name: tensor.cpu() for name, tensor in work.network.state_dict().items()}
        state = _state(work, step, metrics) | {"meters": meters.state()}
        save_checkpoint(work.run.checkpoints, weights, work.optimizer.state_dict(), state)
        prune_checkpoints(work.run.checkpoints, work.stage.checkpoint.keep)
    ray.train.report({"step": step, **metrics})


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
        "mlflow_run_id": (read_json(work.run.tracking) or {}).get("run_id"),
        "versions": versions(),
        "time": time.time(),
    }
