import pytest
import torch
from torch import nn

from model.config import DecoderConfig, ModelConfig
from model.deeplab import DeepLab


def _build(**kwargs):
    with torch.device("meta"):
        return DeepLab(ModelConfig(**kwargs), num_classes=21)


def _tiny(output_stride=16, seed=0, **kwargs):
    torch.manual_seed(seed)
    sizes = {"width": 0.0625, "middle_units": 1, "aspp_channels": 16, **kwargs}
    decoder = DecoderConfig(low_level_channels=8, channels=16)
    config = ModelConfig(**{"decoder": decoder, "output_stride": output_stride, **sizes})
    return DeepLab(config, num_classes=5)


@pytest.mark.parametrize(
    ("backbone", "parameters"),
    [("xception41", 28_108_661), ("xception65", 41_055_413), ("xception71", 43_477_837)],
)
def test_number_of_parameters(backbone, parameters):
    assert sum(p.numel() for p in _build(backbone=backbone).parameters()) == parameters


def test_number_of_moving_statistics():
    norms = [m for m in _build().modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 146
    assert sum(m.running_mean.numel() + m.running_var.numel() for m in norms) == 202_800


@pytest.mark.parametrize("size", [(513, 513), (65, 65), (96, 130), (33, 64), (1025, 2049)])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("decoder", [None, DecoderConfig()])
def test_output_sizes(size, output_stride, decoder):
    network = _build(output_stride=output_stride, decoder=decoder, width=0.25, middle_units=1)
    images = torch.empty(2, 3, *size, device="meta")
    assert network(images).shape == (2, 21, *size)
    stride = output_stride if decoder is None else 4
    low = tuple((side + stride - 1) // stride for side in size)
    assert network.forward_low_resolution(images).shape == (2, 21, *low)


@pytest.mark.parametrize(("start", "end"), [(16, 8), (8, 32), (32, 16)])
@pytest.mark.parametrize("backbone", ["xception65", "timm:test_resnet"])
def test_switching_the_output_stride_equals_building_at_it(start, end, backbone):
    sizes = {} if backbone == "xception65" else {"width": 1, "middle_units": None}
    switched = _tiny(start, backbone=backbone, **sizes).eval()
    built = _tiny(end, seed=1, backbone=backbone, **sizes).eval()
    built.load_state_dict(switched.state_dict())
    images = torch.randint(0, 256, (1, 3, 65, 49), dtype=torch.uint8)
    with torch.no_grad():
        before = switched(images)
        switched.set_output_stride(end)
        assert switched.output_stride == end
        assert torch.equal(switched(images), built(images))
        switched.set_output_stride(start)
        assert torch.equal(switched(images), before)


def test_images_may_be_uint8_or_float_and_the_mean_pixel_is_black():
    network = _tiny().eval()
    assert network.mean_pixel == (127.5, 127.5, 127.5)
    images = torch.randint(0, 256, (2, 3, 33, 33), dtype=torch.uint8)
    assert torch.equal(network(images), network(images.float()))
    seen = []
    network.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    network(torch.tensor([0.0, 127.5, 255.0]).view(1, 3, 1, 1).expand(1, 3, 33, 33))
    assert seen[0][0, :, 0, 0].tolist() == [-1, 0, 1]


def test_default_head():
    network = _build()
    head = [*network.aspp.modules(), *network.decoder.modules()]
    norms = {(m.eps, m.momentum) for m in head if isinstance(m, nn.BatchNorm2d)}
    assert norms == {(1e-5, 3e-4)}
    assert network.aspp.dropout.p == 0.1
    assert network.output_stride == 16
    torch.manual_seed(0)
    tiny = _tiny()
    assert not tiny.logits.bias.any()
    assert 0.01 < tiny.logits.weight.abs().max() <= 0.02


def test_configured_momentum_reaches_every_batch_norm():
    network = _tiny(batch_norm={"momentum": 0.2})
    assert {m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {0.2}


def test_every_parameter_learns():
    network = _tiny().train()
    network(torch.randint(0, 256, (2, 3, 65, 65), dtype=torch.uint8)).square().mean().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_low_precision_logits_are_upsampled_in_float32():
    network = _tiny().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        images = torch.zeros(1, 3, 33, 33)
        assert network.forward_low_resolution(images).dtype == torch.bfloat16
        assert network(images).dtype == torch.float32
