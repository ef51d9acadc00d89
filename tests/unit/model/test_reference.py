"""Equality with the reference graph: logits that it gave for variables drawn from their names.

`reference_logits.npz` holds what tensorflow/models research/deeplab at commit 0e2d1f0, run with
TensorFlow 2.15, computes from `_variable` and `_image`: nothing of it but these numbers is here.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from model.build import build_network
from model.config import ModelConfig
from model.fold import fold_batch_norm
from model.importers import from_tensorflow, tensorflow_names

GOLDEN = np.load(Path(__file__).parent / "reference_logits.npz", allow_pickle=False)
SETTINGS = json.loads(str(GOLDEN["settings"]))


def _variable(name, shape):
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    leaf = name.rsplit("/", 1)[-1]
    if leaf in ("gamma", "moving_variance"):
        low, high = {"gamma": (0.7, 1.3), "moving_variance": (0.5, 1.5)}[leaf]
        values = draw.uniform(low, high, shape)
    elif leaf in ("beta", "moving_mean", "biases"):
        values = draw.normal(0, 0.1, shape)
    else:
        fan_in = 9 if leaf == "depthwise_weights" else np.prod(shape[:-1])
        gain = {"xception": 1.2, "resnet_v": 1.0}.get(name[:8], 2.0)
        values = draw.normal(0, (gain / fan_in) ** 0.5, shape)
        if shape[0] == 7:  # the root that sees pixels of 0..255
            values /= 64
    return values.astype(np.float32)


def _image(height, width):
    """(1, 3, H, W), squares of 8 pixels of random colours."""
    shape = (1, -(-height // 8), -(-width // 8), 3)
    small = np.random.default_rng(0).uniform(0, 255, shape)
    image = np.kron(small, np.ones((1, 8, 8, 1)))[:, :height, :width]
    return torch.from_numpy(image.astype(np.float32)).permute(0, 3, 1, 2)


def _network(settings):
    config, task = ModelConfig.model_validate(settings["model"]), settings["task"]
    network = build_network(config, task, settings["num_classes"])
    own = network.state_dict()
    variables = {}
    for name, foreign in tensorflow_names(network).items():
        shape = tuple(own[name].shape)
        if len(shape) == 4:
            out, inner, height, width = shape
            depthwise = foreign.endswith("depthwise_weights")
            shape = (height, width, *((out, inner) if depthwise else (inner, out)))
        elif len(shape) == 2:
            shape = (1, 1, *reversed(shape))
        variables[foreign] = _variable(foreign, shape)
    imported = from_tensorflow(config, task, variables)
    assert not imported.missing
    network.load_state_dict(imported.tensors, strict=False)
    return network.eval()


def _logits(network, images):
    with torch.no_grad():
        if not hasattr(network, "forward_low_resolution"):
            return network(images)[:, None, None].numpy()
        return network.forward_low_resolution(images).permute(0, 2, 3, 1).numpy()


def _assert_equal(found, expected):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_equal_the_reference_graphs(name):
    network, images = _network(SETTINGS[name]), _image(*SETTINGS[name]["size"])
    _assert_equal(_logits(network, images), GOLDEN[name])
    if f"{name}/low_level" in GOLDEN:
        with torch.no_grad():
            low_level = network.features(images).low_level.permute(0, 2, 3, 1).numpy()
        _assert_equal(low_level[:, ::4, ::4], GOLDEN[f"{name}/low_level"])
    channels_last = images.contiguous(memory_format=torch.channels_last)
    _assert_equal(_logits(fold_batch_norm(network), channels_last), GOLDEN[name])
