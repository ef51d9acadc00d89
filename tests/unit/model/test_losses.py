import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model.losses import annealed_fraction, sigmoid_cross_entropy, softmax_cross_entropy

WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5])


def drawn():
    """Logits (2, 5, 9, 11) and labels, a fifth of them 255: the inputs of the REFERENCE values."""
    random = np.random.RandomState(0)
    logits = (3 * random.randn(2, 9, 11, 5)).astype(np.float32)
    labels = random.randint(0, 5, (2, 9, 11))
    labels[random.rand(2, 9, 11) < 0.2] = 255
    return torch.tensor(logits).permute(0, 3, 1, 2).requires_grad_(), torch.tensor(labels)


# Loss (sum over count) and summed absolute gradient that the reference's own code gives:
# utils/train_utils.py add_softmax_cross_entropy_loss_for_each_scale under TensorFlow 2.15.
REFERENCE = {
    "plain": (None, None, 3.588035821914673, 1.5404868125915527),
    "weights": (WEIGHTS, None, 3.6020097732543945, 1.554039478302002),
    "hard": (None, (0.25, 0, 0), 7.426382064819336, 1.996731162071228),
    "before annealing": (None, (0.25, 0, 100), 3.588035821914673, 1.5404868125915527),
    "annealing": (None, (0.25, 30, 100), 3.7046070098876953, 1.5894795656204224),
    "annealed": (None, (0.25, 500, 100), 7.426382064819336, 1.996731162071228),
    "weights, hard": (WEIGHTS, (0.4, 0, 0), 6.7743916511535645, 2.627159357070923),
    "weights, annealing": (WEIGHTS, (0.1, 50, 100), 5.2522969245910645, 2.2426819801330566),
    "losses of 0 do not count": (WEIGHTS, (0.9, 10, 100), 4.703451156616211, 2.0292415618896484),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(), (5, 4)])
def test_softmax_sum_over_labels_that_are_not_ignored(dtype, shape):
    torch.manual_seed(0)
    logits = torch.randn(6, 3, *shape)
    labels = torch.randint(0, 3, (6, *shape), dtype=dtype)
    labels[1] = 255
    total, count = softmax_cross_entropy(logits, labels, 255)
    kept = [0, 2, 3, 4, 5]
    probabilities = logits.softmax(dim=1)[kept]
    picked = probabilities.gather(1, labels[kept].long().unsqueeze(1))
    torch.testing.assert_close(total, -picked.log().sum())
    assert count == labels[kept].numel()
    assert not count.is_floating_point()


def test_softmax_sums_of_parts_make_the_mean_of_the_whole():
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 5, 6, 6), torch.randint(0, 5, (4, 6, 6))
    labels[0, :5] = 0
    parts = [softmax_cross_entropy(logits[i : i + 1], labels[i : i + 1], 0) for i in range(4)]
    mean = sum(total for total, _ in parts) / sum(count for _, count in parts)
    torch.testing.assert_close(mean, F.cross_entropy(logits, labels, ignore_index=0))


def test_everything_ignored_is_zero_with_zero_gradients():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    total, count = softmax_cross_entropy(logits, torch.full((2, 4, 4), 255), 255)
    total.backward()
    assert (total.item(), count.item()) == (0, 0)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("label", [3, -100])
@pytest.mark.parametrize("ignore_label", [None, 255])
def test_a_label_that_is_no_class_is_an_error(label, ignore_label):
    with pytest.raises(IndexError, match=f"{label} is out of bounds"):
        softmax_cross_entropy(torch.zeros(1, 3), torch.tensor([label]), ignore_label)


def test_nothing_is_ignored_without_an_ignore_label():
    total, count = softmax_cross_entropy(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), None)
    assert total.item() == pytest.approx(4 * torch.tensor(3.0).log().item())
    assert count == 4


def test_both_losses_compute_in_float32():
    torch.manual_seed(0)
    logits = torch.randn(8, 3).bfloat16()
    labels = torch.randint(0, 3, (8,))
    total, _ = softmax_cross_entropy(logits, labels, None)
    assert torch.equal(total, softmax_cross_entropy(logits.float(), labels, None)[0])
    total, _ = sigmoid_cross_entropy(logits, F.one_hot(labels))
    assert torch.equal(total, sigmoid_cross_entropy(logits.float(), F.one_hot(labels))[0])
    assert total.dtype == torch.float32


