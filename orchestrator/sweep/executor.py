"""Ray Tune as what gives the trials their places, starts lost ones again, and tells of them.

It decides nothing: its searcher hands out the engine's units, its scheduler hands the results to
the engine, and nothing of its own state is ever restored (docs/decisions). A unit's workers are
Ray Train's, which the trial starts as any stage does, and which report to Tune by Ray's own
callback; the trial itself takes no room but where it trains in its own process (`workers: 0`).
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from orchestrator.job.sections import Cluster
from orchestrator.job.sweep import SweepJob
from orchestrator.launch import cluster
from orchestrator.runs.liveness import last_beat
from orchestrator.runs.record import evaluated
from orchestrator.runs.run import Run
from orchestrator.runs.stop import Signals, ask_to_stop, asked_to_stop
from orchestrator.sweep.engine import Engine
from orchestrator.sweep.trial import TrialRun, Unit, train_unit

_TICK = 0.5  # seconds between looks at running trials
_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the sweep has its own
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the runs have journals
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the command has its own
    "TUNE_GLOBAL_CHECKPOINT_S": "31536000",  # its state is never read
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def _train_with_workers(config: dict[str, Any]) -> None:
    """A unit whose workers are Ray Train's: they report to Tune."""

    def begun(_: Run, step: int) -> None:
        tune.report({"step": step})

    unit = Unit(**json.loads(config["unit"]))
    tune.report(train_unit(unit, begun, [TuneReportCallback()]))


class _TrainHere(tune.Trainable):  # type: ignore[misc]
    """A unit in the trial's own process (`workers: 0`), which Ray Train refuses in a function."""

    def setup(self, config: Mapping[str, Any]) -> None:
        self._training = TrialRun(Unit(**json.loads(config["unit"])))

    def step(self) -> dict[str, Any]:
        told = self._training.next()
        return told | {"done": "outcome" in told}

    def cleanup(self) -> None:
        self._training.stop("the sweep let go of it")

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        self.setup(new_config)
        return True


