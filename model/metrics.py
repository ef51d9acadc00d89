"""Metrics that add up over batches and workers; each knows how many samples it has seen."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

State = dict[str, NDArray[Any]]


class SegmentationMetrics:
    """Intersection over union from one confusion matrix [truth, prediction] over all pixels."""

    def __init__(self, class_names: Sequence[str], ignore_label: int | None) -> None:
        self.class_names = tuple(class_names)
        self.ignore_label = ignore_label
        self.confusion = np.zeros((len(class_names), len(class_names)), np.int64)
        self.num_samples = 0

    def update(self, prediction: Tensor | ArrayLike, label: Tensor | ArrayLike) -> None:
        """Count class numbers (H, W) or (B, H, W); ValueError for a label that is no class."""
        prediction, label = torch.as_tensor(prediction), torch.as_tensor(label)
        if prediction.shape != label.shape or label.ndim not in (2, 3):
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} must have "
                "one shape, (H, W) or (B, H, W)"
            )
        num_samples = 1 if label.ndim == 2 else label.shape[0]
        prediction, label = prediction.flatten().long(), label.flatten().long()
        if self.ignore_label is not None:
            counted = label != self.ignore_label
            prediction, label = prediction[counted], label[counted]
        num_classes = len(self.class_names)
        _check_classes("label", label, num_classes)
        _check_classes("prediction", prediction, num_classes)
        pairs = torch.bincount(label * num_classes + prediction, minlength=num_classes**2)
        self.confusion += pairs.cpu().numpy().reshape(num_classes, num_classes)
        self.num_samples += num_samples

    def state(self) -> State:
        """Everything counted so far."""
        return {"confusion": self.confusion.copy(), "num_samples": np.array(self.num_samples)}

    def add(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Add what another worker counted."""
        self.confusion += state["confusion"]
        self.num_samples += int(state["num_samples"])

    def compute(self) -> dict[str, float]:
        """miou over classes that occur in truth or prediction, their iou/CLASS, pixel_accuracy."""
        total = self.confusion.sum()
        if total == 0:
            raise ValueError(
                "no pixel was counted: every label is the ignore label, or no sample came"
            )
        hits = self.confusion.diagonal()
        union = self.confusion.sum(axis=0) + self.confusion.sum(axis=1) - hits
        occurs = union > 0
        ious = hits[occurs] / union[occurs]
        names = (name for name, there in zip(self.class_names, occurs, strict=True) if there)
        return {
            "miou": float(ious.mean()),
            "pixel_accuracy": float(hits.sum() / total),
            **{f"iou/{name}": float(iou) for name, iou in zip(names, ious, strict=True)},
        }


class ClassificationMetrics:
    """Share of samples whose label is among the k highest logits, for k up to the class count."""

    def __init__(self, top: Sequence[int] = (1, 5)) -> None:
        self.top = tuple(top)
        self.correct = np.zeros(len(self.top), np.int64)
        self.counted = np.zeros(len(self.top), np.int64)
        self.num_samples = 0

    def update(self, logits: Tensor | ArrayLike, label: Tensor | ArrayLike) -> None:
        """Count logits (B, K) against labels (B,); ValueError for a label that is no class."""
        logits, label = torch.as_tensor(logits), torch.as_tensor(label).long()
        if logits.ndim != 2 or label.shape != logits.shape[:1]:
            raise ValueError(
                f"logits {tuple(logits.shape)} and label {tuple(label.shape)} must be "
                "(B, K) and (B,)"
            )
        batch, num_classes = logits.shape
        _check_classes("label", label, num_classes)
        # By indices and not by comparing scores, so that logits of NaN are not counted as right.
        ranked = logits.topk(min(max(self.top), num_classes)).indices == label[:, None]
        for index, k in enumerate(self.top):
            if k <= num_classes:
                self.correct[index] += int(ranked[:, :k].sum())
                self.counted[index] += batch
        self.num_samples += batch

    def state(self) -> State:
        """Everything counted so far."""
        return {
            "correct": self.correct.copy(),
            "counted": self.counted.copy(),
            "num_samples": np.array(self.num_samples),
        }

    def add(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Add what another worker counted."""
        self.correct += state["correct"]
        self.counted += state["counted"]
        self.num_samples += int(state["num_samples"])

    def compute(self) -> dict[str, float]:
        """top1, top5, ... as shares of 1."""
        if self.num_samples == 0:
            raise ValueError("no sample was counted")
        return {
            f"top{k}": float(correct / counted)
            for k, correct, counted in zip(self.top, self.correct, self.counted, strict=True)
            if counted
        }


class MultilabelMetrics:
    """Mean average precision over classes; keeps every score, because it depends on the ranking."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = tuple(class_names)
        self._scores = [np.zeros((0, len(class_names)), np.float32)]
        self._targets = [np.zeros((0, len(class_names)), np.bool_)]

    @property
    def num_samples(self) -> int:
        """Samples seen so far."""
        return sum(len(scores) for scores in self._scores)

    def update(self, scores: Tensor | ArrayLike, targets: Tensor | ArrayLike) -> None:
        """Keep scores (logits or probabilities) and targets of 0 and 1, both (B, K)."""
        scores, targets = torch.as_tensor(scores), torch.as_tensor(targets)
        expected = (scores.shape[0], len(self.class_names)) if scores.ndim else ()
        if scores.shape != expected or targets.shape != expected:
            raise ValueError(
                f"scores {tuple(scores.shape)} and targets {tuple(targets.shape)} must both be "
                f"(B, {len(self.class_names)})"
            )
        strange = targets[(targets != 0) & (targets != 1)]
        if strange.numel():
            raise ValueError(f"multi-label targets are 0 or 1, found {strange[0].item()}")
        if scores.isnan().any():
            raise ValueError("scores are NaN and cannot be ranked: the network has diverged")
        self._scores.append(scores.float().cpu().numpy().copy())
        self._targets.append(targets.bool().cpu().numpy().copy())

    def state(self) -> State:
        """Scores float32 and targets bool of every sample so far, both (N, K)."""
        return {"scores": np.concatenate(self._scores), "targets": np.concatenate(self._targets)}

    def add(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Add the samples of another worker."""
        self._scores.append(state["scores"])
        self._targets.append(state["targets"])

    def compute(self) -> dict[str, float]:
        """mean_average_precision over classes with a positive, their average_precision/CLASS."""
        state = self.state()
        precisions = {
            f"average_precision/{name}": average_precision(scores, targets)
            for name, scores, targets in zip(
                self.class_names, state["scores"].T, state["targets"].T, strict=True
            )
            if targets.any()
        }
        if not precisions:
            raise ValueError("no class has a positive sample: average precision is undefined")
        return {"mean_average_precision": float(np.mean([*precisions.values()])), **precisions}


def average_precision(scores: NDArray[np.float32], targets: NDArray[np.bool_]) -> float:
    """Area under the precision-recall steps, sum of (R_n - R_n-1) P_n; equal scores are one step.

    scores and targets are (N,) and at least one target is true.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    hits = np.cumsum(targets[order])[ends]
    precision = hits / (ends + 1)
    recall = hits / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def _check_classes(what: str, classes: Tensor, num_classes: int) -> None:
    wrong = classes[(classes < 0) | (classes >= num_classes)]
    if wrong.numel():
        raise ValueError(
            f"{what} has the value {int(wrong[0])}, which is none of the {num_classes} classes "
            "(0 and up) nor the ignore label: check the dataset's class list and ignore label"
        )