def test_sigmoid_sum_over_samples_and_classes():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 4), torch.randint(0, 2, (6, 4), dtype=torch.uint8)
    total, count = sigmoid_cross_entropy(logits, targets)
    p = logits.double().sigmoid()
    expected = -(targets * p.log() + (1 - targets.double()) * (1 - p).log()).sum()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    assert count == 24


def test_sigmoid_of_far_logits_is_finite():
    total, _ = sigmoid_cross_entropy(torch.tensor([[1e4, -1e4]]), torch.tensor([[0, 1]]))
    assert total.item() == 2e4


@pytest.mark.parametrize(
    ("weights", "hard", "loss", "gradient"), REFERENCE.values(), ids=REFERENCE.keys()
)
def test_softmax_is_the_references(weights, hard, loss, gradient):
    logits, labels = drawn()
    fraction = annealed_fraction(*hard) if hard else None
    total, count = softmax_cross_entropy(
        logits, labels, 255, class_weights=weights, hard_fraction=fraction
    )
    (total / count).backward()
    assert (total / count).item() == pytest.approx(loss, rel=1e-6)
    assert logits.grad.abs().sum().item() == pytest.approx(gradient, rel=1e-6)


def test_without_options_it_is_torchs_to_the_last_bit():
    logits, labels = drawn()
    total, _ = softmax_cross_entropy(logits, labels, 255)
    total.backward()
    gradient, logits.grad = logits.grad, None
    expected = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum")
    expected.backward()
    assert torch.equal(total, expected)
    assert torch.equal(gradient, logits.grad)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_smoothing_moves_the_target_evenly_to_all_classes(weights):
    logits, labels = drawn()
    total, count = softmax_cross_entropy(
        logits, labels, 255, class_weights=weights, label_smoothing=0.2
    )
    kept = labels != 255
    target = 0.8 * F.one_hot(labels[kept], 5) + 0.2 / 5
    losses = -(target * logits.permute(0, 2, 3, 1)[kept].log_softmax(dim=1)).sum(dim=1)
    expected = losses if weights is None else losses * weights[labels[kept]]
    torch.testing.assert_close(total, expected.sum())
    assert count == kept.sum()


def test_hard_pixels_of_smoothed_losses():
    logits, labels = drawn()
    each = F.cross_entropy(
        logits, labels, ignore_index=255, reduction="none", label_smoothing=0.1
    ).flatten()
    total, count = softmax_cross_entropy(
        logits, labels, 255, label_smoothing=0.1, hard_fraction=0.5
    )
    torch.testing.assert_close(total, each.sort(descending=True).values[:99].sum())
    assert count == 99


def test_the_share_of_hard_pixels_falls_linearly():
    shares = [annealed_fraction(0.2, step, 4) for step in range(6)]
    assert shares == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    assert shares[0] == 1.0  # exactly: no pixel may fall out
    assert annealed_fraction(0.2, 0, 0) == 0.2


@pytest.mark.parametrize("ignore_label", [0, 255])
@pytest.mark.parametrize(
    "options",
    [
        {"class_weights": WEIGHTS},
        {"label_smoothing": 0.1},
        {"hard_fraction": 0.25},
        {"class_weights": WEIGHTS, "label_smoothing": 0.1, "hard_fraction": 1.0},
    ],
)
def test_everything_ignored_is_zero_with_every_option(options, ignore_label):
    logits, labels = drawn()
    labels = torch.full_like(labels, ignore_label)
    total, count = softmax_cross_entropy(logits, labels, ignore_label, **options)
    total.backward()
    assert (total.item(), count.item()) == (0, 0)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_weights_of_classified_images():
    total, count = softmax_cross_entropy(
        torch.zeros(4, 5), torch.tensor([0, 2, 2, 3]), None, class_weights=WEIGHTS
    )
    assert total.item() == pytest.approx(4.5 * np.log(5))
    assert count == 4
