"""The sections of a stage in a job file. Unknown keys are errors."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from model.config import OutputStride
from orchestrator.job.duration import Duration


class Section(BaseModel):
    """A part of a job file: frozen, and every key of it known."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _reachable(place: str) -> str:
    scheme, separator, _ = place.partition("://")
    if separator and scheme != "s3":
        raise ValueError(f"{scheme}:// is not read; download it and name the file")
    if not place.strip():
        raise ValueError("is empty; leave start_from out to train from scratch")
    return place


class StartFrom(Section):
    """Where a stage's weights come from, and how much of them is taken."""

    checkpoint: Annotated[str, AfterValidator(_reachable)] = Field(
        description="name of an earlier stage; path (with a /) or s3:// of a checkpoint; MLflow's "
        "models:/NAME@best, models:/NAME/3, runs:/ID; a file of weights, .safetensors or .pth; "
        "timm:NAME, weights of timm; tf:PATH, a TensorFlow DeepLab checkpoint"
    )
    take: Literal["backbone", "network"] | None = Field(
        default=None,
        description="None: the network when the earlier task is the same, else the backbone",
    )
    which: Literal["last", "best"] = Field(
        default="last",
        description="of a stage's checkpoints: the last, or the best by its task's metric, which "
        "needs checkpoint.keep_best there",
    )


class _Optimizer(Section):
    lr: Annotated[float, Field(gt=0)] = Field(
        description="learning rate before schedule and multipliers"
    )
    lr_for_batch: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="the global batch that lr is meant for: the rate grows in proportion to "
        "global_batch (Goyal et al. 2017); null: lr as it stands",
    )
    lr_multipliers: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={},
        description="factor on the rate of parameters whose name begins so (backbone, aspp, "
        "decoder, logits, logits.bias); the longest beginning counts; others: 1",
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="largest norm of all gradients together; null: as they are"
    )


class Sgd(_Optimizer):
    """Stochastic gradient descent with momentum (PyTorch's, which equals TensorFlow's here)."""

    name: Literal["sgd"] = Field(
        default="sgd", description="stochastic gradient descent with momentum"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="accumulator = momentum * accumulator + gradient"
    )
    nesterov: bool = Field(default=False, description="Nesterov's momentum")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=4e-5,
        description="L2 term; none on depthwise weights, batch norm and biases",
    )


class AdamW(_Optimizer):
    """Adam with weight decay apart from the gradient (Loshchilov and Hutter 2019)."""

    name: Literal["adamw"] = Field(description="Adam with decoupled weight decay")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999),
        description="decay of the running mean and of the running square",
    )
    eps: Annotated[float, Field(gt=0)] = Field(
        default=1e-8, description="added to the root of the square"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.05,
        description="none on depthwise weights, batch norm and biases",
    )


class _Schedule(Section):
    warmup: Duration | None = Field(default=None, description="time of a linear rise to the rate")


class Poly(_Schedule):
    """lr * (1 - step / steps) ** power."""

    name: Literal["poly"] = Field(description="polynomial decay to 0")
    power: Annotated[float, Field(gt=0)] = Field(default=0.9, description="0.9 in the paper")


class Cosine(_Schedule):
    """Half a cosine from lr to lr * end."""

    name: Literal["cosine"] = Field(description="half a cosine")
    end: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of lr at the last step"
    )


class StepExponential(_Schedule):
    """lr * decay ** floor(step / every)."""

    name: Literal["step_exponential"] = Field(description="exponential decay in stairs")
    decay: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.94, description="factor at each stair"
    )
    every: Duration = Field(default="2 epochs", description="length of a stair")


class Steps(_Schedule):
    """lr * decay ** (number of milestones passed)."""

    name: Literal["steps"] = Field(description="falls at given times")
    milestones: Annotated[tuple[Duration, ...], Field(min_length=1)] = Field(
        description="times of the falls, counted from the start"
    )
    decay: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.1, description="factor at each")


Optimizer = Annotated[Sgd | AdamW, Field(discriminator="name")]
Schedule = Annotated[Poly | Cosine | StepExponential | Steps, Field(discriminator="name")]


class Ema(Section):
    """Exponential moving average of the weights; evaluated, and what later stages start from."""

    decay: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.9999, description="at step t: min(decay, (1 + t) / (10 + t)), as in TensorFlow"
    )


