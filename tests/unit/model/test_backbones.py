import copy

import pytest
import timm
import torch
from torch import nn

from model import backbones
from model.backbones import TimmBackbone, build_backbone
from model.build import freeze_batch_norm
from model.config import ModelConfig
from model.xception import Xception

NAMES = ["resnet18", "convnext_atto", "mobilenetv3_small_050", "efficientnet_lite0", "xception41"]


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_050"])
def test_forward_and_backward(name):
    backbone = TimmBackbone(name, output_stride=16)
    features = backbone(torch.randn(2, 3, 64, 96))
    assert features.low_level.shape == (2, backbone.low_level_channels, 16, 24)
    assert features.high_level.shape == (2, backbone.high_level_channels, 4, 6)
    features.high_level.square().mean().backward()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_sizes_at_every_output_stride(name):
    with torch.device("meta"):
        backbone = TimmBackbone(name, output_stride=32)
        for output_stride in (32, 16, 8):
            backbone.set_output_stride(output_stride)
            features = backbone(torch.empty(1, 3, 64, 64))
            assert features.low_level.shape[2:] == (16, 16)
            side = 64 // output_stride
            assert features.high_level.shape[1:] == (backbone.high_level_channels, side, side)


def test_switching_keeps_parameter_objects_and_modes():
    backbone = TimmBackbone("test_resnet", output_stride=16, momentum=0.2).train()
    freeze_batch_norm(backbone)
    next(backbone.parameters()).requires_grad_(False)
    before = [(name, id(p), p.requires_grad) for name, p in backbone.named_parameters()]
    modes = {name: module.training for name, module in backbone.named_modules()}
    backbone.set_output_stride(8)
    assert [(name, id(p), p.requires_grad) for name, p in backbone.named_parameters()] == before
    after = {name: module.training for name, module in backbone.named_modules()}
    assert {name: mode for name, mode in after.items() if modes.get(name, mode) != mode} == {}
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.training) for norm in norms} == {(0.2, False)}


def test_switching_draws_no_random_numbers():
    backbone = TimmBackbone("test_resnet", output_stride=16)
    state = torch.get_rng_state()
    backbone.set_output_stride(8)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_copy_is_independent():
    backbone = TimmBackbone("xception41", output_stride=16)
    with torch.no_grad():
        twin = copy.deepcopy(backbone).eval()
        images = torch.randn(1, 3, 32, 32)
        expected = twin(images).high_level
        for parameter in backbone.parameters():
            parameter.zero_()
        assert torch.equal(twin(images).high_level, expected)


def test_switching_that_would_change_the_weights_is_refused():
    with torch.device("meta"):
        # Its fifth block has a shortcut convolution only where it has a stride.
        backbone = TimmBackbone("xception71", output_stride=8)
    with pytest.raises(ValueError, match="rebuild the network with that output_stride"):
        backbone.set_output_stride(32)
    assert backbone.output_stride == 8


def test_normalization_is_timms():
    backbone = TimmBackbone("resnet18", output_stride=32)
    assert backbone.normalization.mean == pytest.approx((123.675, 116.28, 103.53))
    assert backbone.normalization.std == pytest.approx((58.395, 57.12, 57.375))


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_momentum(momentum):
    backbone = TimmBackbone("mobilenetv3_small_050", output_stride=32, momentum=momentum)
    norms = {m.momentum for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms == {0.1 if momentum is None else momentum}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet1", "has no model 'resnet1'; did you mean .*resnet18"),
        ("qqqqqqqq", r"timm.list_models\(\) lists them"),
        ("resnet18.nope", "cannot give features.*nope"),
        ("vit_tiny_patch16_224", "cannot give features at output_stride 16.*choose another"),
    ],
)
def test_what_timm_cannot_do(name, message):
    with pytest.raises(ValueError, match=message):
        TimmBackbone(name, output_stride=16)


def test_features_at_stride_four_are_needed(monkeypatch):
    def without_stride_4(*args, **kwargs):
        return timm.create_model("test_resnet", features_only=True, out_indices=(2, 3, 4))

    monkeypatch.setattr(backbones, "_create", without_stride_4)
    with pytest.raises(ValueError, match=r"strides \[8, 16, 32\] but none at 4"):
        TimmBackbone("test_resnet", output_stride=32)


def test_a_network_that_ignores_the_output_stride_is_refused(monkeypatch):
    def at_32(*args, **kwargs):
        return timm.create_model("test_resnet", features_only=True)

    monkeypatch.setattr(backbones, "_create", at_32)
    with pytest.raises(ValueError, match="ends at stride 32 when asked for 8"):
        TimmBackbone("test_resnet", output_stride=8)


def test_configuration_chooses_the_backbone():
    with torch.device("meta"):
        config = ModelConfig(backbone="xception41", width=0.5, middle_units=2)
        xception = build_backbone(config, 16)
        ours = build_backbone(ModelConfig(backbone="timm:resnet18"), 8)
    assert isinstance(xception, Xception)
    assert (xception.output_stride, xception.high_level_channels) == (16, 1024)
    assert isinstance(ours, TimmBackbone)
    assert (ours.name, ours.output_stride) == ("resnet18", 8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 0.5},
        {"middle_units": 4},
        {"multi_grid": (1, 2, 4)},
        {"relu_after_depthwise": True},
    ],
)
def test_what_a_timm_network_has_not_is_refused(wrong):
    with pytest.raises(ValueError, match="is not for timm:resnet18"):
        build_backbone(ModelConfig(backbone="timm:resnet18", **wrong), 16)
