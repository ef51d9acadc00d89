"""The schema of job files. A file is complete in itself; unknown keys are errors."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from data_pipeline.config import DataConfig, Shards
from data_pipeline.storage import is_local, join, open_storage
from model.config import ModelConfig, Task
from orchestrator.job.duration import Duration
from orchestrator.job.sections import (
    Checkpoints,
    Cluster,
    Ema,
    Evaluate,
    Limits,
    Loss,
    Optimizer,
    Schedule,
    Section,
    StartFrom,
)

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Precision = Literal["auto", "float32", "tf32", "bfloat16", "float16"]
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def _substitute(text: str) -> str:
    """Replace ${NAME} and ${NAME:-default}; only places may name variables."""

    def value(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name) or default
        if found is None:
            raise ValueError(f"the environment variable {name} is not set; export {name}=/a/path")
        return found

    expanded = _VARIABLE.sub(value, text)
    if not expanded.strip():
        raise ValueError("is empty; name a directory")
    if "$" in expanded:
        raise ValueError("$ begins a variable's name: write ${NAME}, or ${NAME:-/a/default}")
    return expanded


def _expand_path(text: str) -> str:
    expanded = _substitute(text)
    try:
        return str(Path(expanded).expanduser().absolute())
    except RuntimeError as error:  # ~somebody who has no home
        raise ValueError(f"{error} Write the whole path") from None


def _expand_place(text: str) -> str:
    expanded = _substitute(text)
    if is_local(expanded):
        return _expand_path(expanded)
    open_storage(expanded)  # says what is wrong with it
    return expanded


LocalOrBucket = Annotated[str, AfterValidator(_expand_place)]


class Prepared(Section):
    """A data set that a job prepares before its first stage, once."""

    format: Literal["imagenet", "multilabel", "coco", "voc", "cityscapes", "folder", "shards"] = (
        Field(description="original layout of the source; shards: WebDataset's, read in place")
    )
    source: LocalOrBucket | None = Field(
        default=None,
        description="directory or s3://bucket/prefix in the original layout, unpacked or in its "
        "archives",
    )
    synthesize: dict[str, Any] | None = Field(
        default=None, description="draw the source instead: options of `atrous data synthesize`"
    )
    shards: Shards | None = Field(
        default=None, description="format shards: which they are and what their samples consist of"
    )
    splits: tuple[str, ...] | None = Field(
        default=None, description="only these; null: all of the layout"
    )
    limit: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="at most so many samples of each split (a seeded choice)"
    )
    on_broken: Literal["fail", "skip"] = Field(
        default="fail", description="input that cannot be read; skip: left out and counted"
    )

    @model_validator(mode="after")
    def _one_source(self) -> "Prepared":
        if (self.source is None) == (self.synthesize is None):
            raise ValueError("give exactly one of source and synthesize")
        if (self.format == "shards") != (self.shards is not None):
            raise ValueError("format: shards goes together with the section shards")
        if self.shards and (self.synthesize or self.limit or self.splits):
            raise ValueError("format: shards takes all of its shards.splits: no splits, no limit")
        return self


class _Places(Section):
    storage: LocalOrBucket = Field(
        default="${ATROUS_STORAGE:-~/atrous}",
        validate_default=True,
        description="directory shared by all nodes, or s3://bucket/prefix, of runs and checkpoints",
    )
    data_root: LocalOrBucket | None = Field(
        default=None,
        description="directory or s3://bucket/prefix of prepared data sets; None: <storage>/data",
    )
    datasets: dict[Name, Prepared] = Field(
        default={},
        description="data sets to prepare (or shards to index) before the first stage, by name",
    )

    @property
    def data_directory(self) -> str:
        """Where prepared data sets lie: a path, or s3://bucket/prefix."""
        return self.data_root or join(self.storage, "data")


