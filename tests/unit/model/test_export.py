import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model.blocks import resize
from model.build import build_network
from model.config import DecoderConfig, ModelConfig
from model.export import largest_difference, open_program, save_program, trace
from model.fold import fold_batch_norm

TOLERANCE = 1e-4
# Smaller and larger than what was traced; odd, even, mixed.
SIZES = ((1, 33, 65), (3, 64, 48), (1, 131, 134), (3, 97, 129))
TINY = {"backbone": "xception41", "width": 0.125, "middle_units": 1}
DECODER = DecoderConfig(low_level_channels=8, channels=16)


def _network(task="segmentation", **kwargs):
    network = build_network(ModelConfig(aspp_channels=16, **kwargs), task, num_classes=5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def _assert_same(network, program, sizes):
    for size in sizes:
        assert largest_difference(network, program, size) < TOLERANCE, size


@pytest.mark.parametrize(
    ("formats", "config"),
    [
        ((".onnx", ".pt2"), {**TINY, "decoder": DECODER}),
        ((".pt2",), {**TINY, "decoder": None}),
        (
            (".onnx",),
            {"backbone": "timm:resnet18", "decoder": None, "image_level_features": False},
        ),
        (
            (".pt2",),
            {
                "backbone": "timm:mobilenetv3_small_050",
                "decoder": DECODER,
                "image_level_features": False,
                "output_stride": 8,
            },
        ),
        ((".onnx",), {**TINY, "task": "classification"}),
    ],
    ids=["decoder", "image pooling alone", "resnet18", "mobilenetv3", "classifier"],
)
def test_program_equals_the_network_at_any_batch_and_size(
    formats: tuple[str, ...], config: dict[str, object], tmp_path: Path
) -> None:
    network = _network(**config)
    program = trace(fold_batch_norm(network))
    for suffix in formats:
        path = tmp_path / f"network{suffix}"
        save_program(program, path, {})
        _assert_same(network, open_program(path), SIZES)
        if suffix == ".onnx":  # down to feature maps of one position
            _assert_same(network, open_program(path), ((1, 1, 1), (2, 16, 17), (1, 1, 40)))


class _SizeDependent(nn.Module):
    """What the networks above have of operations that depend on the size, and little else."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, images):
        return resize(self.pool(images).mul(1.0), images.shape[2:])


class _SamePool(nn.Module):
    def forward(self, x):
        height, width = x.shape[2:]
        return F.max_pool2d(F.pad(x, (width % 2, 1, height % 2, 1)), 3, 2)


def _timm_pool(kernel_size, stride):
    from timm.layers import AvgPool2dSame

    return AvgPool2dSame(kernel_size, stride)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize(
    "pool",
    [_SamePool, *(partial(_timm_pool, *sizes) for sizes in ((3, 2), (2, 1), (1, 2)))],
    ids=["max", "average 3/2", "average 2/1", "average 1/2"],
)
def test_padding_that_depends_on_the_size(pool, suffix: str, tmp_path: Path) -> None:
    network, path = _SizeDependent(pool()).eval(), tmp_path / f"pool{suffix}"
    save_program(trace(network), path, {})
    sizes = ((1, 33, 65), (3, 64, 48), (1, 131, 134), (3, 7, 8))
    _assert_same(network, open_program(path), sizes)


def test_timm_pads_as_before_after_a_trace() -> None:
    from timm.layers import padding

    original = padding.get_same_padding
    trace(_SizeDependent(_timm_pool(3, 2)))
    assert padding.get_same_padding is original


def test_metadata_and_names_in_both_formats(tmp_path: Path) -> None:
    import onnxruntime

    network = _SizeDependent(_SamePool())
    program, metadata = trace(network), {"class_names": json.dumps(["sky", "Straße"])}
    save_program(program, tmp_path / "a.onnx", metadata)
    save_program(program, tmp_path / "a.pt2", metadata)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    assert session.get_modelmeta().custom_metadata_map == metadata
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, logits.name) == ("images", "logits")
    assert images.shape == ["batch", 3, "height", "width"] == logits.shape
    extra = {"class_names": ""}
    torch.export.load(tmp_path / "a.pt2", extra_files=extra)
    assert extra == metadata


def test_difference_tells_other_weights_other_shapes_and_no_numbers() -> None:
    network = nn.Conv2d(3, 2, 1)
    other = copy.deepcopy(network)
    assert largest_difference(network, other, (2, 5, 4)) == 0
    with torch.no_grad():
        other.bias += 0.01 * network(torch.full((1, 3, 1, 1), 127.0)).abs().max()
    assert 1e-4 < largest_difference(network, other, (2, 5, 4)) < 1
    assert largest_difference(network, lambda x: network(x)[..., :1], (2, 5, 4)) == float("inf")
    nothing = largest_difference(network, lambda x: network(x) * float("nan"), (2, 5, 4))
    assert nothing != nothing
