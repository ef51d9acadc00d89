"""A sweep from its directory alone: where it is, what it came to, and the files that say so."""

import difflib
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator.errors import RunError
from orchestrator.job.sweep import SweepJob
from orchestrator.runs.overview import Overview
from orchestrator.runs.run import Run
from orchestrator.sweep.best import write_job_file
from orchestrator.sweep.decisions import read
from orchestrator.sweep.plots import draw
from orchestrator.sweep.results import Trial, as_scores, brief, fold, front, ranked, winner
from orchestrator.sweep.table import trials_table

log = logging.getLogger(__name__)


def find_sweep(target: str, storage: Path) -> Run:
    """The newest sweep of a name, or the one of a directory or its name.

    Raises:
        RunError: there is none; names the nearest.
    """
    path = Path(target).expanduser().absolute()
    if (path / "run.json").exists():
        return Run(path)
    sweeps = [Run(path.parent) for path in (storage / "sweeps").glob("*/run.json")]
    found = [one for one in sweeps if target in (one.path.name, one.read().get("name"))]
    if found:
        return max(found, key=lambda one: one.read().get("created", 0))
    names = sorted({one.read().get("name", "") for one in sweeps})
    near = difflib.get_close_matches(target, names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RunError(
        f"{target!r}: no such sweep under {storage}; {hint}there: {', '.join(names) or 'none yet'}"
    )


def job_of(sweep: Run) -> SweepJob:
    """The job file of a sweep, as it was started."""
    return SweepJob.model_validate(sweep.read()["job"])


def write_results(sweep: Run, job: SweepJob) -> None:
    """Write best.yaml and the pictures into the sweep's directory, and the winner into its record.

    Call it before the sweep's status says that it has ended: its tracker then sends the artifacts.
    """
    trials = fold(read(sweep.path))
    best = winner(trials, job.objectives)
    folder = sweep.artifacts / "sweep"
    folder.mkdir(parents=True, exist_ok=True)
    if best is not None:
        write_best(sweep.path / "best.yaml", job, best, trials)
        write_best(folder / "best.yaml", job, best, trials)
    try:
        draw(trials, job, folder)
    except Exception as error:  # of libraries that draw: the sweep itself is whole
        log.warning("%s: its pictures are not drawn: %s", sweep.path, error)
    sweep.update(best=best and asdict(best))


def write_best(path: Path, job: SweepJob, trial: Trial, trials: Sequence[Trial]) -> None:
    """Write a trial's job file.

    Raises:
        RunError: the trial never ran.
    """
    place = 1 + ranked(trials, job.objectives).index(trial)
    about = [
        f"Trial {trial.number} of the sweep {job.name}, number {place} of {len(trials)}: "
        f"{as_scores(trial, job.objectives)}, with",
        *(f"    {name}: {brief(value)}" for name, value in trial.values.items()),
    ]
    if trial.copied_from is None:
        about.append(f"As it stands, atrous run finds that trained: {trial.run}")
    else:
        about.append("It had other values before, and weights of other trials: this trains anew.")
    write_job_file(path, job, trial, about)


def final_table(sweep: Run, job: SweepJob) -> list[Table | str]:
    """All trials, the best first, and where best.yaml and the pictures are."""
    trials = ranked(fold(read(sweep.path)), job.objectives)
    table = trials_table(trials, job)
    table.title = f"sweep {job.name} is {Overview(sweep).state}; {sweep.path}"
    written = [sweep.path / "best.yaml", *sorted((sweep.artifacts / "sweep").glob("*.png"))]
    lines = [f"written: {path}" for path in written if path.exists()]
    return [table, *(lines or ["no trial has finished"])]


def as_json(sweep: Run, job: SweepJob) -> dict[str, Any]:
    """A sweep for programs; trials are the best first."""
    trials = ranked(fold(read(sweep.path)), job.objectives)
    best = winner(trials, job.objectives)
    return {
        "sweep": sweep.path.name,
        "state": Overview(sweep).state,
        "objectives": [one.model_dump() for one in job.objectives],
        "trials": [asdict(trial) for trial in trials],
        "best": best and best.number,
        "front": [trial.number for trial in front(trials, job.objectives)],
    }
