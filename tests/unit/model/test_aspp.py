import pytest
import torch

from model.aspp import ASPP, atrous_rates
from model.blocks import Norm
from model.build import freeze_batch_norm

NORM = Norm(eps=1e-5)


def _aspp(**kwargs):
    torch.manual_seed(0)
    return ASPP(12, 4, NORM, output_stride=16, **kwargs)


@pytest.mark.parametrize(
    ("output_stride", "rates"), [(8, (12, 24, 36)), (16, (6, 12, 18)), (32, (3, 6, 9))]
)
@pytest.mark.parametrize("separable", [True, False])
def test_rates_follow_the_output_stride(output_stride, rates, separable):
    aspp = _aspp(separable=separable)
    aspp.set_output_stride(output_stride)
    assert atrous_rates(output_stride) == rates
    branches = (aspp.branch1, aspp.branch2, aspp.branch3)
    convs = [(branch.depthwise if separable else branch).conv for branch in branches]
    assert [(conv.dilation, conv.padding) for conv in convs] == [((r, r), (r, r)) for r in rates]


@pytest.mark.parametrize("separable", [True, False])
def test_branches_are_joined_image_pooling_first(separable):
    aspp = _aspp(separable=separable).eval()
    x = torch.randn(2, 12, 9, 7)
    pooled = aspp.image_pooling(torch.nn.functional.adaptive_avg_pool2d(x, 1))
    branches = [aspp.branch0(x), aspp.branch1(x), aspp.branch2(x), aspp.branch3(x)]
    joined = torch.cat([pooled.repeat(1, 1, 9, 7), *branches], dim=1)
    torch.testing.assert_close(aspp(x), aspp.projection(joined))


def test_without_image_level_features():
    aspp = _aspp(image_level_features=False)
    assert aspp.projection.conv.in_channels == 16
    assert not [name for name in aspp.state_dict() if "pool" in name]
    assert aspp.train()(torch.randn(1, 12, 5, 5)).shape == (1, 4, 5, 5)


def test_dropout_only_while_training():
    aspp = _aspp(dropout=0.5)
    x = torch.randn(8, 12, 5, 5)
    aspp.train()
    assert not torch.equal(aspp(x), aspp(x))
    aspp.eval()
    assert torch.equal(aspp(x), aspp(x))


def test_a_batch_of_one_image_cannot_train_batch_norm():
    aspp = _aspp().train()
    one = torch.randn(1, 12, 5, 5)
    with pytest.raises(ValueError, match=r"batch of 1 image.*frozen: true"):
        aspp(one)
    freeze_batch_norm(aspp)
    assert aspp(one).shape == (1, 4, 5, 5)
