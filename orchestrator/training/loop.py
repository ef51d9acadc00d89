"""The train loop of every stage: the order of events, nothing else.

Stages differ by the values in `Training`. Nothing here knows ranks, Ray or MLflow.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_pipeline.loader import Batch
from orchestrator.job.duration import is_time
from orchestrator.runs.record import Metrics
from orchestrator.training.optimizer import Schedule


@dataclass(frozen=True, kw_only=True)
class Training:
    """Everything the loop needs; all durations in steps."""

    start: int
    steps: int
    log_every: int
    evaluate_every: int
    checkpoint_every: int
    batches: Iterator[Batch | None]  # None: the step is passed over (rollback)
    seed: Callable[[int], None]  # random state of a step: dropout repeats after a restart
    schedule: Schedule
    update: Callable[[int, Batch, float], None]  # one optimizer step on one batch, at a rate
    read_meters: Callable[[], Metrics]  # training metrics since the last reading
    evaluate: Callable[[], Metrics]
    log: Callable[[int, Metrics], None]
    save: Callable[[int, Metrics], None]  # with the evaluation after this very step, or {}
    must_save: Callable[[], bool]  # the same on every worker; true once for each demand
    must_stop: Callable[[], bool]  # the same on every worker


def train(run: Training) -> None:
    """Train from step `start` to `steps`, or until it must stop."""
    for step in range(run.start, run.steps):
        batch = next(run.batches)
        if batch is not None:
            run.seed(step)
            run.update(step, batch, run.schedule(step))

        done = step + 1
        record: Metrics = {}
        if batch is not None and is_time(done, run.log_every, run.steps):
            record |= run.read_meters() | {"train/lr": run.schedule(step)}
        evaluation: Metrics = {}
        if is_time(done, run.evaluate_every, run.steps):
            evaluation = run.evaluate()
            record |= evaluation
        if record:
            run.log(done, record)
        stop = run.must_stop()
        if run.must_save() or is_time(done, run.checkpoint_every, run.steps):
            run.save(done, evaluation)
        if stop:
            return
