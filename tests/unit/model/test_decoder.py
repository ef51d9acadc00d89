import pytest
import torch
from torch.nn import functional as F

from model.blocks import ConvNorm, Norm, SeparableConv
from model.config import DecoderConfig
from model.decoder import Decoder


def _decoder(separable=True, **kwargs):
    torch.manual_seed(0)
    config = DecoderConfig(low_level_channels=3, channels=8, **kwargs)
    return Decoder(6, 10, config, Norm(eps=1e-5), separable=separable).eval()


def test_encoder_features_come_first_and_are_resized_corner_to_corner():
    decoder = _decoder()
    encoded, low_level = torch.randn(2, 6, 3, 4), torch.randn(2, 10, 9, 13)
    big = F.interpolate(encoded, (9, 13), mode="bilinear", align_corners=True)
    joined = torch.cat([big, decoder.low_level_projection(low_level)], dim=1)
    expected = decoder.convs[1](decoder.convs[0](joined))
    torch.testing.assert_close(decoder(encoded, low_level), expected)


@pytest.mark.parametrize("num_convs", [1, 2, 3])
@pytest.mark.parametrize(("separable", "kind"), [(True, SeparableConv), (False, ConvNorm)])
def test_number_and_kind_of_convolutions(num_convs, separable, kind):
    decoder = _decoder(separable, num_convs=num_convs)
    assert [type(conv) for conv in decoder.convs] == [kind] * num_convs
    assert decoder(torch.randn(1, 6, 2, 2), torch.randn(1, 10, 5, 5)).shape == (1, 8, 5, 5)
    assert decoder.out_channels == 8
