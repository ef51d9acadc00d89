"""What the trials of a sweep will take: at most, since schedulers stop some of them."""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from pydantic import ValidationError

from orchestrator.errors import AtrousError
from orchestrator.job.config import Job, StageSettings
from orchestrator.job.duration import to_steps
from orchestrator.job.space import with_values
from orchestrator.job.sweep import SweepJob
from orchestrator.launch.forecast import Data, Device, Forecast, forecast
from orchestrator.launch.stage import build_on_meta
from orchestrator.runs.run import Run

if TYPE_CHECKING:
    from orchestrator.launch.preflight import Report

_FOR_TIME = ("model", "data", "global_batch", "steps", "epochs", "evaluate")  # what costs hours


def dearest(
    job: SweepJob, data: Data, device: Device, runs: Sequence[Run]
) -> tuple[StageSettings, Forecast]:
    """The trial that takes longest, found field by field, and its forecast."""

    def forecast_of(stage: StageSettings) -> Forecast:
        steps = to_steps(stage.duration, data.train // stage.global_batch)
        network = build_on_meta(stage, len(data.class_names))
        return forecast(stage, network, data, steps, device, runs)

    best = job.tuned, forecast_of(job.tuned)
    for path, domain in job.space.items():
        if path.split(".")[0] in _FOR_TIME:
            for value in domain.samples():
                with suppress(ValidationError, AtrousError):  # an invalid trial takes nothing
                    stage = with_values(best[0], {path: value})
                    best = max(best, (stage, forecast_of(stage)), key=lambda one: one[1].hours)
    return best


def most_trials(job: SweepJob) -> int | None:
    """How many trials there will be at most; None where only hours or money end the sweep."""
    if job.num_trials is not None or job.search.name != "grid":
        return job.num_trials
    return math.prod(len(domain.finite or ()) for domain in job.space.values())


def trial_lines(job: Job, report: "Report") -> Iterator[str]:
    """Number of trials, and what they take at most."""
    if not isinstance(job, SweepJob):
        return
    found = next((one for one in report.forecasts if one.stage == job.tuned.name), None)
    count, budget = most_trials(job), job.budget
    parts = [f"{count or 'any number of'} trials" if count != 1 else "1 trial"]
    if found and count:
        parts.append(f"each at most {found.hours:.2g} hours, together {count * found.hours:.3g}")
        if found.gpu_hours:
            parts.append(f"{count * found.gpu_hours:.3g} GPU-hours")
        if found.money is not None:
            parts.append(f"{count * found.money:.2f} to pay")
        parts.append(f"and {count * found.checkpoint / 2**30:.2g} GiB of last checkpoints")
    limits = [
        f"{value:g} {name}"
        for name, value in (("GPU-hours", budget.gpu_hours), ("to pay", budget.cost))
        if value is not None
    ]
    if limits:
        parts.append(f"but no more than the budget's {' and '.join(limits)}")
    yield f"{job.tuned.name}: {', '.join(parts)}."
