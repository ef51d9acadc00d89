import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from model.blocks import Normalization
from model.build import build_network
from model.config import DecoderConfig, ModelConfig
from model.importers import (
    COUNTER,
    from_tensorflow,
    read_variables,
    tensorflow_names,
    timm_names,
    timm_weights,
)

REFERENCE = json.loads((Path(__file__).parent / "reference_variables.json").read_text())
TINY = {"backbone": "xception41", "width": 0.0625, "middle_units": 1, "aspp_channels": 8}
GRADUAL = DecoderConfig(low_level=("conv3", "conv2"))


def _build(task="segmentation", classes=21, device="meta", **values):
    with torch.device(device):
        return build_network(ModelConfig(**values), task, classes)


def _as_tensorflow(name, tensor):
    """A tensor of ours in TensorFlow's order of axes."""
    if tensor.ndim != 4:
        return tensor.numpy()
    axes = (2, 3, 0, 1) if name.endswith("depthwise_weights") else (2, 3, 1, 0)
    return tensor.permute(axes).numpy()


def _variables(network):
    own = network.state_dict()
    names = tensorflow_names(network)
    found = {foreign: _as_tensorflow(foreign, own[name]) for name, foreign in names.items()}
    if "xception_41/logits/weights" in found:
        found["xception_41/logits/weights"] = found["xception_41/logits/weights"].T[None, None]
    return found


@pytest.mark.parametrize(
    ("graph", "config"),
    [
        ("xception_41_os16", {"backbone": "xception41"}),
        ("xception_65_os16", {"backbone": "xception65"}),
        ("xception_65_os16_nosc", {"backbone": "xception65", "separable": False}),
        ("xception_71_os16", {"backbone": "xception71"}),
        ("resnet_v1_101_os16", {"backbone": "resnet_v1_101"}),
        ("resnet_v1_101_beta_os16", {"backbone": "resnet_v1_101_beta"}),
    ],
)
def test_every_variable_of_the_released_graph_is_there_and_no_other(graph, config):
    network = _build(**config)
    own = network.state_dict()
    lines = []
    for name, foreign in tensorflow_names(network).items():
        shape = list(own[name].shape)
        if len(shape) == 4:
            out, inner, height, width = shape
            depthwise = foreign.endswith("depthwise_weights")
            shape = [height, width, *((out, inner) if depthwise else (inner, out))]
        lines.append(f"{foreign}\t{shape}")
    assert len(lines) == REFERENCE[graph]["variables"]
    assert (
        hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() == REFERENCE[graph]["sha256"]
    )


def test_names_of_the_gradual_decoder():
    # As the reference builds decoder_output_stride=[8, 4].
    dense = tensorflow_names(_build(decoder=GRADUAL, separable=False))
    separable = tensorflow_names(_build(decoder=GRADUAL))
    assert dense["decoder.conv3.convs.1.conv.weight"] == (
        "decoder/decoder_conv0/decoder_conv0_2/weights"
    )
    assert dense["decoder.conv2.convs.0.norm.bias"] == (
        "decoder/decoder_conv0_1/decoder_conv0_1_1/BatchNorm/beta"
    )
    assert dense["decoder.conv2.projection.conv.weight"] == "decoder/feature_projection0_1/weights"
    assert separable["decoder.conv2.convs.1.depthwise.conv.weight"] == (
        "decoder/decoder_conv1_1_depthwise/depthwise_weights"
    )


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_variables_come_back_into_the_same_network(task):
    torch.manual_seed(0)
    network = _build(task, 7, "cpu", **TINY).eval()
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    imported = from_tensorflow(ModelConfig(**TINY), task, _variables(network))
    assert (imported.missing, imported.left_out, imported.unplaced) == ((), (), ())
    assert imported.num_classes == 7
    own = network.state_dict()
    assert set(imported.tensors) == {name for name in own if not name.endswith(COUNTER)}
    assert all(torch.equal(tensor, own[name]) for name, tensor in imported.tensors.items())


