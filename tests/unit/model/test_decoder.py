import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model.blocks import ConvNorm, Features, Norm, SeparableConv
from model.config import DecoderConfig
from model.decoder import Decoder


class _Backbone(nn.Module):
    low_level_channels, mid_level_channels = 10, 12


def _decoder(separable=True, **kwargs):
    torch.manual_seed(0)
    config = DecoderConfig(low_level_channels=3, channels=8, **kwargs)
    return Decoder(6, _Backbone(), config, Norm(eps=1e-5), separable=separable).eval()


def _features():
    return Features(torch.randn(2, 10, 9, 13), torch.randn(2, 12, 5, 7), torch.empty(0))


def _join(join, x, fine):
    big = F.interpolate(x, fine.shape[2:], mode="bilinear", align_corners=True)
    x = torch.cat([big, join.projection(fine)], dim=1)
    for conv in join.convs:
        x = conv(x)
    return x


def test_encoder_features_come_first_and_are_resized_corner_to_corner():
    decoder, encoded, features = _decoder(), torch.randn(2, 6, 3, 4), _features()
    expected = _join(decoder.conv2, encoded, features.low_level)
    torch.testing.assert_close(decoder(encoded, features), expected)


def test_the_gradual_decoder_joins_conv3_and_then_conv2():
    decoder, encoded, features = (
        _decoder(low_level=("conv3", "conv2"), num_convs=1),
        torch.randn(2, 6, 3, 4),
        _features(),
    )
    middle = _join(decoder.conv3, encoded, features.mid_level)
    assert middle.shape == (2, 8, 5, 7)
    expected = _join(decoder.conv2, middle, features.low_level)
    torch.testing.assert_close(decoder(encoded, features), expected)


@pytest.mark.parametrize("num_convs", [1, 2, 3])
@pytest.mark.parametrize(
    ("separable", "kernel_size", "kind"),
    [(True, 3, SeparableConv), (False, 3, ConvNorm), (True, 1, ConvNorm), (False, 1, ConvNorm)],
)
def test_number_and_kind_of_convolutions(num_convs, separable, kernel_size, kind):
    decoder = _decoder(separable, num_convs=num_convs, kernel_size=kernel_size)
    assert [type(conv) for conv in decoder.conv2.convs] == [kind] * num_convs
    kernels = {m.kernel_size[0] for m in decoder.conv2.convs.modules() if isinstance(m, nn.Conv2d)}
    assert max(kernels) == kernel_size
    assert decoder(torch.randn(2, 6, 2, 2), _features()).shape == (2, 8, 9, 13)


def test_the_order_of_low_level_features_is_fixed():
    with pytest.raises(ValueError, match="low_level"):
        DecoderConfig(low_level=("conv2", "conv3"))
