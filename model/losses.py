"""Losses as (sum, count): divided once, by the count of the whole global batch."""

import torch
from torch import Tensor
from torch.nn import functional as F

# A label nobody has; F.cross_entropy would otherwise leave out -100.
_NOTHING_IGNORED = torch.iinfo(torch.int64).min


def softmax_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_label: int | None,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    hard_fraction: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropies and number of labels not ignored, computed in float32.

    logits (B, K, ...), labels (B, ...) uint8 or int64 in 0..K-1 or ignore_label. When every label
    is ignored the sum is 0 and has zero gradients. As in the reference:
    - class_weights (K,), the factor on the loss where the label is that class, leave the count;
    - hard_fraction sums only this share of all B * ... losses, the largest. Ignored labels have
      loss 0 and are in the share's base; the count is that of the summed losses other than 0. A
      worker mines its own batch, as the reference's clones do theirs.
    label_smoothing moves this much of the target from the label to all K classes evenly.
    """
    labels = labels.long()
    ignore_index = _NOTHING_IGNORED if ignore_label is None else ignore_label
    kept = labels != ignore_index
    each = class_weights is not None or hard_fraction is not None
    losses = F.cross_entropy(
        logits.float(),
        labels,
        ignore_index=ignore_index,
        reduction="none" if each else "sum",
        label_smoothing=label_smoothing,
    )
    if class_weights is not None:
        # An ignored label need not be a class; its loss is 0 under any weight.
        losses = losses * class_weights[labels.masked_fill(~kept, 0)]
    if hard_fraction is not None:
        return _hardest(losses.flatten(), hard_fraction)
    return losses.sum(), kept.sum()


def annealed_fraction(fraction: float, step: int, anneal: int) -> float:
    """Share of pixels that hard pixel mining keeps at a step (from 0), falling linearly.

    It is 1 at step 0 and `fraction` from step `anneal` on; anneal 0 is `fraction` throughout.
    """
    progress = min(1.0, step / anneal) if anneal else 1.0
    return progress * fraction + (1 - progress)


def sigmoid_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of binary cross-entropies and their number B*K, computed in float32.

    logits (B, K), targets (B, K) in 0..1.
    """
    total = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="sum")
    return total, torch.tensor(targets.numel(), device=targets.device)


def _hardest(losses: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Sum of the largest of the losses (N,), int(fraction * N) of them, and how many are not 0."""
    count = int(fraction * len(losses))
    hardest = losses.topk(count, sorted=False).values if count < len(losses) else losses
    return hardest.sum(), hardest.count_nonzero()
