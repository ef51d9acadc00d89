"""Batch normalisation folded into the convolutions before it, for evaluation only."""

import copy
import warnings
from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.backbones import TimmBackbone
from model.blocks import AtrousConv2d, ConvNorm
from model.deeplab import DeepLab
from model.sync_batch_norm import SyncBatchNorm
from model.xception import Unit


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """A copy of a network in evaluation mode, its batch normalisation part of its convolutions.

    Equal up to rounding. Our own networks can still change their output stride, those around a
    timm backbone no longer. What in timm's cannot be traced keeps its batch norm, with a warning.

    Raises:
        ValueError: the network is, even in part, in training mode.
    """
    training = [name or "the network" for name, m in network.named_modules() if m.training]
    if training:
        raise ValueError(
            f"batch norm can be folded in evaluation mode only, but {training[0]} is in training "
            "mode: call network.eval() first"
        )
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        _fold_children(module)
    return network


def _fold_children(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, ConvNorm):
            setattr(module, name, _FoldedConvNorm(child))
    if isinstance(module, TimmBackbone):
        _fold_timm(module)
    elif isinstance(module, DeepLab):
        module.logits = FoldedConv2d(module.logits)
    elif isinstance(module, Unit):
        _advance_relus(module)


class _FoldedConvNorm(ConvNorm):
    """A ConvNorm with everything it does in its convolution."""

    def __init__(self, original: ConvNorm) -> None:
        nn.Module.__init__(self)
        self.conv = FoldedConv2d(fuse_conv_bn_eval(original.conv, original.norm))
        self.conv.relu, self.relu = original.relu, False
        self.norm = nn.Sequential().eval()  # type: ignore[assignment]
        self.eval()

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, D, ceil(H / stride), ceil(W / stride)); plus is added before ReLU."""
        return self.conv(x, plus)


def _advance_relus(unit: Unit) -> None:
    """Let each convolution do the ReLU that the next begins with: one pass over memory less."""
    convs = (unit.separable_conv1, unit.separable_conv2, unit.separable_conv3)
    for before, after in pairwise(convs):
        needed = unit.tapped and before is unit.separable_conv2
        if after.pre_activation and not needed:
            before.pointwise.relu = True
            after.pre_activation = False


class FoldedConv2d(AtrousConv2d):
    """A convolution with folded batch norm and, if asked, ReLU; weights laid out once for oneDNN.

    torch rearranges them on every call and has no way to add a ReLU. On other devices, with
    gradients or in traces it is an ordinary convolution.
    """

    def __init__(self, folded: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(folded.__dict__)
        self.relu = False
        self._packed: tuple[int, Tensor] | None = None

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, D, H', W'); plus (B, D, H', W'), added before the ReLU, is lost."""
        if plus is None:
            return super().forward(x)
        if not self._has_kernel(x):
            x = super()._convolve(x, self.padding, self.dilation).add_(plus)
            return x.relu_() if self.relu else x
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        after = "relu" if self.relu else None
        add = torch.ops.mkldnn._convolution_pointwise_.binary
        weight = self._weight(x, geometry)
        return add(plus, x, weight, self.bias, *geometry, "add", None, after, [], None)

    def _convolve(
        self, x: Tensor, padding: str | tuple[int, ...], dilation: tuple[int, ...]
    ) -> Tensor:
        if not self._has_kernel(x):
            x = super()._convolve(x, padding, dilation)
            return x.relu_() if self.relu else x
        after = "relu" if self.relu else "none"
        geometry = (padding, self.stride, dilation, self.groups)
        pointwise = torch.ops.mkldnn._convolution_pointwise
        return pointwise(x, self._weight(x, geometry), self.bias, *geometry, after, [], "")

    def _has_kernel(self, x: Tensor) -> bool:
        return (
            x.device.type == self.weight.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
            and not torch.compiler.is_compiling()
        )

    def _weight(self, x: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        version = self.weight._version
        if self._packed is None or self._packed[0] != version:
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            self._packed = version, reorder(self.weight.detach(), *geometry, list(x.shape))
        return self._packed[1]

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self._packed = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}


def _fold(conv_parent: nn.Module, conv: str, norm_parent: nn.Module, norm: str) -> None:
    """Fold and replace both; of the batch norm stays what it does after it, timm's activation."""
    before, after = getattr(conv_parent, conv), getattr(norm_parent, norm)
    fused = fuse_conv_bn_eval(before, after)
    plain = type(before) in (nn.Conv2d, AtrousConv2d) and before.padding_mode == "zeros"
    setattr(conv_parent, conv, FoldedConv2d(fused) if plain else fused)
    setattr(norm_parent, norm, nn.Sequential(*after.children()).eval())


class _Tracer(fx.Tracer):
    """Records how timm's modules call one another, and what their hooks see."""

    def __init__(self) -> None:
        super().__init__()
        self.seen_by_hooks: set[fx.Node] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm2d) or next(m.children(), None) is None

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        if _has_hooks(m):
            proxies = (value for value in (*args, output) if isinstance(value, fx.Proxy))
            self.seen_by_hooks.update(proxy.node for proxy in proxies)
        return output


def _fold_timm(backbone: TimmBackbone) -> None:
    """Fold where a trace shows that a convolution's result goes to one batch norm alone."""
    from timm.layers import BatchNormAct2d, Conv2dSame

    modules = dict(backbone.features.named_modules())
    # Their subclasses may compute something else, such as standardised weights.
    convs, norms = (nn.Conv2d, Conv2dSame), (nn.BatchNorm2d, BatchNormAct2d, SyncBatchNorm)
    if not any(type(module) in norms for module in modules.values()):
        return
    tracer = _Tracer()
    try:
        # A copy, because hooks keep what they saw.
        calls = [
            node
            for node in tracer.trace(copy.deepcopy(backbone.features)).nodes
            if node.op == "call_module"
        ]
    except Exception as error:
        warnings.warn(f"timm:{backbone.name} keeps its batch norm: {error}", stacklevel=3)
        return
    count = Counter(str(node.target) for node in calls)
    for norm in calls:
        conv = norm.args[0]
        if not isinstance(conv, fx.Node) or conv.op != "call_module":
            continue
        pair = str(conv.target), str(norm.target)
        fits = type(modules[pair[0]]) in convs and type(modules[pair[1]]) in norms
        alone = len(conv.users) == count[pair[0]] == count[pair[1]] == 1
        seen = conv in tracer.seen_by_hooks or any(_has_hooks(modules[name]) for name in pair)
        if fits and alone and not seen:
            _fold(*_place(modules, pair[0]), *_place(modules, pair[1]))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _place(modules: dict[str, nn.Module], path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return modules[parent], name
