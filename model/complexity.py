"""Multiply-Adds of a network, as they are and as the paper counted them.

The paper's numbers (Tables 3 and 5) are those of TensorFlow 1's profiler, which saw an atrous
convolution as SpaceToBatch does it: on sides rounded up to a multiple of the rate
(docs/networks.md tells how this was found).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from model.blocks import scaled_side
from model.build import build_network
from model.config import ModelConfig, Task

PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """Parameters, Multiply-Adds, and Multiply-Adds in the paper's way of counting."""

    parameters: int
    multiply_adds: int
    paper_multiply_adds: int


def complexity(
    config: ModelConfig,
    task: Task,
    num_classes: int,
    size: tuple[int, int],
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Complexity:
    """Count one image of `size` (height, width), summed over scales and flips; nothing is computed.

    Only convolutions and linear layers count, and of a segmentation nothing after its logits.
    """
    counts = [
        _count(config, task, num_classes, (scaled_side(size[0], s), scaled_side(size[1], s)))
        for s in scales
    ]
    times = 2 if flip else 1
    return Complexity(
        parameters=counts[0].parameters,
        multiply_adds=times * sum(count.multiply_adds for count in counts),
        paper_multiply_adds=times * sum(count.paper_multiply_adds for count in counts),
    )


@cache
def _count(config: ModelConfig, task: Task, num_classes: int, size: tuple[int, int]) -> Complexity:
    """One forward pass without memory, over the layers that run."""
    true = paper = 0

    def count(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        nonlocal true, paper
        assert isinstance(module, nn.Conv2d | nn.Linear)
        true += output.numel() * module.weight[0].numel()
        paper += _padded_numel(module, output) * module.weight[0].numel()

    with torch.device("meta"):
        network = build_network(config, task, num_classes).eval()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    network(torch.empty(1, 3, *size, device="meta"))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Complexity(parameters=parameters, multiply_adds=true, paper_multiply_adds=paper)


def _padded_numel(module: nn.Module, output: torch.Tensor) -> int:
    """Output values with both sides rounded up to a multiple of the layer's atrous rate."""
    if not isinstance(module, nn.Conv2d):
        return output.numel()
    batch, channels, *sides = output.shape
    for side, rate in zip(sides, module.dilation, strict=True):
        batch *= -(-side // rate) * rate
    return batch * channels


class Row(NamedTuple):
    """A model of the paper's Tables 3 and 5 and its Multiply-Adds in billions."""

    table: int
    row: int  # counted over the different models of the table
    paper: float
    config: ModelConfig
    scales: Sequence[float] = (1.0,)
    flip: bool = False

    @property
    def name(self) -> str:
        """Backbone, output stride, and what is added."""
        parts = [
            ("decoder", self.config.decoder is not None),
            ("SC", self.config.separable),
            ("MS", len(self.scales) > 1),
            ("flip", self.flip),
        ]
        added = " ".join(part for part, there in parts if there)
        return f"{self.config.backbone} OS{self.config.output_stride} {added}".strip()

    def measure(self) -> Complexity:
        """Multiply-Adds at 513 x 513 with VOC's 21 classes."""
        return complexity(
            self.config, "segmentation", 21, (513, 513), scales=self.scales, flip=self.flip
        )


def paper_rows() -> Iterator[Row]:
    """The 28 different models of Tables 3 and 5; rows that differ in training alone are one."""
    resnet = {"backbone": "resnet_v1_101_beta", "multi_grid": (1, 2, 4), "separable": False}
    dense = {"backbone": "xception65", "separable": False}
    separable = {"backbone": "xception65"}
    bare: dict[str, Any] = {"decoder": None}
    ms, ms_flip = {"scales": PAPER_SCALES}, {"scales": PAPER_SCALES, "flip": True}
    tables: dict[int, list[tuple[float, dict[str, Any], int, dict[str, Any]]]] = {
        3: [
            (81.02, resnet | bare, 16, {}),
            (276.18, resnet | bare, 8, {}),
            (2435.37, resnet | bare, 8, ms),
            (4870.59, resnet | bare, 8, ms_flip),
            (101.28, resnet, 16, {}),
            (898.69, resnet, 16, ms),
            (1797.23, resnet, 16, ms_flip),
            (297.92, resnet, 8, {}),
            (2623.61, resnet, 8, ms),
            (5247.07, resnet, 8, ms_flip),
            (52.43, resnet | bare, 32, {}),
            (74.20, resnet, 32, {}),
        ],
        5: [
            (68.00, dense | bare, 16, {}),
            (601.74, dense | bare, 16, ms),
            (1203.34, dense | bare, 16, ms_flip),
            (240.85, dense | bare, 8, {}),
            (2149.91, dense | bare, 8, ms),
            (4299.68, dense | bare, 8, ms_flip),
            (89.76, dense, 16, {}),
            (790.12, dense, 16, ms),
            (1580.10, dense, 16, ms_flip),
            (262.59, dense, 8, {}),
            (2338.15, dense, 8, ms),
            (4676.16, dense, 8, ms_flip),
            (54.17, separable, 16, {}),
            (928.81, separable, 16, ms_flip),
            (177.10, separable, 8, {}),
            (3055.35, separable, 8, ms_flip),
        ],
    }
    for table, rows in tables.items():
        for row, (paper, values, output_stride, inference) in enumerate(rows, start=1):
            config = ModelConfig(output_stride=output_stride, **values)
            yield Row(table, row, paper, config, **inference)
