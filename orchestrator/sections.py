"""The sections of a stage in a job file. Unknown keys are errors."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.config import OutputStride
from orchestrator.duration import Duration


class Section(BaseModel):
    """A part of a job file: frozen, and every key of it known."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StartFrom(Section):
    """Where a stage's weights come from, and how much of them is taken."""

    checkpoint: str = Field(
        description="name of an earlier stage; path (with a /) of a checkpoint; a file of weights, "
        ".safetensors or .pth; timm:NAME, weights of timm; tf:PATH, a TensorFlow DeepLab checkpoint"
    )
    take: Literal["backbone", "network"] | None = Field(
        default=None,
        description="None: the network when the earlier task is the same, else the backbone",
    )


class _Optimizer(Section):
    lr: Annotated[float, Field(gt=0)]
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

    name: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 4e-5


class AdamW(_Optimizer):
    """Adam with weight decay apart from the gradient (Loshchilov and Hutter 2019)."""

    name: Literal["adamw"]
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.05


class _Schedule(Section):
    warmup: Duration | None = Field(default=None, description="time of a linear rise to the rate")


class Poly(_Schedule):
    """lr * (1 - step / steps) ** power."""

    name: Literal["poly"]
    power: Annotated[float, Field(gt=0)] = 0.9


class Cosine(_Schedule):
    """Half a cosine from lr to lr * end."""

    name: Literal["cosine"]
    end: Annotated[float, Field(ge=0, lt=1)] = 0.0


class StepExponential(_Schedule):
    """lr * decay ** floor(step / every)."""

    name: Literal["step_exponential"]
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.94
    every: Duration = "2 epochs"


class Steps(_Schedule):
    """lr * decay ** (number of milestones passed)."""

    name: Literal["steps"]
    milestones: Annotated[tuple[Duration, ...], Field(min_length=1)]
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.1


Optimizer = Annotated[Sgd | AdamW, Field(discriminator="name")]
Schedule = Annotated[Poly | Cosine | StepExponential | Steps, Field(discriminator="name")]


class Ema(Section):
    """Exponential moving average of the weights; evaluated, and what later stages start from."""

    decay: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.9999, description="at step t: min(decay, (1 + t) / (10 + t)), as in TensorFlow"
    )


class HardPixels(Section):
    """Only the pixels of largest loss in a worker's batch count, as in the reference."""

    fraction: Annotated[float, Field(gt=0, le=1)]
    anneal: Duration | None = Field(
        default=None, description="time over which the share falls from all pixels to fraction"
    )


class Loss(Section):
    """The loss of a task: softmax cross-entropy, or for multilabel a sigmoid one of each class."""

    class_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={}, description="factor on the loss where the label is this class; others: 1"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    hard_pixels: HardPixels | None = Field(
        default=None, description="segmentation: hard pixel mining; null: all pixels count"
    )


class Evaluate(Section):
    """When and how the validation split is evaluated; the last step always is."""

    every: Duration = "1 epochs"
    output_stride: OutputStride | None = Field(default=None, description="None: the model's")
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=4)], ...], Field(min_length=1)] = Field(
        default=(1.0,),
        description="segmentation: class probabilities are averaged over the image at these scales",
    )
    flip: bool = Field(
        default=False, description="segmentation: and over the image and its mirror image"
    )
    batch: Annotated[int, Field(ge=1)] = 8


class Checkpoints(Section):
    """When checkpoints are written (the last step always), which stay, how often runs go back."""

    every: Duration = "1 epochs"
    keep: Annotated[int, Field(ge=1)] = Field(default=2, description="so many of the newest stay")
    keep_best: Annotated[int, Field(ge=0)] = Field(
        default=0, description="and so many of the best by the task's metric"
    )
    max_rollbacks: Annotated[int, Field(ge=0)] = Field(
        default=3,
        description="how often a run goes back to its last checkpoint after a loss or gradient "
        "that is not finite, and passes over the steps since, before it fails",
    )


class Cluster(Section):
    """What a stage asks of Ray."""

    workers: Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=1)], int] = Field(
        default=1, description="a number, [min, max] (elastic), or 0: in this process, without Ray"
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
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
        return self
