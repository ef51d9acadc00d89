import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from model.metrics import (
    ClassificationMetrics,
    MultilabelMetrics,
    SegmentationMetrics,
    average_precision,
)

CLASSES = ("background", "cat", "dog", "cow")


def _in_two_halves(make, first, second):
    """Metrics merged from two workers, through their states."""
    merged = make()
    for batch in (first, second):
        worker = make()
        worker.update(*batch)
        merged.add(worker.state())
    return merged


def test_segmentation_by_hand():
    metrics = SegmentationMetrics(CLASSES, 255)
    truth = np.array([[0, 0, 1], [1, 2, 255]], np.uint8)
    prediction = np.array([[0, 1, 1], [1, 0, 3]])
    metrics.update(prediction, truth)
    assert metrics.confusion.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert metrics.num_samples == 1
    # The fourth class is only predicted where the label is ignored: it does not count.
    assert metrics.compute() == pytest.approx(
        {
            "miou": (1 / 3 + 2 / 3 + 0) / 3,
            "pixel_accuracy": 3 / 5,
            "iou/background": 1 / 3,
            "iou/cat": 2 / 3,
            "iou/dog": 0.0,
        }
    )


@pytest.mark.parametrize("ignore_label", [255, 0, None])
def test_segmentation_against_sets_of_pixels(ignore_label):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (3, 8, 9))
    if ignore_label == 255:
        truth[rng.random(truth.shape) < 0.2] = 255
    prediction = rng.integers(0, 4, truth.shape)
    metrics = _in_two_halves(
        lambda: SegmentationMetrics(CLASSES, ignore_label),
        (torch.as_tensor(prediction[:2]), torch.as_tensor(truth[:2])),
        (prediction[2], truth[2].astype(np.uint8)),
    )
    valid = truth != ignore_label if ignore_label is not None else np.ones(truth.shape, bool)
    ious = []
    for k in range(4):
        overlap = (valid & (truth == k) & (prediction == k)).sum()
        ious.append(overlap / (valid & ((truth == k) | (prediction == k))).sum())
    result = metrics.compute()
    assert result["miou"] == pytest.approx(np.mean(ious))
    assert [result[f"iou/{name}"] for name in CLASSES] == pytest.approx(ious)
    assert result["pixel_accuracy"] == pytest.approx((truth == prediction)[valid].mean())
    assert metrics.num_samples == 3
    assert metrics.confusion.sum() == valid.sum()


def test_segmentation_counts_beyond_32_bits():
    metrics = SegmentationMetrics(("only",), None)
    metrics.update(np.zeros((2, 2)), np.zeros((2, 2)))
    metrics.add({"confusion": np.array([[2**40]]), "num_samples": np.array(7)})
    assert metrics.state()["confusion"].tolist() == [[2**40 + 4]]
    assert metrics.num_samples == 8


def test_segmentation_state_is_a_copy():
    metrics = SegmentationMetrics(CLASSES, None)
    state = metrics.state()
    metrics.update(np.zeros((2, 2)), np.zeros((2, 2)))
    assert state["confusion"].sum() == 0


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        ([[0, 1]], [[0, 7]], "label has the value 7, which is none of the 4 classes"),
        ([[0, 1]], [[-1, 0]], "label has the value -1"),
        ([[0, 4]], [[1, 0]], "prediction has the value 4"),
        ([[0, 1]], [[0], [1]], r"\(1, 2\) and label \(2, 1\)"),
        ([0, 1], [0, 1], r"\(H, W\) or \(B, H, W\)"),
    ],
)
def test_segmentation_input_that_cannot_be_counted(prediction, truth, message):
    metrics = SegmentationMetrics(CLASSES, 255)
    with pytest.raises(ValueError, match=message):
        metrics.update(np.array(prediction), np.array(truth))
    assert metrics.num_samples == 0


def test_classification_by_hand():
    logits = np.array([[5.0, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5], [1, 9, 8, 7, 6, 5]])
    metrics = ClassificationMetrics()
    metrics.update(torch.as_tensor(logits), torch.tensor([0, 0, 2]))
    assert metrics.compute() == {"top1": 1 / 3, "top5": 2 / 3}
    assert metrics.num_samples == 3