class HardPixels(Section):
    """Only the pixels of largest loss count, of those that a worker sends through at once.

    That is its batch, as in the reference, or each pass of micro_batch.
    """

    fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        description="share of a pass's pixels that counts"
    )
    anneal: Duration | None = Field(
        default=None, description="time over which the share falls from all pixels to fraction"
    )


class Loss(Section):
    """The loss of a task: softmax cross-entropy, or for multilabel a sigmoid one of each class."""

    class_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={}, description="factor on the loss where the label is this class; others: 1"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of the target spread evenly over all classes"
    )
    hard_pixels: HardPixels | None = Field(
        default=None, description="segmentation: hard pixel mining; null: all pixels count"
    )


_ImageScale = Annotated[float, Field(ge=0.1, le=4)]


class Evaluate(Section):
    """When and how the validation split is evaluated; the last step always is."""

    every: Duration = Field(default="1 epochs", description="time between evaluations")
    output_stride: OutputStride | None = Field(default=None, description="None: the model's")
    scales: Annotated[tuple[_ImageScale, ...], Field(min_length=1)] = Field(
        default=(1.0,),
        description="segmentation: class probabilities are averaged over the image at these scales",
    )
    flip: bool = Field(
        default=False, description="segmentation: and over the image and its mirror image"
    )
    batch: Annotated[int, Field(ge=1)] = Field(
        default=8, description="images of one size that go through the network together"
    )


class Checkpoints(Section):
    """When checkpoints are written (the last step always), which stay, how often runs go back."""

    every: Duration = Field(default="1 epochs", description="time between checkpoints")
    keep: Annotated[int, Field(ge=1)] = Field(default=2, description="so many of the newest stay")
    keep_best: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="and so many of the best by the task's metric; those count that were evaluated "
        "at their very step",
    )
    max_rollbacks: Annotated[int, Field(ge=0)] = Field(
        default=3,
        description="how often a run goes back to its last checkpoint after a loss or gradient "
        "that is not finite, and passes over the steps since, before it fails",
    )


def _with_zone(value: datetime) -> datetime:
    if value.tzinfo is None:
        raise ValueError("needs its time zone, such as 2026-12-01T08:00:00+01:00, or Z for UTC")
    return value


class Limits(Section):
    """What a job, or a stage of it, may take; none of it changes what comes out."""

    max_hours: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="hours in which any of it ran, all commands together; then it stops after a "
        "checkpoint, and goes on with a larger number",
    )
    max_cost: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="money at cluster.price_per_gpu_hour, counted and answered as max_hours is",
    )
    deadline: Annotated[datetime, AfterValidator(_with_zone)] | None = Field(
        default=None, description="date and time, with its zone, at which it stops as at max_hours"
    )


class Cluster(Section):
    """What a stage asks of Ray."""

    workers: Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=1)], int] = Field(
        default=1, description="a number, [min, max] (elastic), or 0: in this process, without Ray"
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] = Field(
        default=0, description="0: train on CPUs"
    )
    cpus_per_worker: Annotated[int, Field(ge=1)] = Field(
        default=1, description="for the loading threads, and for training without a GPU"
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        default=3, description="restarts after a lost worker before the stage fails"
    )
    hang_after: Annotated[float, Field(gt=0)] = Field(
        default=600,
        description="seconds without a finished step after which a worker counts as hung: stacks "
        "are written down, and the workers start again",
    )
    price_per_gpu_hour: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="money, for the bill; null: the bill has hours only"
    )

    @property
    def min_workers(self) -> int:
        """The smallest number of workers the stage runs on."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The largest number of workers the stage runs on."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @model_validator(mode="after")
    def _ordered(self) -> "Cluster":
        if self.min_workers > self.max_workers:
            raise ValueError(f"workers: {list(self.workers)} is not [min, max]")  # type: ignore[arg-type]
        shared = self.gpus_per_worker % 1 > 0 and self.max_workers > 1
        if self.gpus_per_worker > 1 or shared:
            raise ValueError(
                f"gpus_per_worker: {self.gpus_per_worker:g}: a worker computes on one GPU, and "
                "workers of one stage cannot share one (NCCL); take 1"
            )
        return self
