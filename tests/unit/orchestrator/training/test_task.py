"""The loss that a job file describes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.losses import softmax_cross_entropy
from orchestrator.job.config import StageSettings
from orchestrator.training.task import Loss, make_loss
from tests.unit.orchestrator.jobs import stage

DATA: Any = SimpleNamespace(class_names=("crane", "cat", "crane"), ignore_label=255)


def loss_of(settings: dict[str, Any], task: str = "segmentation") -> Loss:
    described = StageSettings.model_validate(stage("tiny", task, "tiny", loss=settings))
    return make_loss(described, DATA, steps_per_epoch=10, device=torch.device("cpu"))


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8)
    labels[0, :3] = 255
    return torch.randn(2, 3, 8, 8), labels


def test_weights_go_by_name_to_every_class_of_it() -> None:
    logits, labels = drawn()
    total, count = loss_of({"class_weights": {"crane": 0.5}})(logits, labels, 0)
    weights = torch.tensor([0.5, 1.0, 0.5])
    expected = softmax_cross_entropy(logits, labels, 255, class_weights=weights)
    assert (total, count) == expected


@pytest.mark.parametrize(("step", "share"), [(0, 1.0), (10, 0.75), (20, 0.5), (99, 0.5)])
def test_annealing_over_epochs(step: int, share: float) -> None:
    logits, labels = drawn()
    described = {"hard_pixels": {"fraction": 0.5, "anneal": "2 epochs"}}
    expected = softmax_cross_entropy(logits, labels, 255, hard_fraction=share)
    assert loss_of(described)(logits, labels, step) == expected


def test_mining_all_pixels_is_not_mining() -> None:
    """Else pixels whose loss rounds to 0 would leave the count."""
    logits, labels = torch.zeros(1, 3, 1, 2), torch.zeros(1, 1, 2, dtype=torch.uint8)
    logits[0, 0, 0, 0] = 200.0
    assert loss_of({"hard_pixels": {"fraction": 1.0}})(logits, labels, 0)[1] == 2
    assert loss_of({"hard_pixels": {"fraction": 0.9, "anneal": 5}})(logits, labels, 0)[1] == 1


def test_smoothing_of_classified_images() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    expected = softmax_cross_entropy(logits, labels, 255, label_smoothing=0.1)
    assert loss_of({"label_smoothing": 0.1}, "classification")(logits, labels, 0) == expected


def test_multilabel_has_a_loss_of_each_class() -> None:
    total, count = loss_of({}, "multilabel")(torch.zeros(2, 3), torch.ones(2, 3), 0)
    assert total.item() == pytest.approx(6 * torch.tensor(2.0).log().item())
    assert count == 6
