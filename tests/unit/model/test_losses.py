import pytest
import torch
from torch.nn import functional as F

from model.losses import sigmoid_cross_entropy, softmax_cross_entropy


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
