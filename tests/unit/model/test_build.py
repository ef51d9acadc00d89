import pytest
import torch
from torch import nn

from model.build import build_network, freeze_batch_norm, parameter_groups
from model.classifier import Classifier
from model.config import ModelConfig
from model.deeplab import DeepLab

TINY = ModelConfig(width=0.0625, middle_units=1, aspp_channels=16)


@pytest.mark.parametrize(
    ("task", "kind", "output_stride"),
    [
        ("segmentation", DeepLab, 16),
        ("classification", Classifier, 32),
        ("multilabel", Classifier, 32),
    ],
)
def test_network_and_output_stride_of_a_task(task, kind, output_stride):
    network = build_network(TINY, task, 3)
    assert isinstance(network, kind)
    assert network.output_stride == output_stride
    given = build_network(TINY.model_copy(update={"output_stride": 8}), task, 3)
    assert given.output_stride == 8


def test_wrong_task_and_class_count():
    with pytest.raises(ValueError, match="'detection'"):
        build_network(TINY, "detection", 3)
    with pytest.raises(ValueError, match="num_classes is 0"):
        build_network(TINY, "segmentation", 0)


def test_the_seed_determines_the_weights():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build_network(TINY, "segmentation", 3).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["logits.weight"], states[2]["logits.weight"])


def _decayed_names(network):
    groups = parameter_groups(network, 4e-5)
    assert {group["weight_decay"] for group in groups} == {4e-5, 0.0}
    members = [member for group in groups for member in group["params"]]
    assert sorted(name for name, _ in members) == sorted(n for n, _ in network.named_parameters())
    assert all(network.get_parameter(name) is parameter for name, parameter in members)
    return {name for group in groups if group["weight_decay"] for name, _ in group["params"]}


@pytest.mark.parametrize("task", ["segmentation", "classification"])
@pytest.mark.parametrize("separable", [True, False])
def test_only_dense_and_pointwise_weights_decay(task, separable):
    network = build_network(TINY.model_copy(update={"separable": separable}), task, 3)
    decayed = _decayed_names(network)
    all_names = [name for name, _ in network.named_parameters()]
    last = ("logits.weight", "classifier.weight")
    expected = {
        name
        for name in all_names
        if (name.endswith("conv.weight") and "depthwise" not in name) or name in last
    }
    assert decayed == expected
    assert any("depthwise" in name for name in all_names)


def test_what_decays_in_a_timm_network():
    config = ModelConfig(backbone="timm:convnext_atto")
    with torch.device("meta"):
        network = build_network(config, "classification", 3)
    decayed = _decayed_names(network)
    decayed_kinds = {type(network.get_submodule(name.rsplit(".", 1)[0])) for name in decayed}
    assert decayed_kinds == {nn.Conv2d, nn.Linear}
    depthwise = [name for name in decayed if "conv_dw" in name]
    assert not depthwise


def test_parameters_that_do_not_train_are_left_out():
    network = build_network(TINY, "segmentation", 3)
    network.backbone.requires_grad_(False)
    grouped = sum(len(group["params"]) for group in parameter_groups(network, 4e-5))
    assert grouped == sum(p.requires_grad for p in network.parameters())
    assert grouped < len([*network.parameters()])


def test_rates_of_parts_by_the_longest_beginning_of_a_name():
    network = build_network(TINY, "segmentation", 3)
    factors = {"backbone": 0.1, "backbone.conv1_1": 0.0, "logits.bias": 2.0}
    groups = parameter_groups(network, 4e-5, factors)
    found = {name: group["lr_multiplier"] for group in groups for name, _ in group["params"]}
    assert len(found) == len([*network.parameters()])
    for name, factor in found.items():
        if name.startswith("backbone.conv1_1."):
            assert factor == 0
        elif name.startswith("backbone."):
            assert factor == 0.1
        else:
            assert factor == (2 if name == "logits.bias" else 1)
    decays = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    assert (decays["logits.weight"], decays["logits.bias"]) == (4e-5, 0.0)


def test_groups_do_not_depend_on_the_order_in_which_a_network_is_put_together():
    def grouped(order):
        network = nn.Module()
        for name in order:
            network.add_module(name, nn.Linear(2, 2))
        groups = parameter_groups(network, 4e-5, {"b": 2.0})
        return [[name for name, _ in group["params"]] for group in groups]

    assert (
        grouped("abc")
        == grouped("cab")
        == [
            ["a.bias", "c.bias"],
            ["a.weight", "c.weight"],
            ["b.bias"],
            ["b.weight"],
        ]
    )


@pytest.mark.parametrize("beginning", ["decodr", "logit", "backbone.conv1", ""])
def test_a_beginning_of_no_name_is_refused(beginning):
    network = build_network(TINY, "segmentation", 3)
    with pytest.raises(
        ValueError, match="names begin with aspp, backbone, decoder, logits"
    ) as error:
        parameter_groups(network, 4e-5, {"aspp": 1.0, beginning: 2.0})
    assert repr(beginning) in str(error.value)


@pytest.mark.parametrize(
    ("backbone", "eps", "momentum"),
    [
        ("xception41", 1e-3, 3e-4),
        ("xception65", 1e-3, 3e-4),
        ("xception71", 1e-3, 3e-4),
        ("resnet_v1_50", 1e-5, 0.05),
        ("resnet_v1_50_beta", 1e-5, 0.05),
        ("resnet_v1_101", 1e-5, 0.05),
        ("resnet_v1_101_beta", 1e-5, 0.05),
        ("timm:resnet18", 1e-5, 0.1),
        ("timm:xception65", 1e-3, 0.1),
    ],
)
def test_batch_norm_has_the_references_constants(backbone, eps, momentum):
    """The head's are the same around every backbone."""
    with torch.device("meta"):
        network = build_network(ModelConfig(backbone=backbone), "segmentation", 21)
    assert _constants(network.backbone) == {(eps, momentum)}
    assert _constants(network.aspp) | _constants(network.decoder) == {(1e-5, 3e-4)}


def _constants(network):
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    return {(norm.eps, norm.momentum) for norm in norms}


@pytest.mark.parametrize(
    "config",
    [TINY, ModelConfig(backbone="timm:test_resnet"), ModelConfig(backbone="resnet_v1_50_beta")],
)
def test_frozen_batch_norm_keeps_statistics_and_trains_gamma_and_beta(config):
    torch.manual_seed(0)
    network = build_network(config, "segmentation", 3).train()
    freeze_batch_norm(network)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        nn.init.ones_(norm.weight)  # timm's residuals start at 0 and would pass no gradient on
    before = {name: tensor.clone() for name, tensor in network.named_buffers()}
    network(torch.rand(1, 3, 33, 33) * 255).square().mean().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.named_buffers())
    assert all(norm.weight.grad.any() and norm.bias.grad.any() for norm in norms)
    assert network.training
    assert network.aspp.dropout.training

    network.train()
    network(torch.rand(2, 3, 33, 33) * 255)
    changed = [name for name, t in network.named_buffers() if not torch.equal(t, before[name])]
    assert len(changed) == 3 * len(norms)
