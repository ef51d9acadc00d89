"""The schema of `kind: sweep`: a pipeline, one stage of which is trained many times."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from model.config import Task
from orchestrator.job.config import Name, PipelineJob, StageSettings
from orchestrator.job.sections import Section
from orchestrator.job.space import Domain, check_space

MULTIPLY_ADDS = "multiply_adds"
# of `model.metrics`; a name that ends in / has a class after it
METRICS: dict[Task, tuple[str, ...]] = {
    "segmentation": ("val/miou", "val/pixel_accuracy", "val/iou/"),
    "classification": ("val/top1", "val/top5"),
    "multilabel": ("val/mean_average_precision", "val/average_precision/"),
}

Share = Annotated[float, Field(gt=0, lt=1)]


class Search(Section):
    """How the values of the next trial are chosen."""

    name: Literal["grid", "random", "optuna"] = Field(
        default="random",
        description="grid: all combinations, in order; random; optuna: its tree-structured Parzen "
        "estimator (TPE), which learns from the trials before",
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        default=0, description="of all that the sweep draws"
    )
    startup: Annotated[int, Field(ge=1)] = Field(
        default=10, description="optuna: so many ended trials are chosen at random first"
    )


class Asha(Section):
    """Asynchronous successive halving (Li et al. 2020), in its stopping form."""

    name: Literal["asha"] = Field(description="asynchronous successive halving")
    reduction: Annotated[float, Field(gt=1)] = Field(
        default=3, description="at each rung one of so many trials goes on"
    )
    grace: Share = Field(
        default=0.1,
        description="share of a trial's steps at the first rung; later ones: times reduction",
    )


class Median(Section):
    """The median stopping rule (Golovin et al. 2017)."""

    name: Literal["median"] = Field(description="median stopping rule")
    grace: Share = Field(default=0.1, description="share of its steps before a trial may stop")
    min_trials: Annotated[int, Field(ge=1)] = Field(
        default=3, description="so many others must have come as far"
    )


class Pbt(Section):
    """Population based training (Jaderberg et al. 2017), one generation after the other."""

    name: Literal["pbt"] = Field(description="population based training")
    population: Annotated[int, Field(ge=2)] = Field(default=8, description="number of trials")
    every: Share = Field(default=0.1, description="share of a trial's steps in a generation")
    quantile: Annotated[float, Field(gt=0, le=0.5)] = Field(
        default=0.25, description="this share, the worst, goes on from copies of the best"
    )
    resample: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.25, description="probability that a value is drawn anew, not perturbed"
    )
    factors: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = Field(
        default=(0.8, 1.2),
        description="a perturbed value is multiplied by one of these; a choice "
        "moves to a neighbour",
    )


class NoScheduler(Section):
    """Every trial is trained to its end."""

    name: Literal["none"] = Field(default="none", description="every trial is trained to its end")


Scheduler = Annotated[Asha | Median | Pbt | NoScheduler, Field(discriminator="name")]


class Objective(Section):
    """What makes one trial better than another."""

    metric: str = Field(
        description="of the evaluations, such as val/miou (the last one counts), or multiply_adds "
        "(of an image of the training crop, in billions)"
    )
    mode: Literal["max", "min"] = Field(description="whether more or less of it is better")


class Budget(Section):
    """What a sweep may take; more of it, and the same sweep goes on."""

    trials: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="number of trials; those with invalid values do not count"
    )
    gpu_hours: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="of all trials; then those that run stop after a checkpoint"
    )
    cost: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="of all trials, at cluster.price_per_gpu_hour; as gpu_hours"
    )


class SweepJob(PipelineJob):
    """A job file of `kind: sweep`: the other stages are run once, the tuned one for each trial."""

    kind: Literal["sweep"] = Field(description="one stage many times")  # type: ignore[assignment]
    tune: Name | None = Field(default=None, description="the tuned stage; null: the last one")
    space: dict[str, Domain] = Field(
        description="field of the tuned stage, such as optimizer.lr, to what it may be"
    )
    search: Search = Field(default=Search(), description="how values are chosen")
    scheduler: Scheduler = Field(
        default=NoScheduler(), description="which trials are stopped early, or go on from others"
    )
    objective: Objective | Annotated[tuple[Objective, ...], Field(min_length=1, max_length=2)] = (
        Field(description="one, or a list of two; schedulers look at the first")
    )
    budget: Budget = Field(default=Budget(), description="where the sweep ends")
    max_concurrent: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="trials at the same time; auto: as many as the cluster has room for",
    )

    @property
    def tuned(self) -> StageSettings:
        """The stage that is tuned, as the job file has it."""
        return next(stage for stage in self.stages if stage.name == self._tuned_name)

    @property
    def earlier(self) -> tuple[StageSettings, ...]:
        """The stages that all trials share."""
        return tuple(stage for stage in self.stages if stage.name != self._tuned_name)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """One or two."""
        return (self.objective,) if isinstance(self.objective, Objective) else self.objective

    @property
    def num_trials(self) -> int | None:
        """How many trials with valid values there are to be; None: what else the budget allows."""
        pbt = isinstance(self.scheduler, Pbt)
        return self.scheduler.population if pbt else self.budget.trials  # type: ignore[union-attr]

    @property
    def _tuned_name(self) -> str:
        return self.tune or self.in_order[-1].name

    @model_validator(mode="after")
    def _tunes_a_last_stage(self) -> "SweepJob":
        names = [stage.name for stage in self.stages]
        if self.tune is not None and self.tune not in names:
            near = difflib.get_close_matches(self.tune, names, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"tune: no stage {self.tune!r}; {hint}stages: {', '.join(names)}")
        for stage in self.stages:
            if stage.start_from and stage.start_from.checkpoint == self._tuned_name:
                raise ValueError(
                    f"stages: {stage.name} starts from {self._tuned_name}, which is tuned; run it "
                    "afterwards, from the best trial"
                )
        return self

    @model_validator(mode="after")
    def _searchable(self) -> "SweepJob":
        check_space(self.space, self.tuned)
        if self.search.name == "grid":
            endless = [path for path, domain in self.space.items() if domain.finite is None]
            if endless:
                raise ValueError(
                    f"space.{endless[0]}: search: grid needs choice, quniform or randint"
                )
        for objective in self.objectives:
            _check_metric(objective.metric, self.tuned.task)
        if self.objectives[0].metric == MULTIPLY_ADDS:
            raise ValueError("objective: the first must be a metric of the evaluations")
        return self

    @model_validator(mode="after")
    def _ends(self) -> "SweepJob":
        for field in ("max_hours", "max_cost", "deadline"):
            if getattr(self, field) is not None or getattr(self.tuned, field) is not None:
                raise ValueError(f"{field}: a sweep has budget.gpu_hours and budget.cost instead")
        budget, cluster = self.budget, self.tuned.cluster
        if (budget.gpu_hours or budget.cost) and not cluster.gpus_per_worker:
            raise ValueError("budget: gpu_hours and cost count GPUs, of which the stage takes none")
        if budget.cost and cluster.price_per_gpu_hour is None:
            raise ValueError("budget.cost: the stage needs cluster.price_per_gpu_hour")
        if isinstance(self.scheduler, Pbt):
            _check_pbt(self)
        elif self.search.name != "grid" and budget == Budget():
            raise ValueError("budget: give trials, gpu_hours or cost; the search has no end")
        return self


def _check_metric(metric: str, task: Task) -> None:
    known = (*METRICS[task], MULTIPLY_ADDS)
    if metric in known and not metric.endswith("/"):
        return
    if any(name.endswith("/") and metric.startswith(name) for name in known):
        return
    near = difflib.get_close_matches(metric, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    raise ValueError(f"objective.metric: {metric!r} is not a metric of {task}; {hint}")


# A checkpoint of other values of these would not fit, or not mean the same.
_FIXED_IN_PBT = ("model", "global_batch", "steps", "epochs", "start_from", "task", "seed", "ema")


def _check_pbt(job: SweepJob) -> None:
    budget: Any = job.budget.trials
    if budget is not None:
        raise ValueError("budget.trials: pbt has scheduler.population")
    if job.search.name == "grid":
        raise ValueError("search: grid: pbt draws its population; take random or optuna")
    for path, domain in job.space.items():
        top, _, rest = path.partition(".")
        if top in _FIXED_IN_PBT or path == "optimizer.name" or rest.endswith("dataset"):
            raise ValueError(f"space.{path}: pbt changes values while training, this one cannot")
        if domain.when:
            raise ValueError(f"space.{path}.when: pbt has no conditional fields")
