"""The reference's ResNet v1: as timm's but with the stride in a block's last unit.

Its checkpoints and the paper's Table 3 need this: the features before striding that the decoder
takes (Conv2, section 3.1) are there only where the last unit strides. Every other ResNet is timm's.
"""

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from model.blocks import ConvNorm, Features, Norm, Normalization, check_output_stride

# name -> units of the four blocks, root of three 3x3 convolutions instead of one 7x7
_VARIANTS = {
    "resnet_v1_50": ((3, 4, 6, 3), False),
    "resnet_v1_50_beta": ((3, 4, 6, 3), True),
    "resnet_v1_101": ((3, 4, 23, 3), False),
    "resnet_v1_101_beta": ((3, 4, 23, 3), True),
}
_EXPANSION = 4


class Unit(nn.Module):
    """A bottleneck: 1x1, 3x3 (stride and rate), 1x1, and ReLU after the sum with the shortcut."""

    def __init__(self, in_channels: int, channels: int, norm: Norm) -> None:
        super().__init__()
        out_channels = _EXPANSION * channels
        self.conv1 = ConvNorm(in_channels, channels, 1, norm)
        self.conv2 = ConvNorm(channels, channels, 3, norm)
        self.conv3 = ConvNorm(channels, out_channels, 1, norm, relu=False)
        self.shortcut = (
            ConvNorm(in_channels, out_channels, 1, norm, relu=False)
            if in_channels != out_channels
            else None
        )
        self.stride = 1

    def set_geometry(self, *, stride: int, rate: int) -> None:
        """Set stride and atrous rate of the 3x3 convolution, and the stride of the shortcut."""
        self.stride = stride
        self.conv2.set_geometry(stride=stride, rate=rate)
        if self.shortcut is not None:
            self.shortcut.set_geometry(stride=stride, rate=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the unit's output and the residual before the sum (after batch norm, no ReLU)."""
        residual = self.conv3(self.conv2(self.conv1(x)))
        if self.shortcut is not None:
            shortcut = self.shortcut(x)
        else:
            shortcut = x[:, :, :: self.stride, :: self.stride] if self.stride > 1 else x
        return F.relu(residual + shortcut, inplace=True), residual


class ResNet(nn.Module):
    """The backbone: normalised images (B, 3, H, W) -> Features, at a changeable output stride.

    Networks with _beta take images in -1..1, the others images less ImageNet's mean colour.
    multi_grid are factors on the rates of the last block's units; momentum None takes 0.05.
    """

    output_stride: int

    def __init__(
        self,
        name: str,
        *,
        output_stride: int,
        momentum: float | None = None,
        multi_grid: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        super().__init__()
        if name not in _VARIANTS:
            raise ValueError(f"no ResNet is called {name!r}; choose one of {tuple(_VARIANTS)}")
        self.name = name
        num_units, beta = _VARIANTS[name]
        norm = Norm(eps=1e-5, momentum=0.05 if momentum is None else momentum)
        self.multi_grid = multi_grid
        self.root = _root(beta, norm)
        channels = 128 if beta else 64
        for block, units in enumerate(num_units, start=1):
            width = 32 * 2**block
            self.add_module(f"block{block}", _block(channels, width, units, norm))
            channels = _EXPANSION * width
        self.low_level_channels, self.mid_level_channels = _EXPANSION * 64, _EXPANSION * 128
        self.high_level_channels = channels
        self.normalization = (
            Normalization(mean=(127.5,) * 3, std=(127.5,) * 3)
            if beta
            else Normalization(mean=(123.15, 115.90, 103.06), std=(1.0,) * 3)
        )
        self.set_output_stride(output_stride)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def set_output_stride(self, output_stride: int) -> None:
        """Trade strides for atrous rates on the same weights: 8, 16 or 32."""
        check_output_stride(output_stride)
        stride_so_far, rate = 4, 1
        for block in self._blocks():
            *units, last = block.children()
            is_last_block = block is self.block4
            for unit, factor in zip(
                (*units, last),
                self.multi_grid if is_last_block else (1,) * len(block),
                strict=True,
            ):
                cast(Unit, unit).set_geometry(stride=1, rate=rate * factor)
            if is_last_block:
                continue
            if stride_so_far == output_stride:
                # Only what comes after the stride that was left out needs the larger rate.
                rate *= 2
            else:
                cast(Unit, last).set_geometry(stride=2, rate=1)
                stride_so_far *= 2
        self.output_stride = output_stride

    def forward(self, images: Tensor) -> Features:
        """Extract features from normalised images (B, 3, H, W); only high_level has had a ReLU."""
        x, taps = _max_pool(self.root(images)), []
        for block in self._blocks():
            # The residual before the last unit, which strides.
            *units, last = block.children()
            residual = x
            for unit in units:
                x, residual = unit(x)
            x, _ = last(x)
            taps.append(residual)
        return Features(taps[0], taps[1], x)

    def _blocks(self) -> Iterator[nn.ModuleDict]:
        for number in (1, 2, 3, 4):
            yield cast(nn.ModuleDict, getattr(self, f"block{number}"))


def _root(beta: bool, norm: Norm) -> nn.Sequential:
    if not beta:
        convs = {"conv1": ConvNorm(3, 64, 7, norm)}
    else:
        convs = {
            "conv1_1": ConvNorm(3, 64, 3, norm),
            "conv1_2": ConvNorm(64, 64, 3, norm),
            "conv1_3": ConvNorm(64, 128, 3, norm),
        }
    next(iter(convs.values())).set_geometry(stride=2, rate=1)
    root = nn.Sequential()
    for name, conv in convs.items():
        root.add_module(name, conv)
    return root


def _block(in_channels: int, channels: int, num_units: int, norm: Norm) -> nn.ModuleDict:
    units = nn.ModuleDict()
    for index in range(1, num_units + 1):
        units[f"unit_{index}"] = Unit(in_channels, channels, norm)
        in_channels = _EXPANSION * channels
    return units


def _max_pool(x: Tensor) -> Tensor:
    """3x3 max-pooling with stride 2, padded as TensorFlow's SAME: one before odd sides only.

    Padding with zeros is exact after a ReLU.
    """
    height, width = x.shape[2:]
    return F.max_pool2d(F.pad(x, (width % 2, 1, height % 2, 1)), kernel_size=3, stride=2)
