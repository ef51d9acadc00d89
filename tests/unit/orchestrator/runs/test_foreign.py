from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.build import build_network
from model.config import ModelConfig
from model.importers import tensorflow_names
from orchestrator.bucket import storage_path
from orchestrator.errors import CheckpointError
from orchestrator.files import save_tensors
from orchestrator.job.config import StageSettings
from orchestrator.runs.foreign import fetch_weights, read_pickle
from orchestrator.runs.start import resolve_start
from tests.object_store import bucket, store
from tests.unit.orchestrator.jobs import SEGMENTER, stage

__all__ = ["bucket", "store"]  # fixtures

MODEL = ModelConfig.model_validate(SEGMENTER)


class Evil:
    """A pickle that creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def _settings(start_from: Any) -> StageSettings:
    changes = {"start_from": start_from}
    return StageSettings.model_validate(stage("s", "segmentation", "tiny-voc", **changes))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": weights, "optimizer": {"state": {}}},
    ],
)
def test_state_dicts_of_torch_save_are_found(tmp_path: Path, wrap: Any) -> None:
    weights = {"a.weight": torch.ones(2), "b": torch.zeros(3)}
    path = tmp_path / "w.pth"
    torch.save(wrap(weights), path)
    assert read_pickle(path).keys() == weights.keys()


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    evil, none, torn, empty = (tmp_path / f"{n}.pth" for n in ("evil", "none", "torn", "empty"))
    torch.save({"a": torch.ones(1), "b": Evil(tmp_path / "ran")}, evil)
    torch.save({"epoch": 3, "args": ["x"]}, none)
    torn.write_bytes(evil.read_bytes()[:200])
    empty.touch()
    with pytest.raises(CheckpointError, match=r"evil\.pth: refused"):
        read_pickle(evil)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(CheckpointError, match=r"none\.pth: no state dict"):
        read_pickle(none)
    for path in (torn, empty):
        with pytest.raises(CheckpointError, match="damaged"):
            read_pickle(path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_pickle(tmp_path / "nothing.pth")


def test_a_stage_starts_from_a_file_of_torch_save(tmp_path: Path) -> None:
    network = build_network(MODEL, "segmentation", 21)
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, path)
    start = resolve_start(_settings(str(path)), tmp_path, {})
    assert start is not None
    kept = Path(start.weights)
    assert kept == tmp_path / "weights" / f"{start.digest}.safetensors"
    assert load_file(kept).keys() == {f"module.{k}" for k in network.state_dict()}
    assert (start.take, start.origin) == ("network", str(path))
    again = resolve_start(_settings(str(path)), tmp_path, {})
    assert again == start
    assert [p.name for p in kept.parent.iterdir()] == [kept.name]


def test_weights_of_a_bucket_and_for_one(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATROUS_CACHE", str(tmp_path / "cache"))
    network = build_network(MODEL, "segmentation", 21)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    save_tensors(tmp_path / "w.safetensors", network.state_dict())
    remote = storage_path(f"s3://{bucket}")
    for name in ("w.pth", "w.safetensors"):
        (remote / name).write_bytes((tmp_path / name).read_bytes())
        for storage in (remote, tmp_path / name.replace(".", "-")):
            start = resolve_start(_settings(str(remote / name)), storage, {})
            assert start is not None
            assert start == resolve_start(_settings(str(remote / name)), storage, {})
            assert start.weights == str(storage / "weights" / f"{start.digest}.safetensors")
            assert load_file(start.file()).keys() == network.state_dict().keys()
    with pytest.raises(CheckpointError, match=r"start_from: .*none\.pth"):
        resolve_start(_settings(str(remote / "none.pth")), remote, {})


def test_a_stage_starts_from_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def weights(name: str, normalization: Any) -> dict[str, torch.Tensor]:
        asked.append((name, normalization.mean))
        return {"stem.0.conv.weight": torch.ones(8, 3, 3, 3)}

    monkeypatch.setattr("model.importers.timm_weights", weights)
    start = resolve_start(_settings("timm:xception41.tf_in1k"), tmp_path, {})
    assert start is not None
    assert asked == [("xception41.tf_in1k", (127.5, 127.5, 127.5))]
    assert (start.take, start.origin) == ("backbone", "timm:xception41.tf_in1k")
    assert load_file(start.weights)["stem.0.conv.weight"].sum() == 8 * 27


def test_a_stage_starts_from_tensorflow(tmp_path: Path) -> None:
    import numpy as np

    network = build_network(MODEL, "segmentation", 4)
    path = tmp_path / "v.npz"
    variables = {
        foreign: np.ones(_in_tensorflow(foreign, tuple(network.state_dict()[name].shape)))
        for name, foreign in tensorflow_names(network).items()
    }
    np.savez(path, **variables)
    start = resolve_start(_settings(f"tf:{path}"), tmp_path, {})
    assert start is not None
    assert (start.take, start.class_names) == ("network", None)
    assert set(load_file(start.weights)) == set(tensorflow_names(network))
    with pytest.raises(CheckpointError, match=r"start_from: .*none\.npz: no such file"):
        resolve_start(_settings(f"tf:{tmp_path / 'none.npz'}"), tmp_path, {})


def _in_tensorflow(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != 4:
        return shape
    out, inner, height, width = shape
    depthwise = name.endswith("depthwise_weights")
    return (height, width, out, inner) if depthwise else (height, width, inner, out)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"w\.safetensors: no such file"):
        fetch_weights(str(tmp_path / "w.safetensors"), MODEL, "segmentation", tmp_path)
