"""Run a sweep: the stages that its trials share, then the trials."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from orchestrator.bucket import storage_path
from orchestrator.errors import RunError, StageFailed
from orchestrator.files import digest
from orchestrator.job.config import PipelineJob
from orchestrator.job.space import with_values
from orchestrator.job.sweep import SweepJob
from orchestrator.launch import cluster
from orchestrator.launch.pipeline import prepare_datasets, run_job, stage_values
from orchestrator.launch.report import Display
from orchestrator.launch.stage import plan_stage
from orchestrator.runs.bill import add_bills, read_bill
from orchestrator.runs.checkpoint import Checkpoint
from orchestrator.runs.run import Run
from orchestrator.runs.stop import Interrupted, Signals
from orchestrator.runs.tracking import Tracker, is_tracked
from orchestrator.sweep import decisions
from orchestrator.sweep.decisions import Entry
from orchestrator.sweep.engine import Engine
from orchestrator.sweep.report import write_results
from orchestrator.sweep.results import Trial, fold
from orchestrator.sweep.table import SweepDisplay


def run_sweep(
    job: SweepJob,
    console: Console,
    signals: Signals,
    *,
    force: bool = False,
    overrides: Sequence[str] = (),
) -> Run:
    """Run a sweep to its end; what was decided and trained before is found and not done again.

    With `force` its decisions are made again, and the earlier ones set aside. `overrides` are those
    that made the job of its file.

    Raises:
        StageFailed: a shared stage failed, or all trials.
        Interrupted: a signal came; the trials wrote a checkpoint and stopped.
        JobStopped: somebody stopped a shared stage.
        DataError, CheckpointError, RunError: something is not as the job needs it.
    """
    storage = storage_path(job.storage)
    storage.mkdir(parents=True, exist_ok=True)
    sweep = Run(storage / "sweeps" / f"{job.name}-{identity(job)[:12]}")
    if force and sweep.read():
        sweep.set_aside()
    with sweep.lock():
        sweep.update(
            name=job.name,
            fingerprint=identity(job),
            status="running",
            reason=None,
            created=sweep.read().get("created", time.time()),
            job=job.model_dump(mode="json"),
            overrides=list(overrides),
        )
        tracker = Tracker(storage, sweep)
        status, reason = "stopped", None
        try:
            with Display(console) as display:
                results = _run_shared(job, display, signals, overrides)
            _run_trials(job, sweep, results, (console, signals, tracker, overrides))
            status = "finished"
        except Interrupted as signal:
            reason = str(signal)
            raise
        except Exception as error:
            status, reason = "failed", str(error)
            raise
        finally:
            write_results(sweep, job)
            sweep.update(status=status, reason=reason, bill=_bill(sweep, storage))
            tracker.close()
    return sweep


def identity(job: SweepJob) -> str:
    """Digest of what a sweep decides; with a larger budget, for instance, it is the same one."""
    fields = {"space", "search", "scheduler", "objective"}
    return digest(
        [
            job.name,
            stage_values(job.stages),
            job.tuned.name,
            job.model_dump(mode="json", include=fields),
        ]
    )


def _run_shared(
    job: SweepJob, display: Display, signals: Signals, overrides: Sequence[str]
) -> dict[str, Checkpoint]:
    """The last checkpoint of each stage but the tuned one."""
    prepare_datasets(job, display)
    if not job.earlier:
        return {}
    shared = PipelineJob(
        kind="pipeline",
        name=job.name,
        storage=job.storage,
        data_root=job.data_root,
        stages=job.earlier,
    )
    results = run_job(shared, display, signals, overrides=overrides)
    return {result.name: result.checkpoint for result in results}


_Surroundings = tuple[Console, Signals, Tracker, Sequence[str]]


def _run_trials(
    job: SweepJob, sweep: Run, results: dict[str, Checkpoint], surroundings: _Surroundings
) -> None:
    console, signals, tracker, overrides = surroundings
    with SweepDisplay(console, job, job.num_trials) as display:
        for entry in decisions.read(sweep.path):
            display.take(entry, told=True)
        engine = Engine(job, sweep.path, results, display.take, overrides)
        trackers = _Trackers(engine, sweep, tracker)
        trackers.catch_up()
        if engine.has_work():
            check_inputs(job, results, engine.entries)
            from orchestrator.sweep.executor import Executor

            def tick() -> None:
                trackers.update()
                display.update()

            connection = cluster.connect(hang_after=job.tuned.cluster.hang_after)
            signals.patient = True
            try:
                Executor(job, engine, signals, connection, tick).run(sweep.path / "ray")
            finally:
                signals.patient = False
                trackers.close()
    if signals.received and engine.has_work():
        raise Interrupted(signals.received)
    check_result(job, engine.entries)


def check_inputs(
    job: SweepJob, results: Mapping[str, Checkpoint], entries: Sequence[Entry]
) -> None:
    """Make sure that trials to come can be compared with those there are.

    Raises:
        RunError: the data, or the weights they start from, are no longer the same.
    """
    first = next((entry for entry in entries if entry["kind"] == "start"), None)
    if first is None:
        return
    trial = first["trial"]
    values = next(e["values"] for e in entries if e["kind"] == "suggest" and e["trial"] == trial)
    stage = with_values(job.tuned, values)
    planned = plan_stage(stage, storage_path(job.storage), job.data_directory, results)
    if planned.fingerprint != first["fingerprint"]:
        raise RunError(
            f"{job.name}: the data, or the weights that its trials start from, have changed since "
            "it began: put them back, or begin it anew with --force"
        )


def check_result(job: SweepJob, entries: Sequence[Entry]) -> None:
    """Make sure that a sweep which is over has a trial with a result.

    Raises:
        StageFailed: it has none; says why, each reason once, and how to begin anew.
    """
    trials = fold(entries)
    if any(t.state in ("finished", "stopped") and t.scores(job.objectives) for t in trials):
        return
    reasons: dict[str, list[Trial]] = {}
    for trial in trials:
        why = trial.why.split("all of it: ")[0]  # which each has in its own run
        reasons.setdefault(f"{trial.state}: {why}", []).append(trial)
    told = [
        f"trial {first.number} is {first.state}: {first.why}"
        + (f" (so are {len(others)} more)" if others else "")
        for first, *others in reasons.values()
    ]
    raise StageFailed(
        f"{job.name}: none of {len(trials)} trials came to a result, and none is tried again; when "
        "their cause is removed, begin anew with --force\n" + "\n".join(told[:8])
    )


def _bill(sweep: Run, storage: Path) -> dict[str, object]:
    starts = [entry for entry in decisions.read(sweep.path) if entry["kind"] == "start"]
    runs = sorted({entry["run"] for entry in starts})
    return add_bills([read_bill(Run(storage / run)) for run in runs]).as_record()


class _Trackers:
    """Mirrors the runs of trials to MLflow, below the sweep's own."""

    def __init__(self, engine: Engine, sweep: Run, parent: Tracker) -> None:
        self._engine, self._parent = engine, parent
        self._storage = sweep.path.parents[1]
        self._open: dict[Path, Tracker] = {}

    def catch_up(self) -> None:
        """Send what an earlier command did not of the trials that had ended."""
        for entry in self._engine.entries:
            run = Run(self._storage / entry["run"]) if entry["kind"] == "start" else None
            if run and run.read().get("status", "running") != "running" and not is_tracked(run):
                Tracker(self._storage, run, self._parent).close()

    def update(self) -> None:
        """Begin with those that have begun, and leave those that have ended."""
        runs = [self._engine.run_of(trial) for trial in self._engine.running]
        for run in runs:
            if run.path not in self._open and run.read():
                self._open[run.path] = Tracker(self._storage, run, self._parent)
        for path in set(self._open) - {run.path for run in runs}:
            self._open.pop(path).close()

    def close(self) -> None:
        """Send the rest of all."""
        while self._open:
            self._open.popitem()[1].close()
