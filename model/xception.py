"""The modified aligned Xception of section 3.2 (Fig. 4) as released, with 41, 65 or 71 layers."""

from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple, cast

from torch import Tensor, nn

from model.blocks import (
    ConvNorm,
    Features,
    Norm,
    Normalization,
    SeparableConv,
    check_output_stride,
    initialize,
)


class _Plan(NamedTuple):
    """A row of the block table: channels of the three separable convolutions, skip, stride."""

    depths: tuple[int, int, int]
    skip: Literal["conv", "sum", "none"] = "conv"
    stride: int = 2


_ENTRY_41_65 = (_Plan((128,) * 3), _Plan((256,) * 3), _Plan((728,) * 3))
_ENTRY_71 = (
    _Plan((128,) * 3),
    _Plan((256,) * 3, stride=1),
    _Plan((256,) * 3),
    _Plan((728,) * 3, stride=1),
    _Plan((728,) * 3),
)
_MIDDLE = _Plan((728,) * 3, skip="sum", stride=1)
_EXIT = (_Plan((728, 1024, 1024)), _Plan((1536, 1536, 2048), skip="none", stride=1))

# name -> entry flow, units of the middle flow, the entry blocks whose features the decoder takes:
# those that go from stride 4 to 8 and from 8 to 16.
_VARIANTS = {
    "xception41": (_ENTRY_41_65, 8, ("block2", "block3")),
    "xception65": (_ENTRY_41_65, 16, ("block2", "block3")),
    "xception71": (_ENTRY_71, 16, ("block3", "block5")),
}