def test_every_variable_is_placed_or_told():
    variables = _variables(_build(device="cpu", **TINY))
    momentum = {f"{name}/Momentum": value for name, value in variables.items()}
    average = {"logits/semantic/biases/ExponentialMovingAverage": np.full(21, 3.0)}
    others = {
        "global_step": np.array(30_000),
        "xception_41/logits/weights": np.zeros((1, 1, 2048, 1001)),
        "aspp9/weights": np.zeros((1, 1, 8, 8)),
    }
    del variables["aspp0/weights"]
    every = variables | momentum | average | others
    imported = from_tensorflow(ModelConfig(**TINY), "segmentation", every)
    assert imported.missing == ("aspp.branch0.conv.weight",)
    assert imported.unplaced == ("aspp9/weights",)
    assert set(imported.left_out) == set(momentum | average | others) - {"aspp9/weights"}
    assert "1 variables without a place in the network: aspp9/weights" in imported.report()
    averaged = from_tensorflow(
        ModelConfig(**TINY), "segmentation", every, moving_averages=True
    ).tensors["logits.bias"]
    assert averaged.tolist() == [3.0] * 21


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("aspp0/weights", np.zeros((1, 1, 128, 9)), r"aspp0/weights \[1, 1, 128, 9\] does not fit"),
        ("aspp0/BatchNorm/gamma", np.full(8, np.nan), "gamma has values that are not finite"),
    ],
)
def test_wrong_variables_are_refused(name, value, message):
    variables = _variables(_build(device="cpu", **TINY)) | {name: value}
    with pytest.raises(ValueError, match=message):
        from_tensorflow(ModelConfig(**TINY), "segmentation", variables)


def test_a_timm_network_has_no_place_for_tensorflows_variables():
    with pytest.raises(ValueError, match=r"set model\.backbone to one of these"):
        from_tensorflow(ModelConfig(backbone="timm:resnet18"), "segmentation", {})


def test_variables_are_read_from_npz_without_pickle(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    good, evil, torn = tmp_path / "good.npz", tmp_path / "evil.npz", tmp_path / "torn.npz"
    np.savez(good, **{"a/b:0": np.ones(2), "c": np.zeros((2, 2))})
    assert {name: a.shape for name, a in read_variables(str(good)).items()} == {
        "a/b": (2,),
        "c": (2, 2),
    }
    np.savez(evil, a=np.array([Evil()], dtype=object))
    torn.write_bytes(good.read_bytes()[:-40])
    for path in (evil, torn):
        with pytest.raises(ValueError, match=r"not an \.npz file of plain arrays"):
            read_variables(str(path))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="no such file"):
        read_variables(str(tmp_path / "none.npz"))
    with pytest.raises(ValueError, match=r"there is no .*model.ckpt.index"):
        read_variables(str(tmp_path / "model.ckpt"))


def test_a_tensorflow_checkpoint_is_read_by_tensorflow(tmp_path):
    tensorflow = pytest.importorskip("tensorflow", reason="the extra `tensorflow` is not installed")
    values = {"logits/semantic/biases": np.arange(3, dtype=np.float32)}
    graph = tensorflow.compat.v1.Graph()
    with graph.as_default(), tensorflow.compat.v1.Session() as session:
        for name, value in values.items():
            tensorflow.compat.v1.get_variable(name, initializer=value)
        session.run(tensorflow.compat.v1.global_variables_initializer())
        tensorflow.compat.v1.train.Saver().save(session, str(tmp_path / "model.ckpt"))
    found = read_variables(str(tmp_path / "model.ckpt"))
    assert found["logits/semantic/biases"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("output_stride", [32, 16])
@pytest.mark.parametrize("name", ["xception41", "xception65", "xception71"])
def test_our_xceptions_equal_timms(name, output_stride):
    torch.manual_seed(0)
    theirs = timm.create_model(name, output_stride=output_stride).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, 0, 0.1)
    ours = _build("classification", 10, "cpu", backbone=name, output_stride=output_stride).eval()
    weights = theirs.state_dict()
    names = timm_names(ours.state_dict())
    assert set(names) == {n for n in ours.state_dict() if n.startswith("backbone.")}
    ours.load_state_dict({own: weights[foreign] for own, foreign in names.items()}, strict=False)
    images = torch.rand(1, 3, 65, 65) * 2 - 1
    with torch.no_grad():
        expected = theirs.forward_features(images)
        found = ours.backbone(images).high_level
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_timm_weights_are_of_the_same_pixels(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name))
    of_timm = Normalization(mean=(127.5,) * 3, std=(127.5,) * 3)
    assert "stem.0.conv.weight" in timm_weights("xception41", of_timm)
    with pytest.raises(ValueError, match="timm:resnet18 wants pixels as"):
        timm_weights("resnet18", of_timm)


def test_timm_weights_that_cannot_be_had():
    anything = Normalization(mean=(0,) * 3, std=(1,) * 3)
    with pytest.raises(ValueError, match=r"timm:resnet1000: no weights.*name a downloaded file"):
        timm_weights("resnet1000", anything)
