"""Budget and deadline: whether a job has taken all that it may, and whether it will."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from orchestrator.job.config import Job, PipelineJob, StageSettings
from orchestrator.job.sections import Limits
from orchestrator.launch.machine import Finding
from orchestrator.runs.bill import Bill, add_bills

if TYPE_CHECKING:
    from orchestrator.launch.preflight import Report


def limit_reached(limits: Limits, bills: Sequence[Bill]) -> str | None:
    """The limit that is reached, in words; None: there is still room.

    `bills` are of all runs that the limits are for, earlier commands included.
    """
    bill = add_bills(bills)
    if limits.deadline is not None and datetime.now(UTC) >= limits.deadline:
        return f"deadline: {limits.deadline.isoformat()} has come"
    if limits.max_hours is not None and bill.hours >= limits.max_hours:
        return f"max_hours: {bill.hours:.3g} of {limits.max_hours:g} hours are used"
    if limits.max_cost is not None and (bill.money or 0) >= limits.max_cost:
        return f"max_cost: {bill.money:.2f} of {limits.max_cost:g} are spent"
    return None


def limit_findings(job: Job, report: "Report") -> list[Finding]:
    """Limits of the job, and of stages in it, that the forecast exceeds."""
    return [
        Finding("warning", where, f"{text}; it will stop there, and go on with a larger limit")
        for where, text, fits in _compare(job, report)
        if not fits
    ]


def limit_lines(job: Job, report: "Report") -> list[str]:
    """Limits that the forecast keeps to."""
    return [f"{where}: {text}" for where, text, fits in _compare(job, report) if fits]


def _compare(job: Job, report: "Report") -> Iterator[tuple[str, str, bool]]:
    """(of what, limit beside forecast, whether it is kept to)."""
    yield from _compare_one(job.name, job, job.stages, report)
    for stage in job.stages if isinstance(job, PipelineJob) else ():
        yield from _compare_one(stage.name, stage, (stage,), report)


def _compare_one(
    where: str, limits: Limits, stages: Sequence[StageSettings], report: "Report"
) -> Iterator[tuple[str, str, bool]]:
    names = {stage.name for stage in stages}
    spent = add_bills([bill for name, bill in report.bills.items() if name in names])
    about = "at least" if names & report.unknown.keys() else "about"
    names -= set(report.done)
    to_run = [one for one in report.forecasts if one.stage in names]
    known = {one.stage: report.bills.get(one.stage, add_bills(())) for one in to_run}
    left = _longest(stages, {one.stage: one.hours - known[one.stage].hours for one in to_run})
    if limits.max_hours is not None:
        hours = spent.hours + left
        text = f"max_hours: {about} {hours:.1f} of {limits.max_hours:g}, branches side by side"
        yield where, text, hours <= limits.max_hours
    if limits.max_cost is not None:
        more = [(one.money or 0) - (known[one.stage].money or 0) for one in to_run]
        money = (spent.money or 0) + sum(max(0.0, one) for one in more)
        text = f"max_cost: {about} {money:.2f} of {limits.max_cost:g}"
        yield where, text, money <= limits.max_cost
    if limits.deadline is not None:
        end = datetime.now(UTC) + timedelta(hours=left)
        by, until = (when.isoformat(" ", "minutes") for when in (end, limits.deadline))
        yield where, f"deadline: {until}; done {about} at {by}", end <= limits.deadline


def _longest(stages: Sequence[StageSettings], left: dict[str, float]) -> float:
    """Hours of the longest chain of stages: what it takes where there is room for all."""
    until: dict[str, float] = {}

    def hours(stage: StageSettings) -> float:
        before = stage.start_from.checkpoint if stage.start_from else None
        earlier = next((s for s in stages if s.name == before and s is not stage), None)
        if stage.name not in until:
            start = hours(earlier) if earlier else 0.0
            until[stage.name] = start + max(0.0, left.get(stage.name, 0.0))
        return until[stage.name]

    return max(hours(stage) for stage in stages)
