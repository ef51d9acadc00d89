"""What differs between the three tasks: loss and metrics."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from model.config import Task
from model.losses import sigmoid_cross_entropy, softmax_cross_entropy
from model.metrics import ClassificationMetrics, MultilabelMetrics, SegmentationMetrics

Loss = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


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


def make_loss(task: Task, ignore_label: int | None) -> Loss:
    """(outputs, labels) -> (sum, count)."""
    if task == "multilabel":
        return sigmoid_cross_entropy
    return lambda logits, labels: softmax_cross_entropy(logits, labels, ignore_label)


def make_metrics(task: Task, class_names: tuple[str, ...], ignore_label: int | None) -> Metrics:
    """Fresh metrics of a task."""
    if task == "segmentation":
        return SegmentationMetrics(class_names, ignore_label)
    if task == "multilabel":
        return MultilabelMetrics(class_names)
    return ClassificationMetrics()
