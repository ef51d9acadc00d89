"""Checkpoints while training goes on: a copy in host memory, which a thread writes down.

Training stands still for the copy alone, or until the write before is done; that time is metered.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.bucket import BucketPath
from orchestrator.errors import CheckpointError
from orchestrator.job.sections import Checkpoints
from orchestrator.runs.checkpoint import checkpoint_paths, prune_checkpoints, save_checkpoint
from orchestrator.runs.record import Metrics

log = logging.getLogger(__name__)

# Seconds for which the last checkpoint is tried again, and the longest pause between two tries.
PATIENCE, _LONGEST_PAUSE = 600.0, 60


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a checkpoint is written from; see `orchestrator.runs.checkpoint`."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    state: Mapping[str, Any]
    ema: Mapping[str, Tensor] | None


class HostCopy:
    """Copies trees of tensors into host memory, which the next copy takes again."""

    def __init__(self) -> None:
        self._memory: dict[tuple[Any, ...], Tensor] = {}
        self._from_gpu = False

    def take(self, contents: Contents) -> Contents:
        """A copy that later steps do not change; the one before is overwritten."""
        copy = Contents(
            **{name: self._copy(part, (name,)) for name, part in vars(contents).items()}
        )
        if self._from_gpu:
            torch.cuda.current_stream().synchronize()
        return copy

    def _copy(self, part: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(part, Tensor):
            return self._memory_for(part, place).copy_(part.detach(), non_blocking=True)
        if isinstance(part, Mapping):
            return {key: self._copy(value, (*place, key)) for key, value in part.items()}
        if isinstance(part, list):
            return [self._copy(value, (*place, i)) for i, value in enumerate(part)]
        return part

    def _memory_for(self, tensor: Tensor, place: tuple[Any, ...]) -> Tensor:
        memory = self._memory.get(place)
        if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
            # Pinned memory takes the copy of a GPU without waiting for each tensor.
            memory = torch.empty_like(tensor.detach(), device="cpu", pin_memory=tensor.is_cuda)
            self._memory[place] = memory
            self._from_gpu |= tensor.is_cuda
        return memory


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, and deletes those it makes superfluous.

    A checkpoint that cannot be written costs no more than itself: those before stay, it is told,
    and training goes on. Only the last one is tried again, by `finish`.

    Args:
        directory: of the run's checkpoints.
        settings: how many stay.
        ready: called right before a checkpoint comes to be and before others are deleted; its
            error prevents that.
        tell: what becomes of a message about a checkpoint that was not written.
    """

    def __init__(
        self,
        directory: Path,
        settings: Checkpoints,
        ready: Callable[[], None],
        tell: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._ready = ready
        self._tell = tell
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._host = HostCopy()
        self._writing: Future[None] | None = None
        self._unwritten: Contents | None = None  # as long as the newest is not on the disk
        self._error: OSError | None = None
        self._stall: float | None = None

    def save(self, contents: Contents) -> None:
        """Copy, and have it written.

        Raises:
            Exception: what befell the write before, but for an OSError, which was told.
        """
        began = time.perf_counter()
        self._wait()
        self._unwritten = self._host.take(contents)
        self._writing = self._thread.submit(self._write, self._unwritten)
        self._stall = (self._stall or 0.0) + time.perf_counter() - began

    def close(self) -> None:
        """Wait until nothing is being written any more."""
        self._thread.shutdown()

    def read_stall(self) -> Metrics:
        """The time that training stood still for checkpoints since the last reading, if any."""
        stall, self._stall = self._stall, None
        return {} if stall is None else {"train/checkpoint_stall_s": stall}

    def finish(self, alive: Callable[[str], None]) -> None:
        """Return when the newest checkpoint is complete; try for `PATIENCE` seconds.

        `alive` is told every second, but not while a write is under way: it may hang.

        Raises:
            CheckpointError: it could not be written.
            Exception: as `save`.
        """
        alive("waits for its checkpoint")
        self._wait()
        pause, deadline = 1, time.monotonic() + PATIENCE
        while self._unwritten is not None:
            if time.monotonic() + pause > deadline:
                raise CheckpointError(self._last_words(self._unwritten.state["step"]))
            for _ in range(pause):
                alive("writes its checkpoint again soon")
                time.sleep(1)
            pause = min(2 * pause, _LONGEST_PAUSE)
            self._write(self._unwritten)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, contents: Contents) -> None:
        """Data, manifest, name; then the deletion of older ones."""
        step = contents.state["step"]
        try:
            self._ready()  # before directories are made where no storage is mounted
            written = save_checkpoint(
                self._directory,
                contents.weights,
                contents.optimizer,
                contents.state,
                contents.ema,
                self._ready,
            )
        except OSError as error:
            self._error = error
            self._tell(f"checkpoint of step {step}: not written, {self._why()}; earlier ones stay")
            return
        self._unwritten = None
        try:
            self._ready()
            keep = self._settings.keep, self._settings.keep_best
            prune_checkpoints(self._directory, written.path, *keep)
        except OSError as error:
            self._tell(f"{self._directory}: older checkpoints not deleted: {error}")

    def _why(self) -> str:
        if isinstance(self._directory, BucketPath):
            return str(self._error)
        try:
            free = f"{shutil.disk_usage(self._directory).free / 2**20:.0f} MiB free there"
        except OSError:
            free = "storage not reachable"
        return f"{self._error} ({self._directory}: {free})"

    def _last_words(self, step: int) -> str:
        steps = [int(path.name.removeprefix("step-")) for path in self._older()]
        goes_on = f"from step {steps[0]}" if steps else "from its start"
        return (
            f"the last checkpoint (step {step}) could not be written in {PATIENCE:.0f} s: "
            f"{self._why()}; make room or mend the storage, and give the same command again: "
            f"it goes on {goes_on}"
        )

    def _older(self) -> list[Path]:
        try:
            return checkpoint_paths(self._directory)
        except OSError:
            return []
