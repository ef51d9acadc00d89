import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.build import build_network
from model.config import ModelConfig
from orchestrator.errors import CheckpointError
from orchestrator.files import write_json
from orchestrator.networks.network import open_network
from orchestrator.runs.checkpoint import write_checkpoint
from orchestrator.runs.run import Run
from tests.unit.orchestrator.jobs import SEGMENTER

STATE = {"task": "segmentation", "class_names": ["a", "b"], "model": SEGMENTER, "step": 3}


def _write(path: Path, **changes: Any) -> torch.nn.Module:
    network = build_network(ModelConfig.model_validate(SEGMENTER), "segmentation", 2)
    write_checkpoint(path, network.state_dict(), None, STATE | changes)
    return network.eval()


@pytest.mark.parametrize("name", ["run/checkpoints/step-00000003", "run/checkpoints", "run"])
def test_a_checkpoint_or_the_newest_of_a_run_opens(tmp_path: Path, name: str) -> None:
    network = _write(tmp_path / "run/checkpoints/step-00000003")
    opened = open_network(tmp_path / name)
    images = torch.randint(0, 256, (1, 3, 33, 33), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(opened.network(images), network(images))
    assert (opened.task, opened.class_names) == ("segmentation", ("a", "b"))
    assert open_network(tmp_path / name, output_stride=8).network.output_stride == 8


def test_a_name_of_mlflows_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATROUS_STORAGE", str(tmp_path))
    run = Run(tmp_path / "runs" / "voc")
    run.update(stage="voc", status="running")
    write_json(run.tracking, {"run_id": "a" * 32})
    network = _write(run.checkpoints / "step-00000003")
    opened = open_network(f"runs:/{'a' * 32}")
    assert torch.equal(opened.network.logits.weight, network.logits.weight)


def test_averaged_weights_are_what_opens(tmp_path: Path) -> None:
    network = build_network(ModelConfig.model_validate(SEGMENTER), "segmentation", 2)
    weights = network.state_dict()
    average = weights | {"logits.bias": torch.tensor([1.0, 2.0])}
    write_checkpoint(tmp_path / "step-00000003", weights, None, STATE, average)
    assert open_network(tmp_path).network.logits.bias.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ["a"]}, "size mismatch"),
        ({"model": {"backbone": "xception9"}}, "backbone"),
        ({"task": "detection"}, "task is 'detection'"),
        ({"class_names": None}, "not iterable"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_told(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    _write(tmp_path / "c", **changes)
    with pytest.raises(CheckpointError, match=message):
        open_network(tmp_path / "c")


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    from orchestrator.files import sha256

    _write(tmp_path / "c")
    weights, manifest = tmp_path / "c/model.safetensors", tmp_path / "c/manifest.json"
    torch.save({"a": torch.ones(1)}, weights)
    content = json.loads(manifest.read_text())
    content["files"][weights.name] = {"size": weights.stat().st_size, "sha256": sha256(weights)}
    manifest.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_network(tmp_path / "c")
    with pytest.raises(CheckpointError, match="do not say which network"):
        open_network(weights)


def test_what_is_no_checkpoint_does_not_open(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no valid checkpoint there; name a checkpoint"):
        open_network(tmp_path / "nothing")