class Executor:
    """Runs all units of an engine.

    Args:
        tick: called twice a second.
    """

    def __init__(
        self,
        job: SweepJob,
        engine: Engine,
        signals: Signals,
        connection: cluster.Connection,
        tick: Callable[[], None],
    ) -> None:
        self._job, self._engine, self._signals = job, engine, signals
        self._connection, self._tick = connection, tick
        self._controller: Any = None
        self._ticked = -math.inf
        self._outcomes: dict[int, Mapping[str, Any]] = {}
        self.error: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles all that it is given, and what it pickled is never read."""
        return {}

    def run(self, directory: Path) -> None:
        """Run until there is nothing more to do, or until a signal came and all trials stopped.

        Raises:
            RunError: a trial can never fit in this cluster.
            Exception: what befell the sweep itself; its trials were stopped.
        """
        stage = self._job.tuned
        self._connection.check_fits(stage.name, stage.cluster)
        os.environ.update(_SETTINGS)
        logging.getLogger("ray.tune").setLevel(logging.ERROR)  # warns that it has no results.json
        trainable = _train_with_workers if stage.cluster.min_workers else _TrainHere
        tuner = tune.Tuner(
            tune.with_resources(trainable, _room_of_trial(stage.cluster)),
            tune_config=tune.TuneConfig(
                num_samples=-1,
                search_alg=_Searcher(self),
                scheduler=_Scheduler(self),
                reuse_actors=not stage.cluster.min_workers,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name=f"attempt-{time.time_ns()}",
                storage_path=str(directory),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=stage.cluster.max_failures),
                callbacks=[_Ticker(self)],
                verbose=0,
            ),
        )
        tuner.fit()
        if self.error:
            raise self.error

    @property
    def _ends(self) -> str | None:
        """Why no new unit begins and those that run stop, to be given out again."""
        if self.error:
            return "the sweep failed"
        return self._signals.received.name if self._signals.received else None

    def guarded(self, action: Callable[[], Any]) -> Any:
        """Do something; an error ends the sweep, and not one trial only, as it would in Tune."""
        try:
            return action()
        except Exception as error:
            self.error = self.error or error
        return None

    def next_config(self) -> Any:
        """What Tune is to start now; None: nothing; FINISHED: nothing ever more."""
        running = len(self._engine.running)
        unit = None
        if not self._ends and running < self._most_at_once():
            unit = self.guarded(self._engine.next_unit)
        if unit is not None:
            return {"unit": json.dumps(asdict(unit))}
        return None if self._engine.running else Searcher.FINISHED

    def take(self, trial: Any, result: Mapping[str, Any]) -> None:
        """A result of Tune's; the workers' last one may come after the trial's outcome."""
        if "outcome" in result:
            self._outcomes[number_of(trial)] = result
        else:
            news = number_of(trial), result["step"], evaluated(result)
            self.guarded(lambda: self._engine.take(*news))

    def ended(self, number: int, result: Mapping[str, Any] | None, error: str) -> None:
        """A unit is at its end; without an outcome it never began, or its process always died."""
        told = self._outcomes.pop(number, result or {})
        outcome = told.get("outcome", "failed" if error else "interrupted")
        if outcome == "stopped" and self._ends:
            outcome = "interrupted"
        error = error or told.get("error", "")
        self.guarded(lambda: self._engine.ended(number, outcome, error))

    def tick(self, trials: list[Any]) -> None:
        """Look at the trials that run."""
        if time.monotonic() - self._ticked < _TICK:
            return
        self._ticked = time.monotonic()
        self.guarded(self._tick)
        if spent := self.guarded(self._engine.spent):
            self.guarded(lambda: self._engine.stop_running(spent))
        for trial in trials:
            if not trial.is_finished() and number_of(trial) in self._engine.running:
                self.guarded(partial(self._stop_if_due, trial))

    def _stop_if_due(self, trial: Any) -> None:
        number = number_of(trial)
        why = self._engine.stops(number) or self._ends
        if not why:
            return
        run = self._engine.run_of(number)
        if trial.status == "PENDING" or (
            self._job.tuned.cluster.max_workers and not last_beat(run)
        ):
            self._controller.request_stop_trial(trial)  # nobody is there who could hear it
        elif not asked_to_stop(run):
            ask_to_stop(run, why)

    def _most_at_once(self) -> int:
        wanted, most = self._job.max_concurrent, self._room()
        if wanted == "auto":
            return most
        return min(wanted, most) if self._connection.ours else wanted

    def _room(self) -> int:
        """For how many trials the cluster, as it is now, has room."""
        settings, total = self._job.tuned.cluster, self._connection.total
        workers = max(1, settings.min_workers)
        cpus, gpus = workers * settings.cpus_per_worker, workers * settings.gpus_per_worker
        return max(1, int(min(total.cpus / cpus, total.gpus / gpus if gpus else math.inf)))


def number_of(trial: Any) -> int:
    """The sweep's trial that a trial of Tune's is a unit of."""
    return int(json.loads(trial.config["unit"])["trial"])


def _name(trial: Any) -> str:
    return f"trial-{number_of(trial):04d}-{trial.trial_id}"


def _room_of_trial(settings: Cluster) -> dict[str, float]:
    """What the trial's own process takes; workers of Ray Train ask for their own."""
    if settings.min_workers:
        return {"memory": 1}  # a byte: Tune refuses a trial that takes nothing
    return {"cpu": settings.cpus_per_worker, "gpu": settings.gpus_per_worker}


class _Searcher(Searcher):  # type: ignore[misc]
    """Hands out the engine's units."""

    def __init__(self, executor: Executor) -> None:
        super().__init__()
        self._executor = executor
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        config = self._executor.next_config()
        if isinstance(config, dict):
            self._numbers[trial_id] = json.loads(config["unit"])["trial"]
        return config

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        why = "its process died, each time it was started" if error else ""
        self._executor.ended(self._numbers[trial_id], result, why)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the decision log has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the decision log has it."""


class _Scheduler(FIFOScheduler):  # type: ignore[misc]
    """Hands results to the engine; trials stop by themselves, when their run is asked to."""

    def __init__(self, executor: Executor) -> None:
        super().__init__()
        self._executor = executor

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._executor._controller = tune_controller

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        self._executor.take(trial, result)
        return TrialScheduler.CONTINUE


class _Ticker(tune.Callback):  # type: ignore[misc]
    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._executor.tick(trials)
