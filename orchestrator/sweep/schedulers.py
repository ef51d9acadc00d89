"""What becomes of a trial at a result: a function of the job file and of the decisions so far."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from orchestrator.job.space import Domain
from orchestrator.job.sweep import Asha, Median, Pbt, SweepJob
from orchestrator.sweep.decisions import Entry
from orchestrator.sweep.results import fold
from orchestrator.sweep.searchers import draw, seed_of


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of a trial; `exploit` goes on from a copy of trial `source` with `values`."""

    action: str = "continue"
    why: str = ""
    source: int | None = None
    values: Mapping[str, Any] = field(default_factory=dict)

    def as_entry(self, trial: int, step: int) -> Entry:
        """The decision's line in the log."""
        entry = {"kind": "decide", "trial": trial, "step": step, "action": self.action}
        if self.source is not None:
            entry |= {"from": self.source, "values": dict(self.values)}
        return entry | {"why": self.why}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A result: how far the trial was, as a share of its steps, and its score (more is better)."""

    share: float
    score: float


Curves = Mapping[int, Sequence[Point]]


def curves(job: SweepJob, entries: Sequence[Entry]) -> Curves:
    """The results of each trial in the first objective; what is not finite is worst."""
    first = job.objectives[0]
    steps: dict[int, int] = {}
    found: dict[int, list[Point]] = {}
    for entry in entries:
        if entry["kind"] == "start":
            steps[entry["trial"]] = entry["steps"]
        elif entry["kind"] == "result":
            value = entry["metrics"][first.metric]
            score = value if first.mode == "max" else -value
            point = Point(
                share=entry["step"] / steps[entry["trial"]],
                score=score if math.isfinite(score) else -math.inf,
            )
            found.setdefault(entry["trial"], []).append(point)
    return found


def decide(job: SweepJob, entries: Sequence[Entry]) -> Decision:
    """What becomes of the trial whose result is the last entry; PBT decides by generation."""
    trial, found = entries[-1]["trial"], curves(job, entries)
    if not math.isfinite(found[trial][-1].score):
        return Decision(action="stop", why=f"{job.objectives[0].metric} is not finite")
    if found[trial][-1].share >= 1:
        return Decision()
    if isinstance(job.scheduler, Asha):
        return _asha(job.scheduler, found, trial)
    if isinstance(job.scheduler, Median):
        return _median(job.scheduler, found, trial)
    return Decision()


def _asha(settings: Asha, found: Curves, trial: int) -> Decision:
    """Stop below the best 1/reduction of those that reached the rung so far."""
    *before, now = found[trial]
    reached, rung = before[-1].share if before else 0.0, settings.grace
    while rung < 1 and rung <= now.share:
        if rung > reached:
            scores = [p.score for points in found.values() if (p := _first_at(points, rung))]
            keep = max(1, int(len(scores) / settings.reduction))
            if now.score < sorted(scores, reverse=True)[keep - 1]:
                why = f"rung {rung:.0%}: not of the best {keep} of {len(scores)}"
                return Decision(action="stop", why=why)
        rung *= settings.reduction
    return Decision()


def _first_at(points: Sequence[Point], share: float) -> Point | None:
    return next((point for point in points if point.share >= share), None)


def _median(settings: Median, found: Curves, trial: int) -> Decision:
    """Stop where the best so far is below the median of the others' means up to here."""
    now = found[trial][-1]
    if now.share < settings.grace:
        return Decision()
    means = [
        math.fsum(scores) / len(scores)
        for other, points in found.items()
        if other != trial and points[-1].share >= now.share
        if (scores := [point.score for point in points if point.share <= now.share])
    ]
    best = max(point.score for point in found[trial])
    if len(means) >= settings.min_trials and best < median(means):
        why = f"at {now.share:.0%}: below the median of {len(means)} trials"
        return Decision(action="stop", why=why)
    return Decision()


def boundary(pbt: Pbt, step: int, steps: int, evaluate_every: int) -> int | None:
    """The step after `step` at which a generation ends, with an evaluation; None: with the run."""
    generation = 0
    while True:
        generation += 1
        periods = math.ceil(round(generation * pbt.every * steps / evaluate_every, 9))
        end = periods * evaluate_every
        if end >= steps:
            return None
        if end > step:
            return end


def next_generation(job: SweepJob, entries: Sequence[Entry], alive: Sequence[int]) -> list[Entry]:
    """What becomes of all trials that have reached the end of a generation."""
    assert isinstance(job.scheduler, Pbt)
    pbt, found = job.scheduler, curves(job, entries)
    trials = {trial.number: trial for trial in fold(entries)}
    best_first = sorted(alive, key=lambda number: (-found[number][-1].score, number))
    count = max(1, int(pbt.quantile * len(alive))) if len(alive) > 1 else 0
    top, bottom = best_first[:count], best_first[len(alive) - count :]
    decided = []
    for number in alive:
        step, decision = trials[number].step, Decision()
        if number in bottom:
            rng = random.Random(seed_of(job.search.seed, "exploit", number, step))
            source = rng.choice(top)
            decision = Decision(
                action="exploit",
                why=f"of the last {count} of {len(alive)}",
                source=source,
                values=_explored(job, trials[source].values, rng),
            )
        decided.append(decision.as_entry(number, step))
    return decided


def _explored(job: SweepJob, values: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    assert isinstance(job.scheduler, Pbt)
    pbt = job.scheduler
    return {
        path: draw(job.space[path], rng)
        if rng.random() < pbt.resample
        else _perturbed(job.space[path], value, rng, pbt.factors)
        for path, value in values.items()
    }


def _perturbed(domain: Domain, value: Any, rng: random.Random, factors: Sequence[float]) -> Any:
    """A number times a factor, within its bounds; of values that can be counted, a neighbour."""
    if bounds := domain.uniform or domain.loguniform:
        return min(max(value * rng.choice(factors), bounds[0]), bounds[1])
    finite = domain.finite or ()
    index = finite.index(value) + rng.choice((-1, 1))
    return finite[min(max(index, 0), len(finite) - 1)]
