"""Checkpoints: directories that exist to a reader only once their manifest.json is there and true.

model.safetensors   weights and buffers of the network
ema.safetensors     the same with averaged weights, where the stage has `ema`
optimizer.pt        {"optimizer", "scaler"}: their state, loadable with weights_only=True; imported
                    checkpoints have none
state.json          stage, step, seed, fingerprint, metrics, parents, versions (training.worker)
manifest.json       sha256 and size of each file above, written last
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.bucket import BucketPath
from orchestrator.errors import CheckpointError
from orchestrator.files import (
    local_copy,
    read_json,
    remove_tree,
    save_object,
    save_tensors,
    sha256,
    size_of,
    staging,
    sync,
    write_json,
)
from orchestrator.runs.record import score

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

WEIGHTS, EMA, OPTIMIZER, STATE, MANIFEST = (
    "model.safetensors",
    "ema.safetensors",
    "optimizer.pt",
    "state.json",
    "manifest.json",
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    files: Mapping[str, Mapping[str, Any]]  # name -> {"sha256", "size"}
    state: Mapping[str, Any]

    @property
    def result(self) -> Path:
        """The weights that later stages, predictions and exports take: averaged, if there are."""
        return self.path / (EMA if EMA in self.files else WEIGHTS)

    @property
    def digest(self) -> str:
        """sha256 of `result`."""
        return self.files[self.result.name]["sha256"]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.state["step"]

    def weights(self) -> dict[str, "torch.Tensor"]:
        """All tensors, on the CPU; CheckpointError when they cannot be read."""
        return self._tensors(WEIGHTS)

    def ema(self) -> dict[str, "torch.Tensor"] | None:
        """All tensors with averaged weights; None where the stage has no average."""
        return self._tensors(EMA) if EMA in self.files else None

    def _tensors(self, name: str) -> dict[str, "torch.Tensor"]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self._local(name))
        except SafetensorError as error:
            raise CheckpointError(f"{self.path / name}: not a safetensors file: {error}") from None

    def optimizer(self) -> dict[str, Any]:
        """State of the optimizer and of the loss scale, on the CPU."""
        import torch

        return torch.load(self._local(OPTIMIZER), map_location="cpu", weights_only=True)

    def _local(self, name: str) -> Path:
        return _local(self.path / name, self.files[name]["sha256"])


def save_checkpoint(
    directory: Path,
    weights: Mapping[str, "torch.Tensor"],
    optimizer: Mapping[str, Any],
    state: Mapping[str, Any],
    ema: Mapping[str, "torch.Tensor"] | None = None,
    ready: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """Write `directory`/step-NNNNNNNN in one piece and return it; `write_checkpoint` tells how."""
    final = directory / f"step-{state['step']:08d}"
    return write_checkpoint(final, weights, optimizer, state, ema, ready)


def write_checkpoint(
    final: Path,
    weights: Mapping[str, "torch.Tensor"],
    optimizer: Mapping[str, Any] | None,
    state: Mapping[str, Any],
    ema: Mapping[str, "torch.Tensor"] | None = None,
    ready: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """Write the checkpoint directory `final`, in the place of what is there, and return it.

    Everything is written and forced to disk under a temporary name, the manifest last, then the
    directory is renamed: a kill at any moment leaves the checkpoint whole or not there. In a bucket
    the manifest is put last, after all that it names. `ready` is called right before the rename, or
    before each object that is put, and prevents it with an error.

    Raises:
        OSError: it cannot be written; what was there before still is, and nothing else.
    """
    with staging(final) as temporary:
        save_tensors(temporary / WEIGHTS, weights)
        if ema is not None:
            save_tensors(temporary / EMA, ema)
        if optimizer is not None:
            save_object(temporary / OPTIMIZER, optimizer)
        write_json(temporary / STATE, state)
        files = {
            path.name: {"sha256": sha256(path), "size": path.stat().st_size}
            for path in sorted(temporary.iterdir())
        }
        write_json(temporary / MANIFEST, {"files": files})
        ready()
        if final.exists():  # a damaged or superseded one of an earlier attempt
            delete_checkpoint(final)
        if isinstance(final, BucketPath):
            for name in (*files, MANIFEST):
                ready()
                (final / name).upload(temporary / name, ready)
        else:
            os.rename(temporary, final)
    sync(final.parent)
    return Checkpoint(path=final, files=files, state=state)


def read_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Open a checkpoint directory; `verify` reads every file and compares its digest.

    Raises:
        CheckpointError: not a checkpoint, or a file of it is missing or differs from the manifest.
    """
    manifest = _read(path / MANIFEST)
    if manifest is None:
        raise CheckpointError(
            f"{path}: not a checkpoint (no {MANIFEST}, so it was never completed)"
        )
    try:
        files = {
            name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()
        }
        _ = files[WEIGHTS], files[STATE]
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path / MANIFEST}: not a checkpoint's manifest ({type(error).__name__}: {error})"
        ) from None
    for name, (expected, digest) in files.items():
        file = path / name
        if (size := size_of(file)) != expected:
            raise CheckpointError(f"{file}: size {size}, but {expected} in the manifest")
        if verify and sha256(_local(file, digest)) != digest:
            raise CheckpointError(_damaged(file))
    return Checkpoint(path=path, files=manifest["files"], state=_read(path / STATE))


