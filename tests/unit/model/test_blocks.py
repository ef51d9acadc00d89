import pytest
import torch
from torch.nn import functional as F

from model.blocks import (
    ConvNorm,
    Norm,
    Normalization,
    Normalize,
    SeparableConv,
    check_output_stride,
    head_conv1x1,
    head_conv3x3,
    initialize,
    resize,
)

NORM = Norm(eps=1e-5)


def _randomize_norms(module):
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
            torch.nn.init.normal_(norm.running_mean)
            torch.nn.init.uniform_(norm.running_var, 0.5, 2)


def _norm(x, part):
    norm = part.norm
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
    )


@pytest.mark.parametrize("pre_activation", [True, False])
@pytest.mark.parametrize(("stride", "rate"), [(1, 1), (2, 1), (1, 3)])
def test_separable_conv_is_its_two_convolutions(pre_activation, stride, rate):
    torch.manual_seed(0)
    conv = SeparableConv(5, 7, NORM, pre_activation=pre_activation).eval()
    conv.set_geometry(stride=stride, rate=rate)
    _randomize_norms(conv)
    x = torch.randn(2, 5, 17, 15)
    kept = x.clone()

    before, between = (
        (F.relu, torch.nn.Identity()) if pre_activation else (torch.nn.Identity(), F.relu)
    )
    weight = conv.depthwise.conv.weight
    y = F.conv2d(before(x), weight, None, stride, rate, rate, groups=5)
    y = _norm(
        F.conv2d(between(_norm(y, conv.depthwise)), conv.pointwise.conv.weight), conv.pointwise
    )

    torch.testing.assert_close(conv(x), between(y))
    assert torch.equal(x, kept), "the input was changed in place"


def test_stride_two_samples_even_positions_of_stride_one():
    torch.manual_seed(0)
    conv = ConvNorm(3, 4, 3, NORM).eval()
    x = torch.randn(1, 3, 12, 13)
    dense = conv(x)
    conv.set_geometry(stride=2, rate=1)
    torch.testing.assert_close(conv(x), dense[:, :, ::2, ::2])


def test_normalize_takes_uint8_and_float_and_keeps_the_mean_pixel_at_zero():
    normalize = Normalize(Normalization(mean=(127.5, 100.25, 3.0), std=(127.5, 50.0, 2.0)))
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    expected = (images.double() - normalize.mean.double()) / normalize.std.double()
    torch.testing.assert_close(normalize(images), expected.float())
    assert torch.equal(normalize(images), normalize(images.float()))
    mean = torch.tensor([127.5, 100.25, 3.0]).view(1, 3, 1, 1)
    assert torch.equal(normalize(mean), torch.zeros(1, 3, 1, 1))
    assert not normalize.state_dict()


def test_resize_keeps_corners_on_corners():
    x = torch.randn(1, 1, 3, 3)
    big = resize(x, (9, 5))
    assert torch.equal(big[..., 0, 0], x[..., 0, 0])
    torch.testing.assert_close(big[..., ::4, ::2], x)


def test_initial_weights_of_the_head():
    torch.manual_seed(0)
    separable = head_conv3x3(512, 64, NORM, separable=True)
    dense = head_conv3x3(64, 64, NORM, separable=False)
    point = head_conv1x1(512, 64, NORM)
    # A normal cut at two sigma has 0.8796 of its standard deviation.
    for weight, std in (
        (separable.depthwise.conv.weight, 0.33),
        (separable.pointwise.conv.weight, 0.06),
    ):
        assert weight.abs().max() <= 2 * std
        assert weight.std().item() == pytest.approx(0.8796 * std, rel=0.03)
    for weight, fans in ((dense.conv.weight, 9 * 128), (point.conv.weight, 512 + 64)):
        bound = (6 / fans) ** 0.5
        assert 0.99 * bound < weight.abs().max() <= bound


def test_initialize_zeroes_the_bias():
    linear = torch.nn.Linear(30, 30)
    initialize(linear, 0.01)
    assert not linear.bias.any()
    assert 0.015 < linear.weight.abs().max() <= 0.02


def test_output_stride_is_checked():
    with pytest.raises(ValueError, match="output_stride is 4; choose one of"):
        check_output_stride(4)
