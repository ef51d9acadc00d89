import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model.resnet import ResNet, _max_pool


def _geometry(backbone):
    """(stride of the last unit, rates of all) of each block's 3x3 convolutions."""
    blocks = [list(block.children()) for block in backbone._blocks()]
    for *units, _ in blocks:
        assert {unit.conv2.conv.stride for unit in units} == {(1, 1)}
    return (
        [units[-1].conv2.conv.stride[0] for units in blocks],
        [sorted({unit.conv2.conv.dilation[0] for unit in units}) for units in blocks],
    )


@pytest.mark.parametrize(
    ("output_stride", "strides", "rates"),
    [
        (32, [2, 2, 2, 1], [[1], [1], [1], [1, 2, 4]]),
        (16, [2, 2, 1, 1], [[1], [1], [1], [2, 4, 8]]),
        (8, [2, 1, 1, 1], [[1], [1], [2], [4, 8, 16]]),
    ],
)
def test_strides_become_rates_and_multi_grid_multiplies_the_last_blocks(
    output_stride, strides, rates
):
    with torch.device("meta"):
        backbone = ResNet("resnet_v1_101_beta", output_stride=32, multi_grid=(1, 2, 4))
        backbone.set_output_stride(output_stride)
        assert _geometry(backbone) == (strides, rates)
        features = backbone(torch.empty(1, 3, 65, 97))
    assert features.low_level.shape == (1, 256, 17, 25)
    assert features.mid_level.shape == (1, 512, 9, 13)
    assert features.high_level.shape == (1, 2048, 64 // output_stride + 1, 96 // output_stride + 1)


def test_denser_features_contain_the_sparser_ones():
    torch.manual_seed(0)
    backbone = ResNet("resnet_v1_50_beta", output_stride=8).eval().double()
    images = torch.rand(1, 3, 65, 97, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        dense = backbone(images)
        backbone.set_output_stride(32)
        sparse = backbone(images)
    torch.testing.assert_close(sparse.high_level, dense.high_level[:, :, ::4, ::4])
    assert torch.equal(sparse.low_level, dense.low_level)


def test_low_and_mid_level_features_are_residuals_before_the_units_that_stride():
    torch.manual_seed(0)
    backbone = ResNet("resnet_v1_50", output_stride=16).eval()
    seen = {}
    for block, unit in (("block1", "unit_2"), ("block2", "unit_3")):
        conv = getattr(backbone, block)[unit].conv3
        conv.register_forward_hook(lambda m, a, out, block=block: seen.update({block: out.clone()}))
    features = backbone(torch.randn(1, 3, 33, 33))
    assert torch.equal(features.low_level, seen["block1"])
    assert torch.equal(features.mid_level, seen["block2"])
    assert (features.low_level < 0).any()
    assert (features.high_level >= 0).all()


@pytest.mark.parametrize("size", [(9, 9), (8, 8), (9, 8), (8, 13), (1, 2), (1, 1)])
def test_max_pooling_is_padded_as_tensorflows_same(size):
    x = torch.rand(2, 3, *size)
    pads = []
    for side in reversed(size):
        total = max((-(-side // 2) - 1) * 2 + 3 - side, 0)
        pads += [total // 2, total - total // 2]
    expected = F.max_pool2d(F.pad(x, pads, value=-torch.inf), 3, 2)
    assert torch.equal(_max_pool(x), expected)


def test_roots_and_their_pixels():
    with torch.device("meta"):
        plain = ResNet("resnet_v1_101", output_stride=16)
        beta = ResNet("resnet_v1_101_beta", output_stride=16)
    kernels = [m.kernel_size for m in plain.root.modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [(7, 7)]
    channels = [m.out_channels for m in beta.root.modules() if isinstance(m, nn.Conv2d)]
    assert channels == [64, 64, 128]
    assert plain.normalization == ((123.15, 115.90, 103.06), (1.0, 1.0, 1.0))
    assert beta.normalization == ((127.5,) * 3, (127.5,) * 3)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"resnet_v1_18.*choose one of"):
        ResNet("resnet_v1_18", output_stride=16)
