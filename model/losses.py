"""Losses as (sum, count): divided once, by the count of the whole global batch."""

import torch
from torch import Tensor
from torch.nn import functional as F

# A label nobody has; F.cross_entropy would otherwise leave out -100.
_NOTHING_IGNORED = torch.iinfo(torch.int64).min


def softmax_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_label: int | None
) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropies and number of labels not ignored, computed in float32.

    logits (B, K, ...), labels (B, ...) uint8 or int64 in 0..K-1 or ignore_label. When every label
    is ignored the sum is 0 and has zero gradients.
    """
    labels = labels.long()
    ignore_index = _NOTHING_IGNORED if ignore_label is None else ignore_label
    total = F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum")
    return total, (labels != ignore_index).sum()


def sigmoid_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of binary cross-entropies and their number B*K, computed in float32.

    logits (B, K), targets (B, K) in 0..1.
    """
    total = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="sum")
    return total, torch.tensor(targets.numel(), device=targets.device)
