"""Checkpoints written behind training: copied, one at a time, kept whatever the disk does."""

import errno
import os
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.errors import CheckpointError, RunTakenOver
from orchestrator.job.sections import Checkpoints
from orchestrator.runs import checkpoint_writer
from orchestrator.runs.checkpoint import newest_checkpoint, save_checkpoint
from orchestrator.runs.checkpoint_writer import CheckpointWriter, Contents, HostCopy

ROOT = Path(__file__).parents[4]


def contents(step: int, top1: float | None = None, size: int = 50) -> Contents:
    tensor = torch.full((size,), float(step))
    return Contents(
        weights={"w": tensor},
        optimizer={"state": {0: {"momentum_buffer": tensor + 0.25}}, "betas": (0.9, 0.99)},
        state={
            "step": step,
            "task": "classification",
            "metrics": {} if top1 is None else {"val/top1": top1},
        },
        ema={"w": tensor + 0.5},
    )


def nothing(*_: Any) -> None:
    """Ready for everything, tells nobody."""


@contextmanager
def writing(
    directory: Path, told: list[str] | None = None, **settings: int
) -> Iterator[CheckpointWriter]:
    tell = nothing if told is None else told.append
    writer = CheckpointWriter(directory, Checkpoints(**settings), ready=nothing, tell=tell)
    yield writer
    writer.close()


def steps(directory: Path) -> list[int]:
    """Of the checkpoints there; nothing else is."""
    return sorted(int(path.name.removeprefix("step-")) for path in directory.iterdir())


def write(writer: CheckpointWriter, some: Contents) -> None:
    writer.save(some)
    writer.finish(nothing)


def test_a_copy_is_not_changed_by_later_steps() -> None:
    host, some = HostCopy(), contents(1)
    copy = host.take(some)
    some.weights["w"].add_(1)
    some.optimizer["state"][0]["momentum_buffer"].add_(1)
    assert copy.weights["w"].equal(torch.full((50,), 1.0))
    assert copy.optimizer["state"][0]["momentum_buffer"].equal(torch.full((50,), 1.25))
    assert copy.optimizer["betas"] == (0.9, 0.99)
    assert copy.ema is not None
    assert copy.ema["w"].equal(torch.full((50,), 1.5))


def test_the_next_copy_takes_the_same_memory() -> None:
    host = HostCopy()
    first = host.take(contents(1)).weights["w"]
    second = host.take(contents(2)).weights["w"]
    assert second.data_ptr() == first.data_ptr()
    other = host.take(contents(3, size=60)).weights["w"]
    assert other.shape == (60,)


def test_the_layout_of_a_tensor_stays() -> None:
    weights = {"w": torch.rand(8, 4, 3, 3).to(memory_format=torch.channels_last)}
    copy = HostCopy().take(Contents(weights=weights, optimizer={}, state={}, ema=None))
    assert copy.weights["w"].equal(weights["w"])
    assert copy.weights["w"].stride() == weights["w"].stride()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_copy_from_a_gpu_is_complete_in_pinned_memory() -> None:
    tensor = torch.rand(1 << 24, device="cuda")
    host = HostCopy()
    for _ in range(2):
        copy = host.take(Contents(weights={"w": tensor}, optimizer={}, state={}, ema=None))
        tensor_then = tensor.clone()
        tensor.add_(1)
        assert copy.weights["w"].is_pinned()
        assert copy.weights["w"].equal(tensor_then.cpu())


def test_training_goes_on_while_one_is_written_and_waits_for_it_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, begun = threading.Event(), []

    def slow(*arguments: Any) -> Any:
        begun.append(arguments[3]["step"])
        gate.wait(10)
        return save_checkpoint(*arguments)

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", slow)
    with writing(tmp_path) as writer:
        some = contents(1)
        writer.save(some)  # returns, though nothing is written yet
        assert not gate.is_set()
        some.weights["w"].zero_()  # training goes on
        second = threading.Thread(target=writer.save, args=(contents(2),))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        assert begun == [1]
        gate.set()
        second.join()
        writer.finish(nothing)
    assert steps(tmp_path) == [1, 2]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 2