def _local(path: Path, digest: str) -> Path:
    try:
        return local_copy(path, digest)
    except ValueError:
        raise CheckpointError(_damaged(path)) from None


def _damaged(file: Path) -> str:
    return f"{file}: sha256 differs from the manifest: the file is damaged"


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}): the file is damaged") from None


def checkpoint_paths(directory: Path) -> list[Path]:
    """Candidate checkpoint directories, newest first."""
    if isinstance(directory, BucketPath):  # some stores still list a prefix that is empty by now
        files = [path.relative_to(directory) for path, _ in directory.below()]
        names = {path.parts[0] for path in files if path.parts[0].startswith("step-")}
        return [directory / name for name in sorted(names, reverse=True)]
    return sorted(directory.glob("step-*"), reverse=True)


def newest_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest valid checkpoint; damaged ones are passed over with a warning."""
    for path in checkpoint_paths(directory):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            log.warning("passed over: %s", error)
    return None


def best_checkpoint(directory: Path) -> Checkpoint | None:
    """The valid checkpoint that is best by the task's metric, the newest of equals.

    Only those count that were evaluated at their very step.
    """
    for path in _best_first(checkpoint_paths(directory)):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            log.warning("passed over: %s", error)
    return None


def _best_first(paths: Sequence[Path]) -> list[Path]:
    scores = {path: _score(path) for path in paths}
    rated = [(value, path) for path, value in scores.items() if value is not None]
    return [path for _, path in sorted(rated, reverse=True)]


def _score(path: Path) -> float | None:
    try:
        return score(_read(path / STATE) or {})
    except CheckpointError:  # damaged: not the best of anything
        return None


def prune_checkpoints(directory: Path, newest: Path, keep: int, keep_best: int = 0) -> None:
    """Delete what a complete checkpoint `newest` makes superfluous, and what killed writers left.

    It and those before it are counted: the newest `keep` stay, and the best `keep_best`. Later
    ones are damaged or of a path that was left, and are written anew.
    """
    complete = [path for path in checkpoint_paths(directory) if (path / MANIFEST).exists()]
    counted = [path for path in complete if path <= newest]
    stay = {*counted[:keep], *_best_first(counted)[:keep_best]}
    for path in checkpoint_paths(directory):
        if path not in stay and (path <= newest or path not in complete):
            delete_checkpoint(path)
    delete_unfinished(directory)


def delete_unfinished(directory: Path) -> None:
    """Delete what killed writers left; only who alone writes there may do so."""
    for path in directory.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    if isinstance(directory, BucketPath):
        directory.abort_uploads()
        for path in checkpoint_paths(directory):
            if not (path / MANIFEST).exists():
                remove_tree(path)


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint, the manifest first: what a kill leaves half deleted is none."""
    (path / MANIFEST).unlink(missing_ok=True)
    remove_tree(path)
