"""From configuration to network, and what a trainer must know about a network's parameters."""

from __future__ import annotations

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


def decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weight decay on convolution and linear weights only.

    Depthwise weights, batch normalisation and biases are not decayed, as in the reference.
    """
    decayed = {id(module.weight) for module in network.modules() if _is_decayed(module)}
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


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
