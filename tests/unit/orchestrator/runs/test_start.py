from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from model.build import build_network
from model.config import ModelConfig
from orchestrator.errors import CheckpointError
from orchestrator.files import sha256
from orchestrator.runs.start import Start, apply_hand_over, plan_hand_over, read_shapes

NETWORK = {
    "backbone.conv": (8, 3),
    "backbone.norm": (8,),
    "aspp.conv": (4, 8),
    "logits.weight": (3, 4),
}
CLASSES = ("a", "b", "c")


def start(take: str, classes: tuple[str, ...] | None = CLASSES) -> Start:
    return Start(weights="w.safetensors", digest="0", take=take, class_names=classes)  # type: ignore[arg-type]


def test_the_whole_network_with_the_same_classes() -> None:
    plan = plan_hand_over(NETWORK, NETWORK, start("network"), CLASSES)
    assert (len(plan.taken), plan.left_out, plan.fresh) == (4, (), ())


def test_the_whole_network_with_other_classes_leaves_the_logits() -> None:
    for source in (NETWORK, NETWORK | {"logits.weight": (5, 4)}):
        plan = plan_hand_over(NETWORK, source, start("network", ("x", "y", "z")), CLASSES)
        assert plan.fresh == plan.left_out == ("logits.weight",)


def test_the_backbone_of_a_classifier() -> None:
    source = {"backbone.conv": (8, 3), "backbone.norm": (8,), "classifier.weight": (10, 8)}
    plan = plan_hand_over(NETWORK, source, start("backbone"), CLASSES)
    assert sorted(plan.taken) == ["backbone.conv", "backbone.norm"]
    assert plan.left_out == ("classifier.weight",)
    assert plan.fresh == ("aspp.conv", "logits.weight")
    assert "2 tensors taken (backbone), 0 renamed, 1 left out (classifier)" in plan.report()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_wrappers_are_renamed_away(prefix: str) -> None:
    source = {prefix + name: shape for name, shape in NETWORK.items()}
    plan = plan_hand_over(NETWORK, source, start("network"), CLASSES)
    assert plan.renamed["aspp.conv"] == prefix + "aspp.conv"


def test_a_bare_backbone_is_renamed() -> None:
    plan = plan_hand_over(NETWORK, {"conv": (8, 3), "norm": (8,)}, start("backbone", None), CLASSES)
    assert plan.renamed == {"backbone.conv": "conv", "backbone.norm": "norm"}


@pytest.mark.parametrize(
    ("source", "take", "message"),
    [
        ({"other": (1,)}, "network", "nothing fits: it has other, the network has aspp, backbone"),
        (NETWORK | {"aspp.conv": (5, 8)}, "network", r"aspp\.conv: \(5, 8\) there, \(4, 8\) here"),
        (
            {"backbone.conv": (8, 3)},
            "backbone",
            r"1 of 2 tensors differ, such as backbone\.norm: m",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    source: dict[str, tuple[int, ...]], take: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        plan_hand_over(NETWORK, source, start(take), CLASSES)


def test_only_the_recorded_weights_are_loaded(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    weights = {"0.weight": torch.ones(2, 2), "0.bias": torch.zeros(2)}
    save_file(weights, path)
    assert read_shapes(path) == {"0.weight": (2, 2), "0.bias": (2,)}
    wanted = Start(weights=str(path), digest=sha256(path), take="network")
    apply_hand_over(network, wanted, CLASSES)
    assert torch.equal(network[0].weight, torch.ones(2, 2))  # type: ignore[arg-type]
    save_file(weights | {"0.bias": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="changed since"):
        apply_hand_over(network, wanted, CLASSES)


def test_a_pickle_is_no_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_shapes(path)


def _shapes(network: torch.nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(t.shape) for name, t in network.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "encoder.", "module.backbone."])
@pytest.mark.parametrize(
    ("backbone", "foreign"),
    [
        ("xception41", "xception41"),
        ("timm:resnet18", "resnet18"),
        ("timm:convnext_atto", "convnext_atto"),
        ("timm:efficientnet_lite0", "efficientnet_lite0"),
    ],
)
def test_files_of_timm_fit_by_name(backbone: str, foreign: str, prefix: str) -> None:
    with torch.device("meta"):
        network = build_network(ModelConfig(backbone=backbone), "segmentation", 5)
        source = _shapes(timm.create_model(foreign), prefix)
    plan = plan_hand_over(_shapes(network), source, start("backbone", None), CLASSES)
    assert set(plan.taken) == {n for n in network.state_dict() if n.startswith("backbone.")}
    assert {name.removeprefix(prefix).split(".")[0] for name in plan.left_out} <= {
        *("fc", "head", "classifier", "conv_head", "bn2")
    }


def test_torchvisions_resnet_fits_timms() -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        network = build_network(ModelConfig(backbone="timm:resnet18"), "segmentation", 5)
        source = _shapes(models.resnet18(weights=None))
    plan = plan_hand_over(_shapes(network), source, start("backbone", None), CLASSES)
    assert plan.left_out == ("fc.weight", "fc.bias")


def test_counts_of_batches_may_be_missing() -> None:
    network = NETWORK | {"backbone.norm.num_batches_tracked": ()}
    plan = plan_hand_over(network, NETWORK, start("network"), CLASSES)
    assert plan.taken.keys() == NETWORK.keys()
    assert plan.fresh == ()


def test_a_part_that_is_missing_is_told_though_another_is_there() -> None:
    source = {"aspp.conv": (4, 8), "logits.weight": (3, 4)}
    with pytest.raises(CheckpointError, match=r"2 of 4 tensors differ, such as backbone\.conv: m"):
        plan_hand_over(NETWORK, source, start("network"), CLASSES)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"0.weight": torch.full((2, 2), torch.nan), "0.bias": torch.zeros(2)}, path)
    wanted = Start(weights=str(path), digest=sha256(path), take="network")
    with pytest.raises(CheckpointError, match=r"0\.weight has values that are not finite"):
        apply_hand_over(torch.nn.Sequential(torch.nn.Linear(2, 2)), wanted, CLASSES)
