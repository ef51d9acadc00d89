"""The values of the next trial: a function of the job file and of the decisions so far."""

import math
import random
from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from orchestrator.files import digest
from orchestrator.job.space import Domain, Space, in_order
from orchestrator.job.sweep import Objective, SweepJob
from orchestrator.sweep.decisions import Entry
from orchestrator.sweep.results import Trial, fold

if TYPE_CHECKING:
    import optuna

_TRIES = 50  # draws of values that no trial had yet, before the space counts as exhausted


def suggest(job: SweepJob, entries: Sequence[Entry]) -> dict[str, Any] | None:
    """Values that no trial had yet; None where there are no more.

    They depend on the number of the trial, on the results and on the search's seed alone.
    """
    earlier = fold(entries)
    if job.search.name == "grid":
        return next((v for i, v in enumerate(_grid(job.space)) if i == len(earlier)), None)
    for attempt in range(_TRIES):
        seed = seed_of(job.search.seed, len(earlier), attempt)
        if job.search.name == "random":
            values = _draw_all(job.space, random.Random(seed))
        else:
            values = _ask_optuna(job, earlier, seed)
        if all(values != trial.values for trial in earlier):
            return values
    return None


def seed_of(*parts: Any) -> int:
    """A seed of its own for each draw, so that no generator's state has to be kept."""
    return int(digest(list(parts))[:8], 16)


def draw(domain: Domain, rng: random.Random) -> Any:
    """A value, each as likely as the others."""
    if domain.uniform:
        return rng.uniform(*domain.uniform)
    if bounds := domain.loguniform or domain.lograndint:
        low, high = bounds[0], bounds[1] + (1 if domain.lograndint else 0)
        value = math.exp(rng.uniform(math.log(low), math.log(high)))
        value = min(max(value, bounds[0]), bounds[1])
        return int(value) if domain.lograndint else value
    return rng.choice(domain.finite or ())


def _draw_all(space: Space, rng: random.Random) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for path in in_order(space):
        value = draw(space[path], rng)
        if space[path].is_active(values):
            values[path] = value
    return values


def _grid(space: Space) -> Iterator[dict[str, Any]]:
    """All combinations, the last field changing fastest; each once, whatever is not tuned in it."""
    names, seen = in_order(space), list[dict[str, Any]]()
    for combination in product(*(space[name].finite or () for name in names)):
        values: dict[str, Any] = {}
        for name, value in zip(names, combination, strict=True):
            if space[name].is_active(values):
                values[name] = value
        if values not in seen:
            seen.append(values)
            yield values


def _ask_optuna(job: SweepJob, earlier: Sequence[Trial], seed: int) -> dict[str, Any]:
    """A suggestion of TPE, which is told all earlier trials anew each time."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=job.search.startup),
        directions=["maximize" if one.mode == "max" else "minimize" for one in job.objectives],
    )
    study.add_trials([_as_optuna(job, trial, earlier) for trial in earlier])
    asked = study.ask()
    values: dict[str, Any] = {}
    for path in in_order(job.space):
        domain = job.space[path]
        if domain.is_active(values):
            values[path] = _decode(domain, _ask(asked, path, _distribution(domain)))
    return values


def _ask(
    asked: "optuna.Trial", path: str, distribution: "optuna.distributions.BaseDistribution"
) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, FloatDistribution):
        low, high = distribution.low, distribution.high
        return asked.suggest_float(path, low, high, log=distribution.log)
    if isinstance(distribution, IntDistribution):
        low, high = distribution.low, distribution.high
        return asked.suggest_int(path, low, high, log=distribution.log)
    assert isinstance(distribution, CategoricalDistribution)
    return asked.suggest_categorical(path, distribution.choices)


def _as_optuna(job: SweepJob, trial: Trial, earlier: Sequence[Trial]) -> "optuna.trial.FrozenTrial":
    """A trial as Optuna knows them; what failed, or was refused, is as bad as the worst."""
    from optuna.trial import TrialState, create_trial

    scores = trial.scores(job.objectives)
    state, values, steps = TrialState.RUNNING, None, {}
    if trial.state in ("nan", "failed", "invalid"):
        state, values = TrialState.COMPLETE, _worst(earlier, job.objectives)
    elif scores and trial.state == "stopped" and len(scores) == 1:
        state, steps = TrialState.PRUNED, {trial.step: scores[0]}
    elif trial.state in ("finished", "stopped"):
        state, values = TrialState.COMPLETE, list(scores or _worst(earlier, job.objectives))
    tuned = {path: job.space[path] for path in trial.values}
    return create_trial(
        state=state,
        values=values,
        params={path: _encode(domain, trial.values[path]) for path, domain in tuned.items()},
        distributions={path: _distribution(domain) for path, domain in tuned.items()},
        intermediate_values=steps,
    )


def _worst(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[float]:
    """The worst finite value of each objective; 0 where there is none yet."""
    scores = [scores for trial in trials if (scores := trial.scores(objectives))]
    return [
        (min if one.mode == "max" else max)((score[i] for score in scores), default=0.0)
        for i, one in enumerate(objectives)
    ]


def _distribution(domain: Domain) -> "optuna.distributions.BaseDistribution":
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if domain.choice is not None:
        return CategoricalDistribution(range(len(domain.choice)))
    if domain.quniform:
        return IntDistribution(0, len(domain.finite or ()) - 1)
    if bounds := domain.uniform or domain.loguniform:
        return FloatDistribution(*bounds, log=domain.loguniform is not None)
    low, high = domain.randint or domain.lograndint or (0, 0)
    return IntDistribution(low, high, log=domain.lograndint is not None)


def _decode(domain: Domain, value: Any) -> Any:
    indexed = domain.choice or (domain.finite if domain.quniform else None)
    return indexed[value] if indexed else value


def _encode(domain: Domain, value: Any) -> Any:
    indexed = domain.choice or (domain.finite if domain.quniform else None)
    return indexed.index(value) if indexed else value
