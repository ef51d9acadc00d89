"""From configuration to network, and what a trainer must know about a network's parameters."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.classifier import Classifier
from model.deeplab import DeepLab

if TYPE_CHECKING:
    from model.config import ModelConfig, Task

Network: TypeAlias = DeepLab | Classifier


def build_network(config: ModelConfig, task: Task, num_classes: int) -> Network:
    """Build the network of a task with random weights drawn from torch's global generator.

    output_stride None becomes 16 for segmentation and 32 for the other tasks.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; a network needs at least 1 class")
    match task:
        case "segmentation":
            return DeepLab(config, num_classes)
        case "classification" | "multilabel":
            return Classifier(config, num_classes)
    raise ValueError(f"task is {task!r}; choose classification, multilabel or segmentation")


def parameter_groups(
    network: nn.Module,
    weight_decay: float,
    lr_multipliers: Mapping[str, float] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, named and in the order of their names.

    Weight decay is on convolution and linear weights only: depthwise weights, batch normalisation
    and biases are not decayed, as in the reference. `lr_multipliers` are factors on the rate of
    parameters whose name begins so (whole parts between dots); the longest beginning counts.

    Raises:
        ValueError: no parameter's name begins so.
    """
    decayed = {id(module.weight) for module in network.modules() if _is_decayed(module)}
    named = sorted(network.named_parameters(), key=lambda item: item[0])
    _check_beginnings(lr_multipliers, [name for name, _ in named])
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            beginning = max((b for b in lr_multipliers if _begins(name, b)), key=len, default="")
            factor = lr_multipliers.get(beginning, 1.0)
            decay = weight_decay if id(parameter) in decayed else 0.0
            groups.setdefault((factor, decay), []).append((name, parameter))
    return [
        {"params": members, "lr_multiplier": factor, "weight_decay": decay}
        for (factor, decay), members in groups.items()
    ]


def _begins(name: str, beginning: str) -> bool:
    return f"{name}.".startswith(f"{beginning}.")


def _check_beginnings(beginnings: Iterable[str], names: list[str]) -> None:
    known = sorted({name.split(".")[0] for name in names})
    for beginning in beginnings:
        if not any(_begins(name, beginning) for name in names):
            near = difflib.get_close_matches(beginning, {*known, *names}, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"lr_multipliers: no parameter's name begins with {beginning!r}; {hint}"
                f"names begin with {', '.join(known)}"
            )


def freeze_batch_norm(network: nn.Module) -> None:
    """Make batch normalisation use and keep its running statistics; gamma and beta still train.

    network.train() undoes it, so call this after every network.train().
    """
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def _is_decayed(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        depthwise = module.groups == module.in_channels > 1
        return not depthwise
    return isinstance(module, nn.Linear)
