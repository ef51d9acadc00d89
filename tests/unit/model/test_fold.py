import copy

import pytest
import torch
from torch import nn

from model.blocks import AtrousConv2d
from model.build import build_network
from model.config import ModelConfig
from model.deeplab import DeepLab
from model.fold import FoldedConv2d, fold_batch_norm
from model.sync_batch_norm import synchronize_batch_norm

TIMM = ["resnet18", "tf_efficientnet_b0", "mobilenetv3_small_050", "convnext_atto", "xception41p"]


def _network(**config):
    """An evaluation-mode network whose batch norms all do something."""
    torch.manual_seed(0)
    sizes = {"width": 0.125, "middle_units": 1} if "backbone" not in config else {}
    network = DeepLab(ModelConfig(**{**sizes, "aspp_channels": 16, **config}), 5).eval()
    for norm in _norms(network):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)
    return network


def _norms(network):
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def _images(*size):
    return torch.randint(0, 256, size, dtype=torch.uint8)


def _assert_equal(folded, network, images):
    expected, found = network(images), folded(images)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("config", [{}, {"relu_after_depthwise": True}, {"separable": False}])
def test_folded_equals_unfolded(config, memory_format, gradients):
    network = _network(**config).to(memory_format=memory_format)
    folded = fold_batch_norm(network)
    assert not _norms(folded)
    images = _images(2, 3, 97, 65).to(memory_format=memory_format)
    with torch.set_grad_enabled(gradients):
        _assert_equal(folded, network, images)


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_folded_equals_unfolded_around_a_timm_backbone(name):
    network = _network(backbone=f"timm:{name}")
    folded = fold_batch_norm(network)
    assert len(_norms(folded)) < len(_norms(network))
    _assert_equal(folded, network, _images(1, 3, 64, 96))


@torch.no_grad()
def test_folded_timm_resnet_has_no_batch_norm_and_keeps_its_output_stride():
    folded = fold_batch_norm(_network(backbone="timm:resnet18"))
    assert not _norms(folded)
    with pytest.raises(ValueError, match="rebuild the network"):
        folded.set_output_stride(8)


@torch.no_grad()
def test_activations_within_batch_norm_stay():
    network = _network(backbone="timm:test_efficientnet")
    folded = fold_batch_norm(network)

    def activations(net):
        return sum(isinstance(module, nn.SiLU) for module in net.modules())

    assert activations(folded) == activations(network) > 0
    assert not _norms(folded)


@torch.no_grad()
def test_output_stride_can_change_after_folding():
    network = _network()
    folded = fold_batch_norm(network)
    images = _images(1, 3, 65, 65)
    for output_stride in (16, 8, 32):
        network.set_output_stride(output_stride)
        folded.set_output_stride(output_stride)
        _assert_equal(folded, network, images)


@torch.no_grad()
def test_original_is_left_alone():
    network = _network()
    images = _images(1, 3, 33, 33)
    before, state = network(images), copy.deepcopy(network.state_dict())
    fold_batch_norm(network)(images)
    assert torch.equal(network(images), before)
    assert state.keys() == network.state_dict().keys()


@torch.no_grad()
def test_synchronized_batch_norm_is_folded_too():
    network = _network()
    images = _images(1, 3, 33, 33)
    expected = network(images)
    synchronize_batch_norm(network)
    folded = fold_batch_norm(network)
    assert not _norms(folded)
    assert torch.allclose(folded(images), expected, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_classifier_is_folded():
    torch.manual_seed(0)
    config = ModelConfig(width=0.125, middle_units=1)
    network = build_network(config, "classification", 7).eval()
    _assert_equal(fold_batch_norm(network), network, _images(2, 3, 33, 33))


def test_training_mode_is_refused():
    network = _network()
    network.decoder.train()
    with pytest.raises(ValueError, match=r"decoder is in training mode: call network\.eval\(\)"):
        fold_batch_norm(network)


@torch.no_grad()
def test_new_weights_and_copies_are_not_served_old_ones():
    folded = fold_batch_norm(_network())
    images = _images(1, 3, 33, 33)
    before = folded(images)
    twin = copy.deepcopy(folded)
    assert torch.equal(twin(images), before)
    state = {name: 0.5 * tensor for name, tensor in folded.state_dict().items()}
    folded.load_state_dict(state)
    twin.load_state_dict(state)
    assert torch.equal(folded(images), twin(images))
    assert not torch.equal(folded(images), before)
    double = copy.deepcopy(folded).double()(images)
    assert (double - folded(images)).abs().max() <= 1e-5 * double.abs().max()


@torch.no_grad()
def test_low_precision_takes_the_ordinary_path():
    folded = fold_batch_norm(_network())
    images = _images(1, 3, 33, 33)
    with torch.autocast("cpu", torch.bfloat16):
        assert folded.forward_low_resolution(images).dtype == torch.bfloat16


def test_folded_network_exports_without_private_operators():
    folded = fold_batch_norm(_network())
    with torch.no_grad():
        program = torch.export.export(folded, (_images(1, 3, 33, 33),))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not {name for name in operators if "mkldnn" in name}
    assert any("conv2d" in name for name in operators)


@pytest.mark.parametrize("size", [(33, 33), (7, 33), (5, 5), (1, 1), (20, 37)])
@pytest.mark.parametrize("rate", [2, 6, 12, 18])
def test_atrous_depthwise_in_phases_is_exact(rate, size, monkeypatch):
    torch.manual_seed(0)
    conv = AtrousConv2d(24, 24, 3, padding=rate, dilation=rate, groups=24).double()
    conv = conv.to(memory_format=torch.channels_last)
    x = torch.randn(2, 24, *size, dtype=torch.double).to(memory_format=torch.channels_last)
    x.requires_grad_()
    assert conv._in_phases(x)
    found = conv(x)
    gradient = torch.randn_like(found)
    found_gradients = torch.autograd.grad(found, (x, *conv.parameters()), gradient)
    monkeypatch.setattr(AtrousConv2d, "_in_phases", lambda self, x: False)
    expected = conv(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)
    expected_gradients = torch.autograd.grad(expected, (x, *conv.parameters()), gradient)
    torch.testing.assert_close(found_gradients, expected_gradients)


@pytest.mark.parametrize(
    "keywords",
    [
        {"groups": 24},
        {"groups": 24, "dilation": 2, "padding": 2, "stride": 2},
        {"dilation": 2, "padding": 2},
    ],
)
def test_other_convolutions_are_torchs_own(keywords):
    x = torch.randn(1, 24, 9, 9).to(memory_format=torch.channels_last)
    assert not AtrousConv2d(24, 24, 3, **keywords)._in_phases(x)


def test_packed_weights_are_used_only_without_gradients():
    conv = FoldedConv2d(nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(1, 4, 3, 3)
    assert conv(x).requires_grad
    with torch.no_grad():
        assert conv._has_kernel(x) == torch.backends.mkldnn.is_available()
        assert not conv._has_kernel(x.double())
