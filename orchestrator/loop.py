"""The train loop of every stage: the order of events, nothing else.

Stages differ by the values in `Training`. Nothing here knows ranks, Ray or MLflow.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from data_pipeline.loader import Batch
from orchestrator.duration import is_time
from orchestrator.optimizer import Schedule

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Training:
    """Everything the loop needs; all durations in steps."""

    start: int
    steps: int
    log_every: int
    evaluate_every: int
    checkpoint_every: int
    batches: Iterator[Batch]
    seed: Callable[[int], None]  # random state of a step: dropout repeats after a restart
    schedule: Schedule
    optimizer: torch.optim.Optimizer
    backward: Callable[[int, Batch], None]  # forward and backward of one step's batch
    read_meters: Callable[[], Metrics]  # training metrics since the last reading
    evaluate: Callable[[], Metrics]
    log: Callable[[int, Metrics], None]
    save: Callable[[int, Metrics], None]


def train(run: Training) -> None:
    """Train from step `start` to `steps`.

    The meters are read whenever a checkpoint is due, so that a run that goes on from one logs the
    same numbers as a run that was never stopped.
    """
    evaluation: Metrics = {}
    for step in range(run.start, run.steps):
        run.seed(step)
        for group in run.optimizer.param_groups:
            group["lr"] = run.schedule(step)
        run.backward(step, next(run.batches))
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)

        done = step + 1
        record: Metrics = {}
        checkpoint_due = is_time(done, run.checkpoint_every, run.steps)
        if checkpoint_due or is_time(done, run.log_every, run.steps):
            record |= run.read_meters() | {"train/lr": run.schedule(step)}
        if is_time(done, run.evaluate_every, run.steps):
            evaluation = run.evaluate()
            record |= evaluation
        if record:
            run.log(done, record)
        if checkpoint_due:
            run.save(done, evaluation)
