import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import model.export
import orchestrator.networks.export
from model.build import build_network
from model.config import ModelConfig
from orchestrator.cli import main as cli
from orchestrator.errors import CheckpointError, ExportError
from orchestrator.networks.export import SIZES, export
from orchestrator.runs.checkpoint import save_checkpoint

CONFIG = ModelConfig(
    backbone="xception41",
    width=0.0625,
    middle_units=1,
    aspp_channels=8,
    decoder=None,
    image_level_features=False,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    network = build_network(CONFIG, "segmentation", 2)
    return _save(tmp_path / "checkpoints", network.state_dict())


def _save(directory: Path, weights: dict[str, torch.Tensor]) -> Path:
    state = {
        "stage": "finetune-voc",
        "task": "segmentation",
        "step": 7,
        "model": CONFIG.model_dump(mode="json"),
        "class_names": ["background", "sofa"],
    }
    return save_checkpoint(directory, weights, {}, state).path


def test_the_command_writes_compares_and_says_where_the_network_is_from(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "network.pt2"
    arguments = ["export", str(checkpoint), str(out), "--output-stride", "8"]
    done = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert done.output.count("largest relative difference") == len(SIZES)
    assert [path.name for path in out.parent.iterdir()] == ["network.pt2"]
    metadata = dict.fromkeys(
        ("task", "class_names", "output_stride", "stage", "step", "checkpoint"), ""
    )
    program = torch.export.load(out, extra_files=metadata).module()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert metadata == {
        "task": "segmentation",
        "class_names": '["background", "sofa"]',
        "output_stride": "8",
        "stage": "finetune-voc",
        "step": "7",
        "checkpoint": manifest["files"]["model.safetensors"]["sha256"],
    }
    assert program(torch.zeros(1, 3, 40, 50)).shape == (1, 2, 40, 50)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize(
    ("bias", "difference"), [(100.0, r"\d\.\de[-+]\d\d"), (float("nan"), "nan")]
)
def test_a_program_that_differs_is_not_kept(
    bias: float,
    difference: str,
    suffix: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = torch.nn.Conv2d(3, 2, 1)  # of the same shapes, and quicker to trace
    torch.nn.init.constant_(other.bias, bias)
    program = model.export.trace(other)
    monkeypatch.setattr(model.export, "trace", lambda network: program)
    with pytest.raises(ExportError, match=f"images 1x3x64x80 by {difference} of the largest"):
        export(checkpoint, tmp_path / "out" / f"network{suffix}")
    assert not any((tmp_path / "out").iterdir())


def test_what_stands_in_the_way_is_said_before_the_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExportError, match=r"network\.pb: the name must end in one of \.onnx"):
        export(checkpoint, tmp_path / "network.pb")
    (tmp_path / "there.onnx").write_text("mine")
    with pytest.raises(ExportError, match="already there"):
        export(checkpoint, tmp_path / "there.onnx")
    assert (tmp_path / "there.onnx").read_text() == "mine"
    with pytest.raises(CheckpointError, match="output_stride is 7"):
        export(checkpoint, tmp_path / "network.onnx", output_stride=7)
    monkeypatch.setattr(orchestrator.networks.export, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs onnx, onnxruntime, onnxscript: pip install"):
        export(checkpoint, tmp_path / "network.onnx")
