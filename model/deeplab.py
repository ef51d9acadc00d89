"""DeepLabv3+ (Fig. 2): backbone, ASPP, decoder and logits; without decoder it is DeepLabv3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from model.aspp import ASPP
from model.backbones import build_backbone
from model.blocks import Features, Norm, Normalize, initialize, resize
from model.decoder import Decoder

if TYPE_CHECKING:
    from model.config import ModelConfig


class DeepLab(nn.Module):
    """RGB images (B, 3, H, W), uint8 or float in 0..255 -> logits of every pixel (B, K, H, W)."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        output_stride = config.output_stride or 16
        momentum = config.batch_norm.momentum
        norm = Norm(eps=1e-5) if momentum is None else Norm(eps=1e-5, momentum=momentum)
        self.backbone = build_backbone(config, output_stride)
        self.normalize = Normalize(self.backbone.normalization)
        self.aspp = ASPP(
            self.backbone.high_level_channels,
            config.aspp_channels,
            norm,
            output_stride=output_stride,
            separable=config.separable,
            image_level_features=config.image_level_features,
            dropout=0.1 if config.dropout is None else config.dropout,
        )
        channels, self.decoder = config.aspp_channels, None
        if config.decoder is not None:
            separable = config.decoder.separable
            self.decoder = Decoder(
                channels,
                self.backbone,
                config.decoder,
                norm,
                separable=config.separable if separable is None else separable,
            )
            channels = config.decoder.channels
        self.logits = nn.Conv2d(channels, num_classes, 1)
        initialize(self.logits, 0.01)

    @property
    def mean_pixel(self) -> tuple[float, float, float]:
        """The RGB colour in 0..255 that the network sees as zero; pad with it."""
        return self.backbone.normalization.mean

    @property
    def output_stride(self) -> int:
        """Input side over the side of the encoder's features."""
        return self.backbone.output_stride

    def set_output_stride(self, output_stride: int) -> None:
        """Change the encoder's density on the same weights, e.g. train at 16 and evaluate at 8."""
        self.backbone.set_output_stride(output_stride)
        self.aspp.set_output_stride(output_stride)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H, W) at the size of the images (B, 3, H, W), float32."""
        height, width = images.shape[2:]
        # In float32, so that lower precision does not tie class scores between pixels.
        return resize(self.forward_low_resolution(images).float(), (height, width))

    def forward_low_resolution(self, images: Tensor, image_mean: Tensor | None = None) -> Tensor:
        """Logits before the last upsampling: (B, K, H/4, W/4), or H/OS, W/OS without decoder.

        `image_mean` (B, C, 1, 1): `features(...).high_level` averaged over the whole image, where
        `images` are parts of it.
        """
        features = self.features(images)
        x = self.aspp(features.high_level, image_mean)
        if self.decoder is not None:
            x = self.decoder(x, features)
        return self.logits(x)

    def features(self, images: Tensor) -> Features:
        """What the backbone extracts from RGB images (B, 3, H, W) in 0..255."""
        return self.backbone(self.normalize(images))
