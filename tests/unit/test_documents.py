"""What the documents tell users to write is valid."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from model.build import build_network
from model.config import ModelConfig

ROOT = Path(__file__).parents[2]
NETWORKS = (ROOT / "docs/networks.md").read_text(encoding="utf-8")
TABLE_1 = yaml.safe_load(re.search(r"```yaml\n(.*?)```", NETWORKS, re.DOTALL)[1])["model"]
TABLE_2 = re.findall(r"^\| (.*\[[13]x[13], \d+\].*?) \| `(\{.*?\})`", NETWORKS, re.MULTILINE)


def _parameters(**values):
    with torch.device("meta"):
        network = build_network(ModelConfig.model_validate(values), "segmentation", 21).eval()
        assert network(torch.empty(1, 3, 65, 65)).shape == (1, 21, 65, 65)
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("channels", [8, 16, 32, 48, 64])
def test_the_values_of_table_1(channels):
    decoder = TABLE_1["decoder"] | {"low_level_channels": channels}
    more = _parameters(**TABLE_1 | {"decoder": decoder | {"low_level_channels": channels + 1}})
    # A channel more: 256 weights, scale and offset to make it, 3 x 3 x 256 to use it.
    assert more - _parameters(**TABLE_1 | {"decoder": decoder}) == 256 + 2 + 9 * 256


def test_the_values_of_table_2():
    sizes = {
        row: _parameters(**TABLE_1 | {"decoder": yaml.safe_load(decoder)})
        for row, decoder in TABLE_2
    }
    conv = 9 * 256 * 256 + 2 * 256
    one = sizes["[3x3, 256]"]
    assert sizes["[3x3, 256] x 2"] == one + conv
    assert sizes["[3x3, 256] x 3"] == one + 2 * conv
    # Half the outputs: fewer weights here and in the logits.
    assert one - sizes["[3x3, 128]"] == 128 * (9 * 304 + 2 + 21)
    assert one - sizes["[1x1, 256]"] == 8 * 304 * 256
    # Conv3 is reduced from 512 channels to 48 and joined in a convolution of its own.
    gradual = 512 * 48 + 2 * 48 + 9 * 304 * 256 + 2 * 256
    assert sizes["Conv3 and Conv2, [3x3, 256]"] == one + gradual


@pytest.mark.parametrize("backbone", ["xception65", "xception71"])
def test_the_values_of_table_7a(backbone):
    assert "image_level_features: false" in NETWORKS
    every = _parameters(backbone=backbone)
    without = _parameters(backbone=backbone, image_level_features=False)
    assert every - without == 2048 * 256 + 2 * 256 + 256 * 256
    assert _parameters(backbone=backbone, decoder=None) < every