class Unit(nn.Module):
    """Three separable convolutions and a skip connection; the stride sits on the third."""

    def __init__(self, in_channels: int, plan: _Plan, norm: Norm, *, extra_relu: bool) -> None:
        super().__init__()
        first, second, third = plan.depths
        separable = partial(
            SeparableConv,
            norm=norm,
            # Only the last block, which has no skip, has its ReLUs after the convolutions.
            pre_activation=plan.skip != "none",
            relu_after_depthwise=extra_relu,
        )
        self.separable_conv1 = separable(in_channels, first)
        self.separable_conv2 = separable(first, second)
        self.separable_conv3 = separable(second, third)
        self.shortcut = (
            ConvNorm(in_channels, third, 1, norm, relu=False) if plan.skip == "conv" else None
        )
        self.identity = plan.skip == "sum"
        self.tapped = False

    def set_geometry(self, *, stride: int, rates: tuple[int, int, int]) -> None:
        """Set the unit's stride and the atrous rate of each convolution."""
        self.separable_conv1.set_geometry(stride=1, rate=rates[0])
        self.separable_conv2.set_geometry(stride=1, rate=rates[1])
        self.separable_conv3.set_geometry(stride=stride, rate=rates[2])
        if self.shortcut is not None:
            self.shortcut.set_geometry(stride=stride, rate=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the unit's output and, before any stride, its second convolution's.

        The latter has had no ReLU where the unit is tapped.
        """
        before_stride = self.separable_conv2(self.separable_conv1(x), inplace=True)
        plus = x if self.identity else None
        if self.shortcut is not None:
            plus = self.shortcut(x)
        out = self.separable_conv3(before_stride, plus, inplace=not self.tapped)
        return out, before_stride


class Block(nn.Module):
    """Units of one kind in a row, named unit_1, unit_2, ..."""

    def __init__(
        self, in_channels: int, plan: _Plan, num_units: int, norm: Norm, *, extra_relu: bool
    ) -> None:
        super().__init__()
        self.stride = plan.stride
        for index in range(1, num_units + 1):
            self.add_module(f"unit_{index}", Unit(in_channels, plan, norm, extra_relu=extra_relu))
            in_channels = plan.depths[-1]

    def set_geometry(self, *, stride: int, rates: tuple[int, int, int]) -> None:
        """Set stride and atrous rates of every unit; blocks of several units have no stride."""
        for unit in self.children():
            cast(Unit, unit).set_geometry(stride=stride, rates=rates)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last unit's output and its second convolution's."""
        before_stride = x
        for unit in self.children():
            x, before_stride = unit(x)
        return x, before_stride


class Xception(nn.Module):
    """The backbone: images (B, 3, H, W) in -1..1 -> Features, at a changeable output stride.

    width multiplies every channel count (rounded to a multiple of 8); middle_units None takes the
    variant's own; momentum None takes the reference's 3e-4; multi_grid are factors on the rates of
    the last block's three convolutions. Sides of 16k+1 keep corners aligned.
    """

    normalization = Normalization(mean=(127.5,) * 3, std=(127.5,) * 3)
    output_stride: int

    def __init__(
        self,
        name: str,
        *,
        output_stride: int,
        width: float = 1.0,
        middle_units: int | None = None,
        momentum: float | None = None,
        multi_grid: tuple[int, int, int] = (1, 1, 1),
        relu_after_depthwise: bool = False,
    ) -> None:
        super().__init__()
        if name not in _VARIANTS:
            raise ValueError(f"no Xception is called {name!r}; choose one of {tuple(_VARIANTS)}")
        self.name = name
        entry, default_units, self._tapped = _VARIANTS[name]
        self._multi_grid = multi_grid
        norm = Norm(eps=1e-3) if momentum is None else Norm(eps=1e-3, momentum=momentum)
        stem = (_scaled(32, width), _scaled(64, width))
        self.conv1_1 = ConvNorm(3, stem[0], 3, norm)
        self.conv1_1.set_geometry(stride=2, rate=1)
        self.conv1_2 = ConvNorm(stem[0], stem[1], 3, norm)
        flows, plans = [], ([*entry], [_MIDDLE], [*_EXIT])
        in_channels = stem[1]
        for flow_plans, units in zip(plans, (1, middle_units or default_units, 1), strict=True):
            flow = nn.ModuleDict()
            for index, plan in enumerate(flow_plans, start=1):
                wide = _widened(plan, width)
                flow[f"block{index}"] = Block(
                    in_channels, wide, units, norm, extra_relu=relu_after_depthwise
                )
                in_channels = wide.depths[-1]
            flows.append(flow)
        self.entry_flow, self.middle_flow, self.exit_flow = flows
        for name in self._tapped:
            for unit in self.entry_flow[name].children():
                cast(Unit, unit).tapped = True
        self.low_level_channels, self.mid_level_channels = _scaled(256, width), _scaled(728, width)
        self.high_level_channels = in_channels
        self.set_output_stride(output_stride)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                initialize(module, 0.09)

    def set_output_stride(self, output_stride: int) -> None:
        """Trade strides for atrous rates on the same weights (section 3.1): 8, 16 or 32."""
        check_output_stride(output_stride)
        stride_so_far, rate = 2, 1
        last = self.exit_flow["block2"]
        for block in self._blocks():
            first, second, third = self._multi_grid if block is last else (1, 1, 1)
            rates = (rate * first, rate * second, rate * third)
            if stride_so_far == output_stride:
                block.set_geometry(stride=1, rates=rates)
                # Only what comes after a stride that was left out needs the larger rate.
                rate *= block.stride
            else:
                block.set_geometry(stride=block.stride, rates=rates)
                stride_so_far *= block.stride
        self.output_stride = output_stride

    def forward(self, images: Tensor) -> Features:
        """Extract features from normalised images (B, 3, H, W); only high_level has had a ReLU."""
        x = self.conv1_2(self.conv1_1(images))
        taps = {}
        for name, block in self.entry_flow.items():
            x, before_stride = block(x)
            if name in self._tapped:
                taps[name] = before_stride
        for block in (*self.middle_flow.values(), *self.exit_flow.values()):
            x, _ = block(x)
        low_level, mid_level = self._tapped
        return Features(taps[low_level], taps[mid_level], x)

    def _blocks(self) -> Iterator[Block]:
        for flow in (self.entry_flow, self.middle_flow, self.exit_flow):
            yield from cast(Iterator[Block], flow.values())


def _widened(plan: _Plan, width: float) -> _Plan:
    first, second, third = plan.depths
    depths = (_scaled(first, width), _scaled(second, width), _scaled(third, width))
    return plan._replace(depths=depths)


def _scaled(channels: int, width: float) -> int:
    return max(8, 8 * round(channels * width / 8))
