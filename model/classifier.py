"""Image classification, single-label or multi-label: how backbones are pretrained (section 4.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from model.backbones import build_backbone
from model.blocks import Normalize, initialize

if TYPE_CHECKING:
    from model.config import ModelConfig


class Classifier(nn.Module):
    """RGB images (B, 3, H, W), uint8 or float 0..255 -> logits (B, K)."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.backbone = build_backbone(config, config.output_stride or 32)
        self.normalize = Normalize(self.backbone.normalization)
        self.dropout = nn.Dropout(0.5 if config.dropout is None else config.dropout)
        self.classifier = nn.Linear(self.backbone.high_level_channels, num_classes)
        # The reference initialises it like the Xception's convolutions.
        initialize(self.classifier, 0.09)

    @property
    def mean_pixel(self) -> tuple[float, float, float]:
        """The RGB colour in 0..255 that the network sees as zero; pad with it."""
        return self.backbone.normalization.mean

    @property
    def output_stride(self) -> int:
        """Input side over the side of the features that are pooled."""
        return self.backbone.output_stride

    def set_output_stride(self, output_stride: int) -> None:
        """Change the density of the features on the same weights."""
        self.backbone.set_output_stride(output_stride)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, 3, H, W)."""
        features = self.backbone(self.normalize(images))
        return self.classifier(self.dropout(features.high_level.mean(dim=(2, 3))))
