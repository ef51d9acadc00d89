import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model.blocks import SeparableConv
from model.xception import Unit, Xception


def _small(name="xception65", output_stride=16, **kwargs):
    torch.manual_seed(0)
    return Xception(name, output_stride=output_stride, width=0.0625, middle_units=2, **kwargs)


def _geometry(backbone):
    """Strides of the third depthwise convolution and rates of the first, per block."""
    blocks = [
        block.unit_1
        for flow in (backbone.entry_flow, backbone.middle_flow, backbone.exit_flow)
        for block in flow.values()
    ]
    strides = [unit.separable_conv3.depthwise.conv.stride[0] for unit in blocks]
    rates = [unit.separable_conv1.depthwise.conv.dilation[0] for unit in blocks]
    for unit, stride, rate in zip(blocks, strides, rates, strict=True):
        parts = (unit.separable_conv1, unit.separable_conv2, unit.separable_conv3)
        assert [part.depthwise.conv.dilation[0] for part in parts] == [rate] * 3
        assert [part.depthwise.conv.padding[0] for part in parts] == [rate] * 3
        assert [part.depthwise.conv.stride[0] for part in parts] == [1, 1, stride]
        if unit.shortcut is not None:
            assert unit.shortcut.conv.stride == (stride, stride)
    return strides, rates


@pytest.mark.parametrize(
    ("name", "output_stride", "strides", "rates"),
    [
        ("xception65", 32, [2, 2, 2, 1, 2, 1], [1, 1, 1, 1, 1, 1]),
        ("xception65", 16, [2, 2, 2, 1, 1, 1], [1, 1, 1, 1, 1, 2]),
        ("xception41", 8, [2, 2, 1, 1, 1, 1], [1, 1, 1, 2, 2, 4]),
        ("xception71", 16, [2, 1, 2, 1, 2, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 2]),
        ("xception71", 8, [2, 1, 2, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 2, 2, 4]),
    ],
)
def test_strides_become_rates_for_the_blocks_after(name, output_stride, strides, rates):
    with torch.device("meta"):
        backbone = Xception(name, output_stride=32)
    backbone.set_output_stride(output_stride)
    assert _geometry(backbone) == (strides, rates)
    assert backbone.output_stride == output_stride


@pytest.mark.parametrize("name", ["xception41", "xception65", "xception71"])
def test_denser_features_contain_the_sparser_ones(name):
    backbone = _small(name).eval()
    images = torch.rand(1, 3, 65, 97) * 2 - 1
    features = {}
    with torch.no_grad():
        for output_stride in (8, 16, 32):
            backbone.set_output_stride(output_stride)
            features[output_stride] = backbone(images)
    dense = features[8]
    assert dense.high_level.shape[2:] == (9, 13)
    assert dense.low_level.shape == (1, backbone.low_level_channels, 17, 25)
    assert dense.high_level.shape[1] == backbone.high_level_channels
    for output_stride, step in ((16, 2), (32, 4)):
        sparse = features[output_stride]
        torch.testing.assert_close(sparse.high_level, dense.high_level[:, :, ::step, ::step])
        assert torch.equal(sparse.low_level, dense.low_level)


@pytest.mark.parametrize(("name", "block"), [("xception65", "block2"), ("xception71", "block3")])
def test_low_level_features_are_the_second_convolution_before_stride_and_relu(name, block):
    backbone = _small(name).eval()
    seen = []
    second = backbone.entry_flow[block].unit_1.separable_conv2
    second.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    features = backbone(torch.rand(2, 3, 33, 33) * 2 - 1)
    assert torch.equal(features.low_level, seen[0])
    assert (features.low_level < 0).any()
    assert (features.high_level >= 0).all()
    assert (features.high_level > 0).any()


def _unit(unit, x):
    """Section 3.2's unit in functions, with random running statistics left at 0 and 1."""
    y = x
    for part in (unit.separable_conv1, unit.separable_conv2, unit.separable_conv3):
        depthwise, pointwise = part.depthwise.conv, part.pointwise.conv
        y = F.conv2d(F.relu(y), depthwise.weight, None, depthwise.stride, 1, 1, 1 * y.shape[1])
        y = F.conv2d(y / (1 + 1e-3) ** 0.5, pointwise.weight) / (1 + 1e-3) ** 0.5
    if unit.shortcut is not None:
        return y + F.conv2d(x, unit.shortcut.conv.weight, None, 2) / (1 + 1e-3) ** 0.5
    return y + x