def test_the_time_that_training_stood_still_is_read_once(tmp_path: Path) -> None:
    with writing(tmp_path) as writer:
        assert writer.read_stall() == {}
        writer.save(contents(1))
        stall = writer.read_stall()
        assert stall["train/checkpoint_stall_s"] > 0
        assert writer.read_stall() == {}


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    scores = {1: 0.4, 2: 0.9, 3: float("nan"), 4: None, 5: 0.8, 6: 0.9, 7: 0.1, 8: None}
    with writing(tmp_path, keep=2, keep_best=2) as writer:
        for step, top1 in scores.items():
            write(writer, contents(step, top1))
    assert steps(tmp_path) == [2, 6, 7, 8]


def test_a_damaged_later_one_does_not_take_the_place_of_the_newest(tmp_path: Path) -> None:
    """A run went on from step 1, because step 3 was damaged."""
    with writing(tmp_path, keep=1) as writer:
        write(writer, contents(3))
        (tmp_path / "step-00000003/model.safetensors").write_bytes(b"rot")
        write(writer, contents(2))
        found = newest_checkpoint(tmp_path)
        assert found is not None
        assert found.step == 2
        write(writer, contents(3))
    assert steps(tmp_path) == [3]


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """No file may grow larger than `limit` bytes: the system refuses in the middle of one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [0, 100, 300, 500, 1000, 1300])
def test_a_full_disk_costs_the_checkpoint_that_it_refuses(tmp_path: Path, limit: int) -> None:
    """The files have some 70, 280, 1,500 and 600 bytes; weights, average, optimizer, manifest."""
    told: list[str] = []
    with writing(tmp_path, told) as writer:
        write(writer, contents(1))
        with small_disk(limit):
            writer.save(contents(2))
            writer._wait()
        assert steps(tmp_path) == [1]
        (message,) = told
        assert message.startswith("checkpoint of step 2: not written, ")
        assert "too large" in message
        assert str(tmp_path) in message
        assert "MiB free there" in message
        write(writer, contents(3))
    assert steps(tmp_path) == [1, 3]
    assert len(told) == 1


class Refusing:
    """A disk that is full for so many tries."""

    def __init__(self, tries: int) -> None:
        self.tries = tries

    def __call__(self, *arguments: Any) -> Any:
        self.tries -= 1
        if self.tries >= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save_checkpoint(*arguments)


def test_the_last_one_is_tried_again_with_growing_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    alive: list[str] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", Refusing(4))
    with writing(tmp_path) as writer:
        writer.save(contents(1))
        writer.finish(alive.append)
    assert steps(tmp_path) == [1]
    assert pauses == [1] * (1 + 2 + 4 + 8)
    assert alive == ["waits for its checkpoint", *["writes its checkpoint again soon"] * 15]


@pytest.mark.parametrize("earlier", [False, True])
def test_the_last_one_that_cannot_be_written_is_an_error(
    tmp_path: Path, earlier: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writing(tmp_path) as writer:
        if earlier:
            write(writer, contents(1))
        monkeypatch.setattr("time.sleep", nothing)
        monkeypatch.setattr(checkpoint_writer, "PATIENCE", 30.0)
        monkeypatch.setattr(checkpoint_writer, "save_checkpoint", Refusing(1000))
        writer.save(contents(2))
        goes_on = "from step 1" if earlier else "from its start"
        with pytest.raises(CheckpointError, match=rf"\(step 2\).* in 30 s: .*space.*{goes_on}"):
            writer.finish(nothing)
    assert steps(tmp_path) == ([1] if earlier else [])


def test_what_is_no_matter_of_the_disk_is_raised_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken_over() -> None:
        raise RunTakenOver("attempt 2 goes on")

    writer = CheckpointWriter(tmp_path, Checkpoints(), taken_over, nothing)
    writer.save(contents(1))
    with pytest.raises(RunTakenOver, match="attempt 2"):
        writer.save(contents(2))
    writer.close()
    assert steps(tmp_path) == []


def test_killed_at_every_change_of_the_disk() -> None:
    """See `killed_writer`."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        command = [sys.executable, "-m", "tests.unit.orchestrator.killed_writer", directory]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert int(ran.stdout.splitlines()[-1]) > 30
