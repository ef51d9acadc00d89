"""Weights published elsewhere, under our names: TensorFlow's DeepLab checkpoints, and timm's."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.backbones import pixel_normalization
from model.blocks import Normalization
from model.build import Network, build_network
from model.resnet import ResNet
from model.xception import Xception

if TYPE_CHECKING:
    from model.config import ModelConfig, Task

Variables = Mapping[str, NDArray[Any]]

# PyTorch's own count of batches, which no other format has.
COUNTER = ".num_batches_tracked"
_AVERAGE = "/ExponentialMovingAverage"
# What a training run saves beside its network (slots of optimizers, counters, averages), and the
# ImageNet classifier of a backbone.
_LEFT_OUT = re.compile(
    r"/(Momentum|RMSProp|Adam|Adagrad|Ftrl|ExponentialMovingAverage)(_\d+)?$"
    r"|(^|/)(global_step|beta\d_power|learning_rate)$"
    r"|^(xception|resnet_v1)_\d+/logits/"
)
# Ours -> the reference's, applied in this order; {net} is the variable scope of the backbone.
_TENSORFLOW = (
    (r"^backbone\.conv1_", "{net}/entry_flow/conv1_"),
    (r"^backbone\.root\.", "{net}/"),
    (r"^backbone\.(\w+_flow)\.(block\d)\.(unit_\d+)\.", r"{net}/\1/\2/\3/xception_module/"),
    (r"^backbone\.(block\d)\.(unit_\d+)\.", r"{net}/\1/\2/bottleneck_v1/"),
    (r"^aspp\.image_pooling", "image_pooling"),
    (r"^aspp\.branch", "aspp"),
    (r"^aspp\.projection", "concat_projection"),
    (r"^classifier\.", "{net}/logits."),
    (r"^logits\.", "logits/semantic."),
    (r"\.(depthwise|pointwise)\.", r"_\1."),
    (r"_depthwise\.conv\.weight$", "_depthwise/depthwise_weights"),
    (r"\.norm\.weight$", "/BatchNorm/gamma"),
    (r"\.norm\.bias$", "/BatchNorm/beta"),
    (r"\.norm\.running_mean$", "/BatchNorm/moving_mean"),
    (r"\.norm\.running_var$", "/BatchNorm/moving_variance"),
    (r"(\.conv)?\.weight$", "/weights"),
    (r"\.bias$", "/biases"),
)


@dataclass(frozen=True, kw_only=True)
class Imported:
    """Which tensors of a network foreign variables give, and what becomes of the others."""

    tensors: dict[str, Tensor]
    missing: tuple[str, ...]  # tensors of the network that no variable gives
    left_out: tuple[str, ...]  # variables of a training run, or of another task's classifier
    unplaced: tuple[str, ...]  # variables of some network that this one has no place for
    num_classes: int

    def report(self) -> str:
        """One line with counts and names."""
        counts = {
            "tensors of the network without a variable": self.missing,
            "variables left out (training state, ImageNet classifier)": self.left_out,
            "variables without a place in the network": self.unplaced,
        }
        parts = [f"{len(self.tensors)} variables placed"]
        parts += [f"{len(n)} {what}: {_some(n)}" for what, n in counts.items() if n]
        return "; ".join(parts)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def read_variables(path: str) -> dict[str, NDArray[Any]]:
    """The variables of a TensorFlow checkpoint (its prefix), or of an .npz made from one.

    Raises:
        ValueError: no such file, damaged, or a checkpoint where TensorFlow is not installed.
    """
    if path.endswith(".npz"):
        return _read_npz(Path(path))
    if not Path(f"{path}.index").is_file():
        raise ValueError(
            f"{path}: no checkpoint: there is no {path}.index; name the prefix of model.ckpt.index "
            "and model.ckpt.data-…, or an .npz file of its variables"
        )
    try:
        import tensorflow
    except ImportError:
        raise ValueError(
            f"{path}: TensorFlow reads its own format: pip install 'atrous[tensorflow]', or where "
            "there is TensorFlow save the variables with numpy.savez(NAME.npz, **variables)"
        ) from None
    try:
        reader = tensorflow.train.load_checkpoint(path)
        return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    except Exception as error:  # it raises IndexError and others, by what is damaged
        raise ValueError(f"{path}: TensorFlow cannot read it, it is damaged: {error}") from error


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name.removesuffix(":0"): file[name] for name in file.files}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not an .npz file of plain arrays: {error}") from None


def from_tensorflow(
    config: ModelConfig, task: Task, variables: Variables, *, moving_averages: bool = False
) -> Imported:
    """Place the variables of a released TensorFlow DeepLab graph in the network of a configuration.

    The network gets as many classes as the variables have. moving_averages takes the exponential
    moving average of a variable, where there is one, instead of its last value.

    Raises:
        ValueError: the reference has no such backbone; a variable has another shape than its place,
            or values that are not finite.
    """
    with torch.device("meta"):
        network = build_network(config, task, num_classes=1)
    names = tensorflow_names(network)
    last = next(name for name in names if name in ("logits.bias", "classifier.bias"))
    num_classes = len(variables.get(names[last], (None,)))
    with torch.device("meta"):
        own = build_network(config, task, num_classes).state_dict()
    tensors: dict[str, Tensor] = {}
    used = set()
    for name, foreign in names.items():
        average = foreign + _AVERAGE
        key = average if moving_averages and average in variables else foreign
        if key in variables:
            tensors[name] = _placed(name, own[name], key, variables[key])
            used |= {key, foreign}
    rest = sorted(set(variables) - used)
    left_out = tuple(name for name in rest if _LEFT_OUT.search(name))
    return Imported(
        tensors=tensors,
        missing=tuple(name for name in names if name not in tensors),
        left_out=left_out,
        unplaced=tuple(name for name in rest if name not in left_out),
        num_classes=num_classes,
    )


def _placed(name: str, place: Tensor, key: str, variable: NDArray[Any]) -> Tensor:
    values = variable.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{key} has values that are not finite: the checkpoint is damaged")
    if values.ndim == 4:
        # [height, width, in, out], but of depthwise weights [height, width, in, 1].
        depthwise = key.removesuffix(_AVERAGE).endswith("depthwise_weights")
        values = values.transpose((2, 3, 0, 1) if depthwise else (3, 2, 0, 1))
        if place.ndim == 2 and values.shape[2:] == (1, 1):  # a classifier
            values = values[:, :, 0, 0]
    if values.shape != place.shape:
        raise ValueError(
            f"{key} {list(variable.shape)} does not fit {name} {list(place.shape)}: describe the "
            "checkpoint's network (model:) and number of classes as they are"
        )
    return torch.from_numpy(np.ascontiguousarray(values))


def tensorflow_names(network: Network) -> dict[str, str]:
    """Name of each parameter and statistic of a network -> the reference graph's variable.

    Raises:
        ValueError: the backbone is none of those the reference has.
    """
    backbone = network.backbone
    if isinstance(backbone, Xception):
        scope = backbone.name.replace("xception", "xception_")
    elif isinstance(backbone, ResNet):
        scope = backbone.name.removesuffix("_beta")
    else:
        raise ValueError(
            "TensorFlow's DeepLab checkpoints are of the Xceptions and resnet_v1 networks: set "
            "model.backbone to one of these"
        )
    names = [name for name in network.state_dict() if not name.endswith(COUNTER)]
    gradual = any(name.startswith("decoder.conv3.") for name in names)
    return {name: _tensorflow_name(name, scope, gradual) for name in names}


def _tensorflow_name(name: str, scope: str, gradual: bool) -> str:
    if name.startswith("decoder."):
        name = _decoder_name(name, suffix="_1" if gradual and ".conv2." in name else "")
    for ours, theirs in _TENSORFLOW:
        name = re.sub(ours, theirs.replace("{net}", scope), name)
    return name


def _decoder_name(name: str, suffix: str) -> str:
    """`suffix` tells the second join of a gradual decoder, which the reference numbers."""
    _, _, part, *rest = name.split(".")
    if part == "projection":
        return ".".join([f"decoder/feature_projection0{suffix}", *rest])
    number, *rest = rest
    if rest[0] in ("depthwise", "pointwise"):
        return ".".join([f"decoder/decoder_conv{number}{suffix}", *rest])
    dense = f"decoder/decoder_conv0{suffix}/decoder_conv0{suffix}_{int(number) + 1}"
    return ".".join([dense, *rest])


def timm_weights(name: str, normalization: Normalization) -> dict[str, Tensor]:
    """The published weights of a timm network (NAME or NAME.TAG), under timm's names.

    They are downloaded, or come from the cache of an earlier download.

    Raises:
        ValueError: timm has no such weights, they cannot be had here, or they were trained on
            pixels normalised otherwise.
    """
    import timm
    from timm.data import resolve_model_data_config

    try:
        network = timm.create_model(name, pretrained=True)
    except Exception as error:  # of timm, of the hub's client, of the network: all say why
        raise ValueError(
            f"timm:{name}: no weights ({type(error).__name__}: {error}); without access to the hub "
            "name a downloaded file instead: start_from: /path/model.safetensors"
        ) from error
    found = pixel_normalization(resolve_model_data_config(network))
    if found != normalization:
        raise ValueError(f"timm:{name} wants pixels as {found}, model.backbone {normalization}")
    return network.state_dict()


def timm_names(names: Iterable[str]) -> dict[str, str]:
    """Name of each tensor of a backbone -> that of the same network in timm.

    A timm backbone of ours differs in a prefix, one of our Xceptions also in how its parts are
    called. The reference's ResNets have no twin there: nothing is returned for them.
    """
    backbone = [name.removeprefix("backbone.") for name in names if name.startswith("backbone.")]
    blocks = list(dict.fromkeys(_BLOCK.findall(" ".join(backbone))))
    found = {}
    for name in backbone:
        if name.startswith("features."):
            found[f"backbone.{name}"] = name.removeprefix("features.")
        elif blocks:
            found[f"backbone.{name}"] = _timm_xception_name(name, blocks)
    return found


_BLOCK = re.compile(r"((?:entry|middle|exit)_flow\.block\d+\.unit_\d+)\.")


def _timm_xception_name(name: str, blocks: list[str]) -> str:
    if block := _BLOCK.match(name):
        name = f"blocks.{blocks.index(block[1])}.{name[block.end() :]}"
    for ours, theirs in (
        (r"^conv1_1\.", "stem.0."),
        (r"^conv1_2\.", "stem.1."),
        (r"\.separable_conv(\d)\.", r".stack.conv\1."),
        (r"\.depthwise\.conv\.", ".conv_dw."),
        (r"\.depthwise\.norm\.", ".bn_dw."),
        (r"\.pointwise\.conv\.", ".conv_pw."),
        (r"\.pointwise\.norm\.", ".bn_pw."),
        (r"\.norm\.", ".bn."),
    ):
        name = re.sub(ours, theirs, name)
    return name
