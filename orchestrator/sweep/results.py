"""What a sweep came to: its trials, told by its decisions alone, and which of them are best."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from orchestrator.job.sweep import Objective

ENDED = ("finished", "stopped", "nan", "failed", "invalid")
_ORDER = ("finished", "stopped", "running", "paused", "waiting", "nan", "failed", "invalid")


@dataclass(kw_only=True)
class Trial:
    """One trial of a sweep."""

    number: int
    values: dict[str, Any] = field(default_factory=dict)  # field of the tuned stage -> value
    state: str = "waiting"
    run: str | None = None  # its directory, below the storage
    steps: int = 0  # its length
    step: int = 0  # of its last result
    metrics: dict[str, float] = field(default_factory=dict)  # of its last result
    why: str = ""  # it was stopped, or failed
    copied_from: int | None = None  # the trial whose weights it went on with

    def take(self, entry: Mapping[str, Any]) -> None:
        """Add what a decision says of this trial."""
        kind = entry["kind"]
        if kind == "suggest":
            self.values = dict(entry["values"])
        elif kind == "start":
            self.state, self.run, self.steps = "running", entry["run"], entry["steps"]
        elif kind == "result":
            self.step, self.metrics = entry["step"], dict(entry["metrics"])
        elif kind == "decide":
            self.why = entry.get("why", "")
            if entry["action"] == "exploit":
                self.values |= entry["values"]
                self.copied_from = entry["from"]
        elif kind == "end":
            self.state = entry["status"]
            self.metrics |= entry.get("metrics") or {}
            self.why = entry.get("error") or ("" if self.state == "finished" else self.why)

    def scores(self, objectives: Sequence[Objective]) -> tuple[float, ...] | None:
        """Its last value of each objective; None where one is missing or not finite."""
        values = tuple(self.metrics.get(one.metric, math.nan) for one in objectives)
        return values if all(map(math.isfinite, values)) else None


def fold(entries: Iterable[Mapping[str, Any]]) -> list[Trial]:
    """The trials that decisions tell of, by their numbers."""
    trials: dict[int, Trial] = {}
    for entry in entries:
        if "trial" in entry:
            number = entry["trial"]
            trials.setdefault(number, Trial(number=number)).take(entry)
    return [trials[number] for number in sorted(trials)]


def ranked(trials: Iterable[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """The best first: finished trials, then stopped ones, those that run, and those that failed.

    Of two objectives, trials that no other one beats in both come first.
    """
    trials = list(trials)
    best = {trial.number for trial in front(trials, objectives)}

    def key(trial: Trial) -> tuple[Any, ...]:
        costs = _costs(trial, objectives) or (math.inf,)
        return _ORDER.index(trial.state), trial.number not in best, costs, trial.number

    return sorted(trials, key=key)


def winner(trials: Iterable[Trial], objectives: Sequence[Objective]) -> Trial | None:
    """The best finished trial (by the first of two objectives); None where none finished."""
    first = next(iter(ranked(trials, objectives)), None)
    return first if first and first.state == "finished" and first.scores(objectives) else None


def front(trials: Iterable[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """Finished trials that no other one beats: as good in all objectives and better in one."""
    costs = {
        trial.number: (trial, cost)
        for trial in trials
        if trial.state == "finished" and (cost := _costs(trial, objectives))
    }
    return [
        trial
        for trial, own in costs.values()
        if not any(
            other != own and all(a <= b for a, b in zip(other, own, strict=True))
            for _, other in costs.values()
        )
    ]


def _costs(trial: Trial, objectives: Sequence[Objective]) -> tuple[float, ...] | None:
    """Its scores, so turned that smaller is better."""
    scores = trial.scores(objectives)
    return scores and tuple(
        -score if one.mode == "max" else score
        for score, one in zip(scores, objectives, strict=True)
    )


def as_values(values: Mapping[str, Any]) -> str:
    """Such as `optimizer.lr=0.01, model.output_stride=16`."""
    return ", ".join(f"{name}={brief(value)}" for name, value in values.items())


def as_scores(trial: Trial, objectives: Sequence[Objective]) -> str:
    """Such as `val/miou 0.4321`; empty before the first result."""
    known = [one.metric for one in objectives if one.metric in trial.metrics]
    return ", ".join(f"{metric} {brief(trial.metrics[metric])}" for metric in known)


def brief(value: Any) -> str:
    """A value of a job file in a few characters; `-` for None."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict | list):
        return yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return "-" if value is None else str(value)
