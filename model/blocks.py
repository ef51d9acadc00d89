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
    """What a backbone extracts, the paper's Conv2, Conv3 and last features.

    low_level (B, C, H/4, W/4), mid_level (B, C, H/8, W/8), high_level (B, C, H/OS, W/OS).
    """

    low_level: Tensor
    mid_level: Tensor
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


class AtrousConv2d(nn.Conv2d):
    """Convolution (B, C, H, W) -> (B, D, H', W'), faster than torch's where that is slow on CPUs.

    A depthwise convolution at rate r is r * r plain ones, each of every r-th pixel: exactly equal.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H', W')."""
        if not self._in_phases(x):
            return self._convolve(x, self.padding, self.dilation)
        # All taps but the middle one lie outside at any rate from the longer side on.
        rate = min(self.dilation[0], max(x.shape[2:]))
        phases = self._convolve(_split(x, rate), (1, 1), (1, 1))
        joined = _join(phases, rate)[..., : x.shape[2], : x.shape[3]]
        # Batch norm's backward pass is ten times slower on what has gaps.
        return joined.contiguous(memory_format=torch.channels_last)

    def _convolve(
        self, x: Tensor, padding: str | tuple[int, ...], dilation: tuple[int, ...]
    ) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, dilation, self.groups)

    def _in_phases(self, x: Tensor) -> bool:
        """oneDNN has no depthwise kernels for the gradients at rates, nor for rates above 6."""
        rate = self.dilation[0]
        return (
            not torch.compiler.is_compiling()  # first, so that a trace holds no guards
            and rate > (1 if torch.is_grad_enabled() else 6)
            and self.groups == self.in_channels == self.out_channels
            and (self.kernel_size, self.stride) == ((3, 3), (1, 1))
            and x.device.type == "cpu"
            and x.is_contiguous(memory_format=torch.channels_last)
        )


def _split(x: Tensor, rate: int) -> Tensor:
    """Every rate-th pixel as an image: channels-last (B, C, H, W) -> (B rate rate, C, h, w)."""
    batch, channels, height, width = x.shape
    rows, columns = -(-height // rate), -(-width // rate)
    x = F.pad(x, (0, columns * rate - width, 0, rows * rate - height)).permute(0, 2, 3, 1)
    x = x.reshape(batch, rows, rate, columns, rate, channels).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(-1, rows, columns, channels).permute(0, 3, 1, 2)


def _join(x: Tensor, rate: int) -> Tensor:
    """The reverse of _split, with its padding."""
    _, channels, rows, columns = x.shape
    x = x.permute(0, 2, 3, 1).reshape(-1, rate, rate, rows, columns, channels)
    x = x.permute(0, 3, 1, 4, 2, 5).reshape(-1, rows * rate, columns * rate, channels)
    return x.permute(0, 3, 1, 2)


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
        self.conv = AtrousConv2d(in_channels, out_channels, kernel_size, groups=groups, bias=False)
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

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, D, ceil(H / stride), ceil(W / stride)); plus is added before ReLU."""
        x = self.norm(self.conv(x))
        if plus is not None:
            x += plus
        return F.relu(x, inplace=True) if self.relu else x


class SeparableConv(nn.Module):
    """Atrous separable convolution, section 3.1 (Fig. 3): 3x3 depthwise, then 1x1 pointwise.

    pre_activation False: depthwise, BN, ReLU, pointwise, BN, ReLU (head, last Xception block).
    pre_activation True: ReLU, depthwise, BN, pointwise, BN (the released Xception everywhere else);
    relu_after_depthwise adds the ReLU between them that the paper's section 3.2 has.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: Norm,
        *,
        pre_activation: bool,
        relu_after_depthwise: bool = False,
    ) -> None:
        super().__init__()
        relu = not pre_activation
        self.pre_activation = pre_activation
        self.depthwise = ConvNorm(
            in_channels,
            in_channels,
            3,
            norm,
            groups=in_channels,
            relu=relu or relu_after_depthwise,
        )
        self.pointwise = ConvNorm(in_channels, out_channels, 1, norm, relu=relu)

    def set_geometry(self, *, stride: int, rate: int) -> None:
        """Set stride and atrous rate of the depthwise convolution."""
        self.depthwise.set_geometry(stride=stride, rate=rate)

    def forward(self, x: Tensor, plus: Tensor | None = None, *, inplace: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, D, ceil(H / stride), ceil(W / stride)); inplace may overwrite x.

        `plus` (B, D, ...) is added before the last ReLU.
        """
        if self.pre_activation:
            x = F.relu(x, inplace=inplace)
        return self.pointwise(self.depthwise(x), plus)


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


def scaled_side(side: int, scale: float) -> int:
    """The side of an image, or of its features, at a scale: 16k+1 stays aligned at halves, doubles.

    It is the reference's scale_dimension.
    """
    return int((side - 1) * scale + 1)


def check_output_stride(output_stride: int) -> None:
    """Raise ValueError unless the output stride is one the network can have."""
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"output_stride is {output_stride}; choose one of {OUTPUT_STRIDES}")
