"""Atrous spatial pyramid pooling: DeepLabv3's head, the encoder's last part (section 3.1)."""

import torch
from torch import Tensor, nn

from model.blocks import Norm, check_output_stride, head_conv1x1, head_conv3x3
from model.sync_batch_norm import SyncBatchNorm


def atrous_rates(output_stride: int) -> tuple[int, int, int]:
    """Rates of the 3x3 branches: (6, 12, 18) at output stride 16, as wide in pixels at others."""
    check_output_stride(output_stride)
    rate = 96 // output_stride
    return rate, 2 * rate, 3 * rate


class ASPP(nn.Module):
    """Image pooling, 1x1 and three atrous 3x3 branches, joined: (B, C, H, W) -> (B, D, H, W)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        norm: Norm,
        *,
        output_stride: int,
        separable: bool = True,
        image_level_features: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.image_pooling = (
            head_conv1x1(in_channels, channels, norm) if image_level_features else None
        )
        self.branch0 = head_conv1x1(in_channels, channels, norm)
        self.branch1 = head_conv3x3(in_channels, channels, norm, separable=separable)
        self.branch2 = head_conv3x3(in_channels, channels, norm, separable=separable)
        self.branch3 = head_conv3x3(in_channels, channels, norm, separable=separable)
        num_branches = 4 + image_level_features
        self.projection = head_conv1x1(num_branches * channels, channels, norm)
        self.dropout = nn.Dropout(dropout)
        self.set_output_stride(output_stride)

    def set_output_stride(self, output_stride: int) -> None:
        """Set the branches' rates for features of this output stride."""
        rates = atrous_rates(output_stride)
        for branch, rate in zip((self.branch1, self.branch2, self.branch3), rates, strict=True):
            branch.set_geometry(stride=1, rate=rate)

    def forward(self, x: Tensor, image_mean: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, D, H, W); ValueError when BN would train on one pooled value.

        `image_mean` (B, C, 1, 1) is the mean of the whole image's features where x is a part of it.
        """
        branches = [self.branch0(x), self.branch1(x), self.branch2(x), self.branch3(x)]
        if self.image_pooling is not None:
            mean = x.mean(dim=(2, 3), keepdim=True) if image_mean is None else image_mean
            # In the memory layout of the others, which the concatenation would lose.
            pooled = torch.zeros_like(branches[0]) + self._pooled(mean)
            branches.insert(0, pooled)  # first, as in the released weights
        return self.dropout(self.projection(torch.cat(branches, dim=1)))

    def _pooled(self, mean: Tensor) -> Tensor:
        assert self.image_pooling is not None
        norm = self.image_pooling.norm
        num_workers = norm.num_workers if isinstance(norm, SyncBatchNorm) else 1
        if norm.training and mean.shape[0] * num_workers == 1:
            raise ValueError(
                "image-level features cannot be batch-normalised over a batch of 1 image: give "
                "each worker at least 2 at a time, or set model.batch_norm.frozen: true, "
                "model.batch_norm.sync: true where there are more workers, or "
                "model.image_level_features: false"
            )
        return self.image_pooling(mean)