def test_classification_against_sorting_and_merged():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(50, 9)).astype(np.float32), rng.integers(0, 9, 50)
    metrics = _in_two_halves(
        lambda: ClassificationMetrics(top=(1, 3, 5)),
        (logits[:20], label[:20]),
        (logits[20:], label[20:]),
    )
    ranks = [list(np.argsort(-row)).index(k) for row, k in zip(logits, label, strict=True)]
    assert metrics.compute() == {f"top{k}": (np.array(ranks) < k).mean() for k in (1, 3, 5)}
    assert metrics.num_samples == 50


def test_classification_of_few_classes_has_no_top5():
    metrics = ClassificationMetrics()
    metrics.update(torch.eye(3), torch.arange(3))
    assert metrics.compute() == {"top1": 1.0}
    assert metrics.num_samples == 3


def test_classification_does_not_reward_nan():
    metrics = ClassificationMetrics(top=(1,))
    metrics.update(torch.full((6, 6), torch.nan), torch.arange(6))
    assert metrics.compute()["top1"] <= 1 / 6 + 1e-9


def test_classification_input_that_cannot_be_counted():
    metrics = ClassificationMetrics()
    with pytest.raises(ValueError, match="label has the value 3"):
        metrics.update(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"\(B, K\) and \(B,\)"):
        metrics.update(torch.zeros(2, 3), torch.tensor([0]))


def _average_precision_by_thresholds(scores, targets):
    area, recall = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        hits = (chosen & targets).sum()
        area += (hits / targets.sum() - recall) * hits / chosen.sum()
        recall = hits / targets.sum()
    return area


@settings(derandomize=True, deadline=None)
@given(
    # Few distinct scores, so that ties are common.
    hnp.arrays(
        np.float32, st.integers(1, 30), elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0, np.inf])
    ),
    st.randoms(use_true_random=False),
)
def test_average_precision_equals_its_definition(scores, random):
    targets = np.array([random.random() < 0.4 for _ in scores])
    targets[random.randrange(len(targets))] = True
    expected = _average_precision_by_thresholds(scores, targets)
    assert average_precision(scores, targets) == pytest.approx(expected)


def test_average_precision_by_hand():
    # The example of scikit-learn's documentation, worked out on paper.
    scores, targets = np.array([0.1, 0.4, 0.35, 0.8], np.float32), np.array([0, 0, 1, 1], bool)
    assert average_precision(scores, targets) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_multilabel_leaves_out_classes_without_a_positive_and_merges():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 4)).astype(np.float32)
    targets = (rng.random((40, 4)) < 0.3).astype(np.uint8)
    targets[:, 2] = 0
    metrics = _in_two_halves(
        lambda: MultilabelMetrics(CLASSES),
        (torch.as_tensor(scores[:15]), torch.as_tensor(targets[:15])),
        (scores[15:], targets[15:]),
    )
    expected = {
        f"average_precision/{CLASSES[k]}": _average_precision_by_thresholds(
            scores[:, k], targets[:, k].astype(bool)
        )
        for k in (0, 1, 3)
    }
    mean = np.mean([*expected.values()])
    assert metrics.compute() == pytest.approx({"mean_average_precision": mean, **expected})
    assert metrics.num_samples == 40
    assert metrics.state()["scores"].shape == (40, 4)


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        (np.zeros((2, 4)), np.full((2, 4), -1), "found -1"),
        (np.full((2, 4), np.nan), np.ones((2, 4)), "NaN"),
        (np.zeros((2, 3)), np.zeros((2, 3)), r"\(B, 4\)"),
        (np.zeros((2, 4)), np.zeros((3, 4)), r"\(B, 4\)"),
    ],
)
def test_multilabel_input_that_cannot_be_ranked(scores, targets, message):
    with pytest.raises(ValueError, match=message):
        MultilabelMetrics(CLASSES).update(scores, targets)


@pytest.mark.parametrize(
    "metrics",
    [SegmentationMetrics(CLASSES, 255), ClassificationMetrics(), MultilabelMetrics(CLASSES)],
)
def test_nothing_counted_is_an_error_and_not_a_number(metrics):
    assert metrics.num_samples == 0
    with pytest.raises(ValueError, match="no "):
        metrics.compute()
