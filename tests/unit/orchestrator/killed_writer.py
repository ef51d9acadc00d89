"""A program that is killed at every change of the file system, while checkpoints are written.

One child after another writes the same checkpoints; the n-th is killed (SIGKILL) right before its
n-th change, until one gets to the end. After each the parent looks at what is left.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from orchestrator.job.sections import Checkpoints
from orchestrator.runs.checkpoint import best_checkpoint, newest_checkpoint
from orchestrator.runs.checkpoint_writer import CheckpointWriter, Contents

DELETIONS = {"os.remove", "os.rmdir"}
CHANGES = DELETIONS | {"os.chmod", "os.mkdir", "os.rename", "os.truncate"}
TOP1 = {1: 0.9, 2: 0.4, 3: 0.5}  # step 1 stays as the best


def contents(step: int) -> Contents:
    """A checkpoint whose numbers are its step."""
    tensor = torch.full((50,), float(step))
    metrics = {"val/top1": TOP1[step]}
    return Contents(
        weights={"w": tensor},
        optimizer={"state": {0: {"momentum_buffer": tensor}}},
        state={"step": step, "task": "classification", "metrics": metrics},
        ema={"w": tensor + 0.5},
    )


def write_all(directory: Path, first: int, kill_at: int, told: int) -> None:
    """Write the checkpoints from `first` on; tell of each that is said to be complete."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        inside = event in DELETIONS and arguments[1] >= 0  # by name in an open directory
        if inside or ((writes or event in CHANGES) and str(directory) in str(arguments[0])):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    settings = Checkpoints(keep=1, keep_best=1)
    writer = CheckpointWriter(directory, settings, ready=lambda: None, tell=print)
    sys.addaudithook(hook)
    for step in range(first, len(TOP1) + 1):
        writer.save(contents(step))
        writer.finish(lambda _: None)
        os.write(told, bytes([step]))


def check(directory: Path, complete: int) -> int:
    """The newest checkpoint is whole, and no older than what was said to be; its step."""
    newest = newest_checkpoint(directory)
    step = newest.step if newest else 0
    assert step >= complete, f"step {complete} was complete, {step} is left"
    if newest:
        expected = torch.full((50,), float(step))
        averaged = newest.ema()
        assert newest.weights()["w"].equal(expected)
        assert averaged is not None
        assert averaged["w"].equal(expected + 0.5)
        assert newest.optimizer()["state"][0]["momentum_buffer"].equal(expected)
    if complete:
        best = best_checkpoint(directory)
        assert best is not None
        assert best.step == 1
    return step


def run_child(directory: Path, first: int, kill_at: int) -> tuple[bool, int]:
    """Whether a child got to the end, and the last step it told of."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            write_all(directory, first, kill_at, writing)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        complete = max(pipe.read(), default=0)
    return os.waitpid(pid, 0)[1] == 0, complete


def main(root: Path) -> None:
    """Prints at how many moments a child was killed."""
    torch.set_num_threads(1)
    for kill_at in range(1, 10_000):
        directory = root / str(kill_at)
        ended, complete = run_child(directory, 1, kill_at)
        step = check(directory, complete)
        # The same command again goes on from there, and leaves nothing of the dead one.
        assert run_child(directory, step + 1, 0)[0]
        check(directory, len(TOP1))
        left = {path.name for path in directory.iterdir()}
        if step < len(TOP1):
            assert left == {"step-00000001", "step-00000003"}, left
        if ended:
            print(kill_at - 1)
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
