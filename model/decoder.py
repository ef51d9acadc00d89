"""The decoder of section 3.1 (Fig. 2): sharp boundaries from low-level features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model.blocks import Features, Norm, head_conv1x1, head_conv3x3, resize

if TYPE_CHECKING:
    from model.backbones import Backbone
    from model.config import DecoderConfig


class Join(nn.Module):
    """Upsamples features to finer ones, joins both and refines them (Tables 1, 2)."""

    def __init__(
        self,
        in_channels: int,
        fine_channels: int,
        config: DecoderConfig,
        norm: Norm,
        *,
        separable: bool,
    ) -> None:
        super().__init__()
        self.projection = head_conv1x1(fine_channels, config.low_level_channels, norm)
        channels = in_channels + config.low_level_channels
        self.convs = nn.Sequential()
        for _ in range(config.num_convs):
            self.convs.append(
                head_conv1x1(channels, config.channels, norm)
                if config.kernel_size == 1
                else head_conv3x3(channels, config.channels, norm, separable=separable)
            )
            channels = config.channels

    def forward(self, x: Tensor, fine: Tensor) -> Tensor:
        """(B, C, h, w) and (B, F, H, W) -> (B, channels, H, W)."""
        height, width = fine.shape[2:]
        return self.convs(torch.cat([resize(x, (height, width)), self.projection(fine)], dim=1))


class Decoder(nn.Module):
    """Refines the encoder's output with Conv2 features, or gradually with Conv3 and then Conv2."""

    def __init__(
        self,
        in_channels: int,
        backbone: Backbone,
        config: DecoderConfig,
        norm: Norm,
        *,
        separable: bool,
    ) -> None:
        super().__init__()
        self.conv3 = None
        if "conv3" in config.low_level:
            channels = backbone.mid_level_channels
            self.conv3 = Join(in_channels, channels, config, norm, separable=separable)
            in_channels = config.channels
        channels = backbone.low_level_channels
        self.conv2 = Join(in_channels, channels, config, norm, separable=separable)

    def forward(self, x: Tensor, features: Features) -> Tensor:
        """(B, C, H/OS, W/OS) -> (B, channels, H/4, W/4)."""
        if self.conv3 is not None:
            x = self.conv3(x, features.mid_level)
        return self.conv2(x, features.low_level)
