"""Building blocks every part of the network shares: normalised convolutions and resizing."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OUTPUT_STRIDES = (8, 16, 32)


class Norm(NamedTuple):
    """Constants of batch normalisation; momentum is PyTorch's, 1 - decay."""

    eps: float
    momentum: float = 3e-4


class Normalization(NamedTuple):
    """How a backbone wants its pixels: (x - mean) / std, both RGB in 0..255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Features(NamedTuple):
    """What a backbone extracts: low_level (B, C, H/4, W/4) and high_level (B, C, H/OS, W/OS)."""

    low_level: Tensor
    high_level: Tensor


class Normalize(nn.Module):
    """Pixels of 0..255 to what the backbone was made for: (B, 3, H, W) uint8 or float -> float."""

    mean: Tensor
    std: Tensor

    def __init__(self, normalization: Normalization) -> None:
        super().__init__()
        for name, values in normalization._asdict().items():
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) RGB in 0..255 to the backbone's range; the mean pixel becomes exactly 0."""
        return (images.to(self.mean.dtype) - self.mean) / self.std


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation and, if asked, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        norm: Norm,
        *,
        groups: int = 1,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, eps=norm.eps, momentum=norm.momentum)
        self.relu = relu
        self.set_geometry(stride=1, rate=1)

    def set_geometry(self, *, stride: int, rate: int) -> None:
        """Set stride and atrous rate; symmetric padding keeps corners aligned on 2k+1 pixels."""
        (kernel_size, _) = self.conv.kernel_size
        padding = rate * (kernel_size - 1) // 2
        self.conv.stride = (stride, stride)
        self.conv.dilation = (rate, rate)
        self.conv.padding = (padding, padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, ceil(H / stride), ceil(W / stride))."""
        x = self.norm(self.conv(x))
        return F.relu(x, inplace=True) if self.relu else x


class SeparableConv(nn.Module):
    """Atrous separable convolution, section 3.1 (Fig. 3): 3x3 depthwise, then 1x1 pointwise.

    pre_activation False: depthwise, BN, ReLU, pointwise, BN, ReLU (head, last Xception block).
    pre_activation True: ReLU, depthwise, BN, pointwise, BN (the released Xception everywhere else).
    """

    def __init__(
        self, in_channels: int, out_channels: int, norm: Norm, *, pre_activation: bool
    ) -> None:
        super().__init__()
        relu = not pre_activation
        self.pre_activation = pre_activation
        self.depthwise = ConvNorm(in_channels, in_channels, 3, norm, groups=in_channels, relu=relu)
        self.pointwise = ConvNorm(in_channels, out_channels, 1, norm, relu=relu)

    def set_geometry(self, *, stride: int, rate: int) -> None:
        """Set stride and atrous rate of the depthwise convolution."""
        self.depthwise.set_geometry(stride=stride, rate=rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, ceil(H / stride), ceil(W / stride)), not in place."""
        return self.pointwise(self.depthwise(F.relu(x) if self.pre_activation else x))


def head_conv1x1(in_channels: int, out_channels: int, norm: Norm) -> ConvNorm:
    """1x1 convolution, BN, ReLU of ASPP and decoder, Xavier-initialised."""
    conv = ConvNorm(in_channels, out_channels, 1, norm)
    nn.init.xavier_uniform_(conv.conv.weight)
    return conv


def head_conv3x3(
    in_channels: int, out_channels: int, norm: Norm, *, separable: bool
) -> SeparableConv | ConvNorm:
    """3x3 convolution of ASPP and decoder, separable or dense, initialised as the reference's."""
    if not separable:
        dense = ConvNorm(in_channels, out_channels, 3, norm)
        nn.init.xavier_uniform_(dense.conv.weight)
        return dense
    conv = SeparableConv(in_channels, out_channels, norm, pre_activation=False)
    initialize(conv.depthwise.conv, 0.33)
    initialize(conv.pointwise.conv, 0.06)
    return conv


def initialize(layer: nn.Conv2d | nn.Linear, std: float) -> None:
    """Draw weights from a normal distribution cut at two standard deviations; zero the bias."""
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, C, H, W) bilinearly to size (height, width), corners on corners."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def check_output_stride(output_stride: int) -> None:
    """Raise ValueError unless the output stride is one the network can have."""
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"output_stride is {output_stride}; choose one of {OUTPUT_STRIDES}")
