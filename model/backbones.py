"""Backbones to choose from: the Xceptions here, and every timm network that can be made atrous."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.blocks import Features, Normalization, check_output_stride
from model.resnet import ResNet
from model.sync_batch_norm import SyncBatchNorm, synchronize_batch_norm
from model.xception import Xception

if TYPE_CHECKING:
    from model.config import ModelConfig

_TIMM = "timm:"


class TimmBackbone(nn.Module):
    """A timm network with random weights: images (B, 3, H, W), normalised its way -> Features.

    momentum None leaves timm's. Raises ValueError when timm does not know the name, or the network
    cannot have the output stride or has no features at stride 4 for the decoder.
    """

    def __init__(self, name: str, *, output_stride: int, momentum: float | None = None) -> None:
        from timm.data import resolve_model_data_config

        super().__init__()
        self.name = name
        self.output_stride = output_stride
        self.momentum = momentum
        self.features = _create(name, output_stride, momentum)
        info = self.features.feature_info
        reductions = info.reduction()
        for stride in (4, 8):
            if stride not in reductions:
                raise ValueError(
                    f"timm:{name} has features at strides {reductions} but none at {stride}, which "
                    "the decoder needs; choose another backbone, e.g. timm:resnet50"
                )
        if reductions[-1] != output_stride:
            raise ValueError(
                f"timm:{name} ends at stride {reductions[-1]} when asked for {output_stride}; "
                "choose another backbone or output_stride"
            )
        self._low_level, self._mid_level = reductions.index(4), reductions.index(8)
        self.low_level_channels: int = info.channels()[self._low_level]
        self.mid_level_channels: int = info.channels()[self._mid_level]
        self.high_level_channels: int = info.channels()[-1]
        self.normalization = pixel_normalization(resolve_model_data_config(self.features))

    def set_output_stride(self, output_stride: int) -> None:
        """Change the output stride on the same parameters, which stay the same objects.

        timm fixes strides when it builds a network, so one is built at the new stride, without
        memory, and given the parameters, buffers and training modes of the old one.
        """
        if output_stride == self.output_stride:
            return
        with torch.device("meta"):
            rebuilt = _create(self.name, output_stride, self.momentum)
        if any(isinstance(module, SyncBatchNorm) for module in self.features.modules()):
            synchronize_batch_norm(rebuilt)
        if _shapes(rebuilt) != _shapes(self.features):
            raise ValueError(
                f"timm:{self.name} has other weights at output_stride {output_stride} than at "
                f"{self.output_stride}: rebuild the network with that output_stride"
            )
        _share_state(self.features, rebuilt)
        self.features, self.output_stride = rebuilt, output_stride

    def forward(self, images: Tensor) -> Features:
        """Extract features from normalised images (B, 3, H, W)."""
        maps = self.features(images)
        return Features(maps[self._low_level], maps[self._mid_level], maps[-1])


Backbone: TypeAlias = Xception | ResNet | TimmBackbone


def build_backbone(config: ModelConfig, output_stride: int) -> Backbone:
    """Build the backbone a configuration names, with random weights.

    Raises:
        ValueError: the configuration asks for what this backbone has not.
    """
    _check_fits(config)
    momentum, name = config.batch_norm.momentum, config.backbone
    if name.startswith(_TIMM):
        return TimmBackbone(
            name.removeprefix(_TIMM), output_stride=output_stride, momentum=momentum
        )
    if name.startswith("resnet"):
        return ResNet(
            name, output_stride=output_stride, momentum=momentum, multi_grid=config.multi_grid
        )
    return Xception(
        name,
        output_stride=output_stride,
        width=config.width,
        middle_units=config.middle_units,
        momentum=momentum,
        multi_grid=config.multi_grid,
        relu_after_depthwise=config.relu_after_depthwise,
    )


def _check_fits(config: ModelConfig) -> None:
    """Raise ValueError for values that the backbone would pass over."""
    fields = type(config).model_fields
    of_xception = ("width", "middle_units", "relu_after_depthwise")
    foreign = {"xception": (), "resnet_v": of_xception, _TIMM: (*of_xception, "multi_grid")}
    for name in next(f for family, f in foreign.items() if config.backbone.startswith(family)):
        value = getattr(config, name)
        if value != fields[name].default:
            raise ValueError(
                f"model.{name}: {value} is not for {config.backbone}: leave it out or choose "
                "one of Atrous's own backbones that has it (model.backbone says which there are)"
            )


def _create(name: str, output_stride: int, momentum: float | None) -> Any:
    # Here, because the Xceptions work where timm is not installed.
    import timm

    check_output_stride(output_stride)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; {hint}")
    try:
        features = timm.create_model(
            name, features_only=True, output_stride=output_stride, pretrained=False
        )
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"timm:{name} cannot give features at output_stride {output_stride} "
            f"({type(error).__name__}: {error}); choose another backbone or output_stride"
        ) from error
    if momentum is not None:
        for module in features.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = momentum
    return features


def pixel_normalization(data: Mapping[str, Any]) -> Normalization:
    """The normalisation of pixels in 0..255 that a timm data configuration (of 0..1) means."""
    (r, g, b), (s, t, u) = data["mean"], data["std"]
    return Normalization(mean=(255 * r, 255 * g, 255 * b), std=(255 * s, 255 * t, 255 * u))


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    tensors = (*network.named_parameters(), *network.named_buffers())
    return {name: tensor.shape for name, tensor in tensors}


def _share_state(source: nn.Module, target: nn.Module) -> None:
    target.train(source.training)
    sources = dict(source.named_modules())
    for name, module in target.named_modules():
        # Modules of one network only, such as a pooling that replaces a stride, hold no tensors.
        if name in sources:
            # The dictionaries themselves, so that moving or casting one network cannot part them.
            module._parameters = sources[name]._parameters
            module._buffers = sources[name]._buffers
            module.training = sources[name].training
