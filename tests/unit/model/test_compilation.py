"""Repeated blocks compiled, or passed over with the cause."""

import logging

import pytest
import torch
from torch import nn

from model import compilation
from model.build import build_network
from model.compilation import compile_blocks, repeated_blocks
from model.config import ModelConfig


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, 2.0]))

    def forward(self, x):
        return torch.relu(x * self.weight)


def blocks_of(backbone, **changes):
    with torch.device("meta"):
        config = ModelConfig(backbone=backbone, **changes)
        network = build_network(config, "segmentation", 3)
    blocks = list(repeated_blocks(network))
    names = {id(module): name for name, module in network.named_modules()}
    for i, block in enumerate(blocks):  # none within another
        inside = {id(module) for module in block.modules()} - {id(block)}
        assert not inside & {id(other) for other in blocks[i:]}
    return [names[id(block)] for block in blocks]


def test_the_blocks_of_the_networks():
    xception = blocks_of("xception65")
    middle = [name for name in xception if "middle_flow" in name]
    assert middle == [f"backbone.middle_flow.block1.unit_{i}" for i in range(1, 17)]
    assert {"backbone.entry_flow.block1", "aspp.branch3", "decoder.conv2.convs.0"} < {*xception}
    resnet = blocks_of("resnet_v1_101_beta")
    assert len([name for name in resnet if "block3" in name]) == 23
    timm = blocks_of("timm:resnet50")
    assert len([name for name in timm if name.startswith("backbone.features.layer3.")]) == 6


@pytest.fixture
def broken_compiler(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    monkeypatch.setattr(compilation, "_REPORTED", set())
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_what_cannot_be_compiled_goes_on_with_one_warning(broken_compiler, caplog):
    network = nn.Sequential(Scale(), Scale())
    names = list(network.state_dict())
    x = torch.tensor([[1.0, 3.0], [-1.0, 2.0]], requires_grad=True)
    expected = network(x)
    compile_blocks(network)
    with caplog.at_level(logging.WARNING, logger=compilation.__name__):
        output = network(x)
        output.sum().backward()
    assert torch.equal(output, expected)
    assert x.grad is not None
    assert list(network.state_dict()) == names
    assert [record.message for record in caplog.records if record.name == compilation.__name__] == [
        "compile: goes on without, where it fails: RuntimeError: no C++ compiler"
    ]


def test_a_network_without_such_blocks_is_told(caplog):
    with caplog.at_level(logging.WARNING, logger=compilation.__name__):
        compile_blocks(nn.Sequential(Scale(), nn.Linear(2, 2)))
    assert "the network repeats no block" in caplog.text


def test_compiled_blocks_compute_the_same():
    torch._dynamo.reset()
    network = nn.Sequential(Scale(), Scale(), Scale())
    x = torch.randn(4, 2, requires_grad=True)
    expected = network(x)
    expected.sum().backward()
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    compile_blocks(network)
    programs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    output = network(x)
    output.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == programs + 1  # for all
    torch.testing.assert_close(output, expected)
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    torch._dynamo.reset()
