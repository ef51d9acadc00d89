"""Pictures of a sweep: parallel coordinates, importance of each field, and the Pareto front."""

import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.job.sweep import Objective, SweepJob
from orchestrator.sweep.results import Trial, brief, front

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

_GOOD = 5  # so many trials at least count as good ones: what fewer have in common is chance
_LEAST = 4  # trials before importance is told at all


def draw(trials: Sequence[Trial], job: SweepJob, directory: Path) -> None:
    """Draw what the trials give.

    Stopped trials count with their last value; failed ones, and those not finite, do not.
    """
    known = [trial for trial in trials if trial.scores(job.objectives)]
    if not known:
        return
    import matplotlib

    matplotlib.use("Agg")  # no window, whatever the machine has
    from matplotlib import pyplot

    with warnings.catch_warnings(), pyplot.rc_context():
        warnings.simplefilter("ignore")  # Optuna's pictures are experimental, and say so
        for name in _pictures(known, job):
            file = io.BytesIO()
            pyplot.gcf().savefig(file, dpi=120, bbox_inches="tight")
            pyplot.close()
            (directory / name).write_bytes(file.getvalue())


def _pictures(trials: Sequence[Trial], job: SweepJob) -> Iterator[str]:
    """Names of the files; at each the picture is pyplot's current figure."""
    from matplotlib import pyplot
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.visualization.matplotlib import plot_parallel_coordinate, plot_param_importances

    several = len(job.objectives) > 1
    top = max(0.1, min(0.5, _GOOD / len(trials)))
    for one in job.objectives:
        suffix = f"-{one.metric.replace('/', '-')}.png" if several else ".png"
        study = _study(trials, one, job)
        axes = plot_parallel_coordinate(study, target_name=one.metric)
        for lines in axes.collections:  # Optuna's palest lines are white
            lines.set_cmap("viridis" if one.mode == "max" else "viridis_r")
        pyplot.gcf().set_size_inches(3 + 2 * len(job.space), 5)
        yield f"parallel{suffix}"
        if len(trials) >= _LEAST:
            good = PedAnovaImportanceEvaluator(target_quantile=top)
            axes = plot_param_importances(study, good, target_name=one.metric)
            axes.set_title(f"What sets the best of {len(trials)} trials apart", loc="left")
            yield f"importance{suffix}"
    if several:
        _plot_front(trials, job.objectives)
        yield "pareto.png"


def _study(trials: Sequence[Trial], objective: Objective, job: SweepJob) -> "Study":
    """The trials as Optuna's, by one objective."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = _distributions(trials, job)
    study = optuna.create_study(direction="maximize" if objective.mode == "max" else "minimize")
    for trial in trials:
        values = {name: _parameter(value) for name, value in trial.values.items()}
        one = optuna.trial.create_trial(
            params=values,
            distributions={name: distributions[name] for name in values},
            value=trial.metrics[objective.metric],
        )
        study.add_trial(one)
    return study


def _distributions(trials: Sequence[Trial], job: SweepJob) -> dict[str, "BaseDistribution"]:
    """What Optuna must know of each field: numbers in the range that was tried, else choices."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    found: dict[str, BaseDistribution] = {}
    for name, domain in job.space.items():
        values = [_parameter(trial.values[name]) for trial in trials if name in trial.values]
        if domain.choice is not None:
            found[name] = CategoricalDistribution(tuple(dict.fromkeys(values)))
        elif values:
            is_log = bool(domain.loguniform or domain.lograndint)
            found[name] = FloatDistribution(min(values), max(values), log=is_log)
    return found


def _parameter(value: Any) -> Any:
    """Sections and lists in words, which Optuna cannot tell apart otherwise."""
    return brief(value) if isinstance(value, dict | list) else value


def _plot_front(trials: Sequence[Trial], objectives: Sequence[Objective]) -> None:
    """Finished trials by both objectives; those that no other one beats with their numbers."""
    from matplotlib import pyplot

    axes = pyplot.subplots()[1]
    first, second = (one.metric for one in objectives)
    best = front(trials, objectives)
    for trial in trials:
        if trial.state == "finished":
            place = trial.metrics[first], trial.metrics[second]
            axes.plot(*place, "o", color="tab:red" if trial in best else "silver")
            if trial in best:
                axes.annotate(str(trial.number), place, textcoords="offset points", xytext=(5, 5))
    axes.set(xlabel=first, ylabel=second, title="Pareto front: no trial beats these in both")
    axes.grid(alpha=0.3)