@pytest.mark.parametrize("where", ["entry_flow", "middle_flow"])
def test_unit_has_its_relus_before_the_depthwise_convolutions_and_none_on_the_skip(where):
    backbone = _small().eval()
    unit = getattr(backbone, where)["block1"].unit_1
    assert isinstance(unit, Unit)
    x = torch.randn(2, unit.separable_conv1.depthwise.conv.in_channels, 9, 9)
    torch.testing.assert_close(unit(x)[0], _unit(unit, x))


def test_last_block_has_its_relus_after_every_convolution_and_no_skip():
    unit = _small().exit_flow["block2"].unit_1
    assert unit.shortcut is None
    assert not unit.identity
    for part in (unit.separable_conv1, unit.separable_conv2, unit.separable_conv3):
        assert (part.pre_activation, part.depthwise.relu, part.pointwise.relu) == (
            False,
            True,
            True,
        )


@pytest.mark.parametrize(("momentum", "expected"), [(None, 3e-4), (0.1, 0.1)])
def test_batch_norm_constants(momentum, expected):
    norms = [m for m in _small(momentum=momentum).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, expected)}


def test_all_convolutions_start_from_one_truncated_normal():
    torch.manual_seed(0)
    backbone = Xception("xception41", output_stride=16, width=0.25, middle_units=1)
    weights = [m.weight.flatten() for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    assert max(weight.abs().max().item() for weight in weights) <= 0.18
    assert torch.cat(weights).std().item() == pytest.approx(0.8796 * 0.09, rel=0.01)


def test_width_and_units():
    with torch.device("meta"):
        backbone = Xception("xception65", output_stride=16, width=0.25, middle_units=3)
    assert (backbone.low_level_channels, backbone.high_level_channels) == (64, 512)
    assert backbone.conv1_1.conv.out_channels == 8
    assert len(backbone.middle_flow["block1"]._modules) == 3
    assert {p.shape[0] % 8 for p in backbone.parameters()} == {0}


def test_unknown_name_and_output_stride():
    with pytest.raises(ValueError, match=r"'xception66'.*xception65"):
        Xception("xception66", output_stride=16)
    with pytest.raises(ValueError, match="output_stride is 12"):
        _small(output_stride=12)


def test_multi_grid_multiplies_the_rates_of_the_last_blocks_three_convolutions():
    backbone = _small(output_stride=16, multi_grid=(1, 2, 4))
    units = [block.unit_1 for block in backbone.exit_flow.values()]
    rates = [
        [getattr(unit, f"separable_conv{i}").depthwise.conv.dilation[0] for i in (1, 2, 3)]
        for unit in units
    ]
    assert rates == [[1, 1, 1], [2, 4, 8]]
    backbone.set_output_stride(32)
    assert units[1].separable_conv3.depthwise.conv.dilation == (4, 4)


def test_the_papers_extra_relu_follows_every_depthwise_convolution():
    released, papers = _small().eval(), _small(relu_after_depthwise=True).eval()
    papers.load_state_dict(released.state_dict())
    relus = [m.depthwise.relu for m in papers.modules() if isinstance(m, SeparableConv)]
    assert all(relus)
    images = torch.rand(1, 3, 33, 33) * 2 - 1
    unit, of_paper = released.entry_flow["block1"].unit_1, papers.entry_flow["block1"].unit_1
    x = torch.randn(1, 8, 9, 9)
    conv = unit.separable_conv1
    expected = conv.pointwise(F.relu(conv.depthwise(F.relu(x))))
    torch.testing.assert_close(of_paper.separable_conv1(x), expected)
    with torch.no_grad():
        ratio = papers(images).low_level.abs().mean() / released(images).low_level.abs().mean()
    assert not 0.99 < ratio < 1.01


@pytest.mark.parametrize(("name", "block"), [("xception41", "block3"), ("xception71", "block5")])
def test_mid_level_features_are_those_before_stride_16(name, block):
    backbone = _small(name).eval()
    seen = []
    second = backbone.entry_flow[block].unit_1.separable_conv2
    second.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    features = backbone(torch.rand(1, 3, 65, 33) * 2 - 1)
    assert torch.equal(features.mid_level, seen[0])
    assert features.mid_level.shape == (1, backbone.mid_level_channels, 9, 5)
