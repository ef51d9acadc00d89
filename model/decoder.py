"""The decoder of section 3.1 (Fig. 2): sharp boundaries from low-level features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model.blocks import Norm, head_conv1x1, head_conv3x3, resize

if TYPE_CHECKING:
    from model.config import DecoderConfig


class Decoder(nn.Module):
    """Joins encoder features with reduced low-level ones and refines them (Tables 1, 2)."""

    def __init__(
        self,
        encoder_channels: int,
        low_level_channels: int,
        config: DecoderConfig,
        norm: Norm,
        *,
        separable: bool = True,
    ) -> None:
        super().__init__()
        self.low_level_projection = head_conv1x1(
            low_level_channels, config.low_level_channels, norm
        )
        in_channels = encoder_channels + config.low_level_channels
        self.convs = nn.Sequential()
        for _ in range(config.num_convs):
            self.convs.append(head_conv3x3(in_channels, config.channels, norm, separable=separable))
            in_channels = config.channels
        self.out_channels = config.channels

    def forward(self, encoded: Tensor, low_level: Tensor) -> Tensor:
        """(B, E, h, w) and (B, L, H, W) -> (B, channels, H, W)."""
        height, width = low_level.shape[2:]
        upsampled = resize(encoded, (height, width))
        return self.convs(torch.cat([upsampled, self.low_level_projection(low_level)], dim=1))