class StageSettings(Limits):
    """One training run of one task on one data set from one starting point."""

    name: Name = Field(description="of the stage; later stages start from it by this name")
    task: Task = Field(
        description="segmentation: DeepLabv3+; classification, multilabel: its backbone, classifier"
    )
    start_from: StartFrom | None = Field(default=None, description="None: from scratch")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        default=0, description="of initial weights, order of samples, augmentation and dropout"
    )
    model: ModelConfig = Field(default=ModelConfig(), description="the network")
    loss: Loss = Field(default=Loss(), description="what is minimised")
    data: DataConfig = Field(description="what is trained and evaluated on")
    optimizer: Optimizer = Field(description="how the weights move")
    schedule: Schedule = Field(description="the learning rate over time")
    ema: Ema | None = Field(default=None, description="moving average of the weights; null: none")
    global_batch: Annotated[int, Field(ge=1)] = Field(
        description="samples of one optimizer step, over all workers"
    )
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        default=None,
        description="most samples that go through the network at once on a worker, whose gradients "
        "are accumulated to the global batch; null: its whole part; auto: what fits in memory",
    )
    steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="length of the training; or give epochs"
    )
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="length of the training; or give steps"
    )
    precision: Precision = Field(
        default="auto",
        description="auto: bfloat16 autocast on a GPU that has it, else float32; tf32: float32 "
        "with products in TensorFloat-32; float16: autocast with a loss scale",
    )
    compile: bool = Field(default=False, description="torch.compile the network's blocks")
    evaluate: Evaluate = Field(
        default=Evaluate(), description="when and how the validation split is evaluated"
    )
    checkpoint: Checkpoints = Field(
        default=Checkpoints(), description="when checkpoints are written and which stay"
    )
    log_every: Duration = Field(default=20, description="time between lines of the journal")
    cluster: Cluster = Field(default=Cluster(), description="what the stage asks of Ray")

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, values: Any) -> Any:
        if isinstance(values, dict):
            values = dict(values)
            if isinstance(values.get("start_from"), str):
                values["start_from"] = {"checkpoint": values["start_from"]}
            if isinstance(values.get("optimizer"), dict):
                values["optimizer"] = {"name": "sgd"} | values["optimizer"]
        return values

    @model_validator(mode="after")
    def _consistent(self) -> "StageSettings":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.global_batch < self.cluster.max_workers:
            raise ValueError(
                f"global_batch: {self.global_batch} is smaller than cluster.workers: "
                f"{self.cluster.max_workers}; every worker needs a sample of each batch"
            )
        train = self.data.train
        if self.task == "segmentation" and train.area is not None:
            raise ValueError("data.train.area is for classification; segmentation uses scale")
        if self.task != "segmentation" and train.scale is not None:
            raise ValueError(f"data.train.scale is for segmentation; {self.task} uses area")
        if self.data.keep_pixels and self.data.cache is False:
            raise ValueError(
                "data.keep_pixels: there is no place with data.cache: false; leave one"
            )
        return self

    @model_validator(mode="after")
    def _has_a_price(self) -> "StageSettings":
        _check_price(self, (self,))
        return self

    @model_validator(mode="after")
    def _of_segmentation(self) -> "StageSettings":
        if self.task != "segmentation":
            for field, value, default in (
                ("evaluate.scales", self.evaluate.scales, (1.0,)),
                ("evaluate.flip", self.evaluate.flip, False),
                ("loss.hard_pixels", self.loss.hard_pixels, None),
                ("data.train.scale_step", self.data.train.scale_step, 0.25),
                ("data.keep_pixels", self.data.keep_pixels, False),
                *(
                    (
                        f"model.{name}",
                        getattr(self.model, name),
                        ModelConfig.model_fields[name].default,
                    )
                    for name in ("aspp_channels", "image_level_features", "separable", "decoder")
                ),
            ):
                if value != default:
                    raise ValueError(f"{field} is for segmentation; {self.task} has none")
        if self.task == "multilabel" and self.loss != Loss():
            raise ValueError("loss.class_weights and label_smoothing are not for multilabel")
        return self

    @property
    def duration(self) -> int | str:
        """Length of the training."""
        return self.steps if self.steps is not None else f"{self.epochs:g} epochs"


