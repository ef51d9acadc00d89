import os
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.errors import CheckpointError
from orchestrator.runs.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    save_checkpoint,
)

FILES = ("model.safetensors", "optimizer.pt", "state.json", "manifest.json")


def save(directory: Path, step: int) -> Checkpoint:
    weights = {"a.weight": torch.full((3, 2), float(step)).t()}
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    return save_checkpoint(directory, weights, optimizer, {"step": step, "metrics": {}})


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    saved = save(tmp_path, 5)
    read = read_checkpoint(tmp_path / "step-00000005")
    assert sorted(path.name for path in read.path.iterdir()) == sorted(FILES)
    assert read.digest == saved.digest
    assert read.step == 5
    assert torch.equal(read.weights()["a.weight"], torch.full((2, 3), 5.0))
    assert torch.equal(read.optimizer()["state"][0]["momentum_buffer"], torch.ones(2))


def test_the_average_is_the_result_and_the_weights_go_on(tmp_path: Path) -> None:
    weights, average = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    state = {"step": 1, "metrics": {}}
    with_average = save_checkpoint(tmp_path / "a", weights, {}, state, average)
    alone = save_checkpoint(tmp_path / "b", average, {}, state)
    assert with_average.digest == alone.digest
    assert with_average.result.name == "ema.safetensors"
    assert alone.result.name == "model.safetensors"
    assert alone.ema() is None
    read = read_checkpoint(with_average.path)
    assert read.weights()["w"].equal(torch.zeros(2))
    averaged = read.ema()
    assert averaged is not None
    assert averaged["w"].equal(torch.ones(2))


def test_equal_weights_have_equal_digests(tmp_path: Path) -> None:
    assert save(tmp_path / "a", 1).digest == save(tmp_path / "b", 1).digest
    assert save(tmp_path / "a", 1).digest != save(tmp_path / "a", 2).digest


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["remove", "truncate", "flip", "empty"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, name: str, damage: str
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2).path
    file = newest / name
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes({"truncate": content[:-1], "flip": flipped, "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=str(newest)):
        read_checkpoint(newest)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


@pytest.mark.parametrize("killed_at", range(1, 6))
def test_a_kill_while_saving_leaves_the_earlier_checkpoint(
    tmp_path: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    calls = 0

    def counted(original: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == killed_at:
                raise KeyboardInterrupt
            return original(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    monkeypatch.undo()
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    prune_checkpoints(tmp_path, found.path, keep=5)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "step-00000003" / "manifest.json").unlink()  # never completed
    prune_checkpoints(tmp_path, tmp_path / "step-00000004", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("true",)

    checkpoint = save(tmp_path, 1)
    torch.save({"state": Evil()}, checkpoint.path / "optimizer.pt")
    with pytest.raises(Exception, match=r"[Ww]eights_only"):
        checkpoint.optimizer()


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": {}}', '{"files": {"x": 1}}', "{"])
def test_a_manifest_that_is_none_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json: not"):
        read_checkpoint(tmp_path)
