"""What differs between the three tasks: loss and metrics."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from data_pipeline.manifest import Manifest
from model.config import Task
from model.losses import annealed_fraction, sigmoid_cross_entropy, softmax_cross_entropy
from model.metrics import ClassificationMetrics, MultilabelMetrics, SegmentationMetrics
from orchestrator.job.config import StageSettings
from orchestrator.job.duration import to_steps

# (outputs, labels, step from 0) -> (sum, count)
Loss = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


class Metrics(Protocol):
    """Sums over samples that merge across workers."""

    @property
    def num_samples(self) -> int:
        """Samples added so far."""

    def update(self, output: Any, label: Any) -> None:
        """Add samples."""

    def state(self) -> dict[str, Any]:
        """What another worker needs to merge this."""

    def add(self, state: dict[str, Any]) -> None:
        """Merge another worker's state."""

    def compute(self) -> dict[str, float]:
        """The ratios."""


def make_loss(
    stage: StageSettings, data: Manifest, steps_per_epoch: int, device: torch.device
) -> Loss:
    """The loss of a stage on its training data; a pure function of the step, so it resumes."""
    if stage.task == "multilabel":
        return lambda logits, targets, _: sigmoid_cross_entropy(logits, targets)
    settings, weights = stage.loss, None
    if settings.class_weights:
        by_class = [settings.class_weights.get(name, 1.0) for name in data.class_names]
        weights = torch.tensor(by_class, dtype=torch.float32, device=device)
    hard = settings.hard_pixels
    if hard is not None and hard.fraction == 1:
        hard = None  # the reference counts pixels of loss 0 too when it does not mine
    anneal = to_steps(hard.anneal, steps_per_epoch) if hard and hard.anneal is not None else 0
    return lambda logits, labels, step: softmax_cross_entropy(
        logits,
        labels,
        data.ignore_label,
        class_weights=weights,
        label_smoothing=settings.label_smoothing,
        hard_fraction=annealed_fraction(hard.fraction, step, anneal) if hard else None,
    )


def make_metrics(task: Task, class_names: tuple[str, ...], ignore_label: int | None) -> Metrics:
    """Fresh metrics of a task."""
    if task == "segmentation":
        return SegmentationMetrics(class_names, ignore_label)
    if task == "multilabel":
        return MultilabelMetrics(class_names)
    return ClassificationMetrics()
