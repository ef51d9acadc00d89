"""The schema of job files. A file is complete in itself; unknown keys are errors."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from data_pipeline.config import DataConfig
from data_pipeline.storage import is_local, open_storage
from model.config import ModelConfig, Task
from orchestrator.duration import Duration
from orchestrator.sections import (
    Checkpoints,
    Cluster,
    Ema,
    Evaluate,
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

    return _VARIABLE.sub(value, text)


def _expand_path(text: str) -> str:
    expanded = _substitute(text)
    if "://" in expanded:
        raise ValueError("only local (or shared, mounted) directories are supported so far")
    return str(Path(expanded).expanduser().absolute())


def _expand_place(text: str) -> str:
    expanded = _substitute(text)
    if is_local(expanded):
        return _expand_path(expanded)
    open_storage(expanded)  # says what is wrong with it
    return expanded


LocalPath = Annotated[str, AfterValidator(_expand_path)]
LocalOrBucket = Annotated[str, AfterValidator(_expand_place)]


class _Places(Section):
    storage: LocalPath = Field(
        default="${ATROUS_STORAGE:-~/atrous}",
        validate_default=True,
        description="directory of runs, checkpoints and the embedded MLflow; shared by all nodes",
    )
    data_root: LocalOrBucket | None = Field(
        default=None,
        description="directory or s3://bucket/prefix of prepared data sets; None: <storage>/data",
    )

    @property
    def data_directory(self) -> str:
        """Where prepared data sets lie: a path, or s3://bucket/prefix."""
        return self.data_root or str(Path(self.storage) / "data")


class StageSettings(Section):
    """One training run of one task on one data set from one starting point."""

    name: Name
    task: Task
    start_from: StartFrom | None = Field(default=None, description="None: from scratch")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    model: ModelConfig = ModelConfig()
    loss: Loss = Loss()
    data: DataConfig
    optimizer: Optimizer
    schedule: Schedule
    ema: Ema | None = None
    global_batch: Annotated[int, Field(ge=1)]
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        default=None,
        description="most samples that go through the network at once on a worker, whose gradients "
        "are accumulated to the global batch; null: its whole part; auto: what fits in memory",
    )
    steps: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    precision: Precision = Field(
        default="auto",
        description="auto: bfloat16 autocast on a GPU that has it, else float32; tf32: float32 "
        "with products in TensorFloat-32; float16: autocast with a loss scale",
    )
    compile: bool = Field(default=False, description="torch.compile the network's blocks")
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoints = Checkpoints()
    log_every: Duration = 20
    cluster: Cluster = Cluster()

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
        return self

    @model_validator(mode="after")
    def _of_segmentation(self) -> "StageSettings":
        if self.task != "segmentation":
            for field, value, default in (
                ("evaluate.scales", self.evaluate.scales, (1.0,)),
                ("evaluate.flip", self.evaluate.flip, False),
                ("loss.hard_pixels", self.loss.hard_pixels, None),
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


class StageJob(_Places, StageSettings):
    """A job file of `kind: stage`."""

    kind: Literal["stage"]

    @property
    def settings(self) -> StageSettings:
        """The stage alone, without the places of this machine."""
        return StageSettings(**{name: getattr(self, name) for name in StageSettings.model_fields})


class Prepared(Section):
    """A data set that a pipeline prepares before its first stage, once."""

    format: Literal["imagenet", "multilabel", "coco", "voc", "cityscapes", "folder"]
    source: LocalPath | None = Field(
        default=None, description="directory in the original layout, unpacked or in its archives"
    )
    synthesize: dict[str, Any] | None = Field(
        default=None, description="draw the source instead: options of `atrous data synthesize`"
    )
    splits: tuple[str, ...] | None = None
    limit: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="at most so many samples of each split (a seeded choice)"
    )
    on_broken: Literal["fail", "skip"] = "fail"

    @model_validator(mode="after")
    def _one_source(self) -> "Prepared":
        if (self.source is None) == (self.synthesize is None):
            raise ValueError("give exactly one of source and synthesize")
        return self


class PipelineJob(_Places):
    """A job file of `kind: pipeline`: a DAG of stages, linked by their start_from."""

    kind: Literal["pipeline"]
    name: Name
    datasets: dict[Name, Prepared] = Field(default={})
    stages: tuple[StageSettings, ...]

    @model_validator(mode="after")
    def _runnable(self) -> "PipelineJob":
        names = [stage.name for stage in self.stages]
        if not names:
            raise ValueError("stages: give at least one")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"stages: the name {twice[0]!r} is used twice")
        waiting = {stage.name: stage.start_from for stage in self.stages}
        while ready := [n for n, s in waiting.items() if s is None or s.checkpoint not in waiting]:
            for name in ready:
                del waiting[name]
        if waiting:
            raise ValueError(f"stages: {', '.join(waiting)} start from each other, in a circle")
        return self


Job = StageJob | PipelineJob
