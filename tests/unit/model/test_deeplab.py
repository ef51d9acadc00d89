import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from model.config import DecoderConfig, ModelConfig
from model.deeplab import DeepLab

REFERENCE = json.loads((Path(__file__).parent / "reference_variables.json").read_text())

_NAMES = (  # ours -> the reference's, in this order
    (r"^backbone\.(conv1_\d)", r"{net}/entry_flow/\1"),
    (r"^backbone\.(\w+)\.(block\d)\.(unit_\d+)\.", r"{net}/\1/\2/\3/xception_module/"),
    (r"^aspp\.image_pooling", "image_pooling"),
    (r"^aspp\.branch", "aspp"),
    (r"^aspp\.projection", "concat_projection"),
    (r"^decoder\.low_level_projection", "decoder/feature_projection0"),
    (r"^decoder\.convs\.(\d)(\.\w+wise)", r"decoder/decoder_conv\1\2"),
    (r"^decoder\.convs\.0", "decoder/decoder_conv0/decoder_conv0_1"),
    (r"^decoder\.convs\.1", "decoder/decoder_conv0/decoder_conv0_2"),
    (r"^logits", "logits/semantic"),
    (r"\.(depthwise|pointwise)", r"_\1"),
    (r"_depthwise\.conv\.weight", "_depthwise/depthwise_weights"),
    (r"(\.conv)?\.weight$", "/weights"),
    (r"\.norm/weights", "/BatchNorm/gamma"),
    (r"\.norm\.bias", "/BatchNorm/beta"),
    (r"\.bias", "/biases"),
    (r"\.norm\.running_mean", "/BatchNorm/moving_mean"),
    (r"\.norm\.running_var", "/BatchNorm/moving_variance"),
)


def _build(**kwargs):
    with torch.device("meta"):
        return DeepLab(ModelConfig(**kwargs), num_classes=21)


def _tiny(output_stride=16, seed=0, **kwargs):
    torch.manual_seed(seed)
    sizes = {"width": 0.0625, "middle_units": 1, "aspp_channels": 16, **kwargs}
    decoder = DecoderConfig(low_level_channels=8, channels=16)
    config = ModelConfig(**{"decoder": decoder, "output_stride": output_stride, **sizes})
    return DeepLab(config, num_classes=5)


def _variable(net, name, tensor):
    for ours, theirs in _NAMES:
        name = re.sub(ours, theirs.format(net=net), name)
    shape = list(tensor.shape)
    if len(shape) == 4:
        out, inner, height, width = shape
        depthwise = name.endswith("depthwise_weights")
        shape = [height, width, out, inner] if depthwise else [height, width, inner, out]
    return name, str(shape)


def _macs(network, side):
    """Multiply-adds of all convolutions on one image, in billions; nothing is computed."""
    total = 0

    def count(module, args, output):
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    network.eval()(torch.empty(1, 3, side, side, dtype=torch.uint8, device="meta"))
    return total / 1e9


@pytest.mark.parametrize(
    ("graph", "backbone", "separable"),
    [
        ("xception_41_os16", "xception41", True),
        ("xception_65_os16", "xception65", True),
        ("xception_65_os16_nosc", "xception65", False),
        ("xception_71_os16", "xception71", True),
    ],
)
def test_every_variable_of_the_released_graph_is_there_and_no_other(graph, backbone, separable):
    network = _build(backbone=backbone, separable=separable)
    net = graph[: len("xception_65")]
    tensors = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    variables = [_variable(net, name, tensor) for name, tensor in tensors.items()]
    reference = REFERENCE[graph]
    shapes = Counter(f"{name.rsplit('/', 1)[1]} {shape}" for name, shape in variables)
    assert shapes == reference["shapes"]
    assert len(variables) == reference["variables"]
    lines = sorted(f"{name}\t{shape}" for name, shape in variables)
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == reference["sha256"]


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


@pytest.mark.parametrize(
    ("output_stride", "config", "billions"),
    [
        (16, {}, 54.04),
        (8, {}, 176.85),
        (16, {"separable": False}, 86.68),
        (8, {"separable": False}, 248.78),
        (16, {"separable": False, "decoder": None}, 64.92),
        (8, {"separable": False, "decoder": None}, 227.04),
        (16, {"backbone": "xception41"}, 40.01),
        (16, {"backbone": "xception71"}, 66.07),
        (8, {"backbone": "xception71"}, 189.96),
    ],
)
def test_multiply_adds_of_table_5(output_stride, config, billions):
    network = _build(**config)
    network.set_output_stride(output_stride)
    assert _macs(network, 513) == pytest.approx(billions, rel=2e-4)


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
