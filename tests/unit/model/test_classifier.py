import pytest
import torch

from model.classifier import Classifier
from model.config import ModelConfig


def _classifier(**kwargs):
    torch.manual_seed(0)
    config = {"backbone": "xception41", "width": 0.0625, "middle_units": 1, **kwargs}
    return Classifier(ModelConfig(**config), num_classes=7)


def test_logits_are_linear_in_the_mean_of_the_last_features():
    network = _classifier().eval()
    images = torch.randint(0, 256, (2, 3, 65, 33), dtype=torch.uint8)
    features = network.backbone(images.float() * 2 / 255 - 1).high_level
    assert features.shape[2:] == (3, 2)
    expected = features.flatten(2).mean(dim=2) @ network.classifier.weight.T
    torch.testing.assert_close(network(images), expected)


@pytest.mark.parametrize(("configured", "expected"), [(None, 0.5), (0.2, 0.2)])
def test_dropout(configured, expected):
    assert _classifier(dropout=configured).dropout.p == expected


def test_output_stride_is_32_and_can_be_changed():
    network = _classifier().eval()
    assert network.output_stride == 32
    network.set_output_stride(8)
    assert network.backbone(torch.zeros(1, 3, 65, 65)).high_level.shape[2:] == (9, 9)


def test_timm_backbone_sees_pixels_its_own_way():
    network = _classifier(backbone="timm:mobilenetv3_small_050", width=1, middle_units=None)
    seen = []
    network.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    network(images).sum().backward()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(seen[0], (images / 255 - mean) / std, atol=1e-5, rtol=1e-5)
    assert network.mean_pixel == pytest.approx((123.675, 116.28, 103.53))
    assert network.classifier.weight.grad.any()


def test_every_parameter_learns():
    network = _classifier().train()
    network(torch.randint(0, 256, (4, 3, 65, 65), dtype=torch.uint8)).square().mean().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