def _check_price(limits: Limits, stages: Sequence[StageSettings]) -> None:
    if limits.max_cost is None:
        return
    with_gpus = [stage for stage in stages if stage.cluster.gpus_per_worker]
    if not with_gpus:
        raise ValueError("max_cost is for GPUs, of which nothing takes any; give max_hours")
    free = [stage.name for stage in with_gpus if stage.cluster.price_per_gpu_hour is None]
    if free:
        raise ValueError(f"max_cost needs cluster.price_per_gpu_hour, missing in {', '.join(free)}")


class StageJob(_Places, StageSettings):
    """A job file of `kind: stage`."""

    kind: Literal["stage"] = Field(description="a stage alone")

    @property
    def settings(self) -> StageSettings:
        """The stage alone, without the places of this machine."""
        given = self.model_fields_set & StageSettings.model_fields.keys()
        return StageSettings(**{name: getattr(self, name) for name in given})

    @property
    def stages(self) -> tuple[StageSettings, ...]:
        """The one stage, as a pipeline has several."""
        return (self.settings,)


class PipelineJob(_Places, Limits):
    """A job file of `kind: pipeline`: a DAG of stages, linked by their start_from."""

    kind: Literal["pipeline"] = Field(description="stages as a DAG")
    name: Name = Field(description="of the pipeline")
    stages: tuple[StageSettings, ...] = Field(
        description="stages, each written out or the name of its job file"
    )

    @model_validator(mode="after")
    def _runnable(self) -> "PipelineJob":
        names = [stage.name for stage in self.stages]
        if not names:
            raise ValueError("stages: give at least one")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"stages: the name {twice[0]!r} is used twice")
        if circle := self._circle():
            raise ValueError(
                f"stages: {circle[0]} starts from itself"
                if len(circle) == 1
                else f"stages: {', '.join(circle)} start from each other, in a circle"
            )
        return self

    def _circle(self) -> list[str]:
        """Names of stages that start from each other, in the order of the file."""
        ordered = {stage.name for stage in self.in_order}
        before = {
            stage.name: stage.start_from.checkpoint
            for stage in self.stages
            if stage.start_from and stage.name not in ordered
        }
        name = next(iter(before), None)
        seen: list[str] = []
        while name is not None and name not in seen:  # those that lead into the circle come first
            seen.append(name)
            name = before[name]
        inside = seen[seen.index(name) :] if name is not None else []
        return [stage.name for stage in self.stages if stage.name in inside]

    @property
    def in_order(self) -> list[StageSettings]:
        """The stages, each after the one it starts from."""
        waiting = {stage.name: stage for stage in self.stages}
        ordered: list[StageSettings] = []
        while ready := [
            stage
            for stage in waiting.values()
            if stage.start_from is None or stage.start_from.checkpoint not in waiting
        ]:
            ordered += ready
            for stage in ready:
                del waiting[stage.name]
        return ordered

    @model_validator(mode="after")
    def _has_a_price(self) -> "PipelineJob":
        _check_price(self, self.stages)
        return self

    @model_validator(mode="after")
    def _best_is_kept(self) -> "PipelineJob":
        keep_none = {stage.name for stage in self.stages if not stage.checkpoint.keep_best}
        for stage in self.stages:
            wanted = stage.start_from
            if wanted and wanted.which == "best" and wanted.checkpoint in keep_none:
                raise ValueError(
                    f"stages: {stage.name} starts from the best checkpoint of "
                    f"{wanted.checkpoint}, which keeps none: give that checkpoint.keep_best: 1"
                )
        return self


Job = StageJob | PipelineJob
