"""Checkpoints: directories that exist to a reader only once their manifest.json is there and true.

model.safetensors   weights and buffers of the network
optimizer.pt        optimizer state, loadable with weights_only=True; imported ones have none
state.json          stage, step, seed, fingerprint, metrics, parents, versions (orchestrator.worker)
manifest.json       sha256 and size of each file above, written last
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import CheckpointError
from orchestrator.files import read_json, save_tensors, sha256, sync, write_json

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

WEIGHTS, OPTIMIZER, STATE, MANIFEST = (
    "model.safetensors",
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
    def digest(self) -> str:
        """sha256 of the weights: what a later stage starts from."""
        return self.files[WEIGHTS]["sha256"]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.state["step"]

    def weights(self) -> dict[str, "torch.Tensor"]:
        """All tensors, on the CPU; CheckpointError when they cannot be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.path / WEIGHTS)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.path / WEIGHTS}: not a safetensors file: {error}"
            ) from None

    def optimizer(self) -> dict[str, Any]:
        """The optimizer's state_dict, on the CPU."""
        import torch

        return torch.load(self.path / OPTIMIZER, map_location="cpu", weights_only=True)


def save_checkpoint(
    directory: Path,
    weights: Mapping[str, "torch.Tensor"],
    optimizer: Mapping[str, Any],
    state: Mapping[str, Any],
) -> Checkpoint:
    """Write `directory`/step-NNNNNNNN in one piece and return it; `write_checkpoint` tells how."""
    return write_checkpoint(directory / f"step-{state['step']:08d}", weights, optimizer, state)


def write_checkpoint(
    final: Path,
    weights: Mapping[str, "torch.Tensor"],
    optimizer: Mapping[str, Any] | None,
    state: Mapping[str, Any],
) -> Checkpoint:
    """Write the checkpoint directory `final`, in the place of what is there, and return it.

    Everything is written and forced to disk under a temporary name, the manifest last, then the
    directory is renamed: a kill at any moment leaves the checkpoint whole or not there.
    """
    import torch

    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_tensors(temporary / WEIGHTS, weights)
    if optimizer is not None:
        torch.save(optimizer, temporary / OPTIMIZER)
    write_json(temporary / STATE, state)
    files = {}
    for path in sorted(temporary.iterdir()):
        sync(path)
        files[path.name] = {"sha256": sha256(path), "size": path.stat().st_size}
    write_json(temporary / MANIFEST, {"files": files})
    if final.exists():  # a damaged or superseded one of an earlier attempt
        shutil.rmtree(final)
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
        size = file.stat().st_size if file.exists() else None
        if size != expected:
            raise CheckpointError(f"{file}: size {size}, but {expected} in the manifest")
        if verify and sha256(file) != digest:
            raise CheckpointError(f"{file}: sha256 differs from the manifest: the file is damaged")
    return Checkpoint(path=path, files=manifest["files"], state=_read(path / STATE))


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}): the file is damaged") from None


def checkpoint_paths(directory: Path) -> list[Path]:
    """Candidate checkpoint directories, newest first."""
    return sorted(directory.glob("step-*"), reverse=True)


def newest_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest valid checkpoint; damaged ones are passed over with a warning."""
    for path in checkpoint_paths(directory):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            log.warning("passed over: %s", error)
    return None


def prune_checkpoints(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and leftovers of killed writers.

    A checkpoint loses its manifest first: what a kill leaves half deleted is no checkpoint.
    """
    complete = [path for path in checkpoint_paths(directory) if (path / MANIFEST).exists()]
    for path in complete[keep:]:
        (path / MANIFEST).unlink()
    for path in checkpoint_paths(directory):
        if not (path / MANIFEST).exists():
            shutil.rmtree(path)
    for path in directory.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
