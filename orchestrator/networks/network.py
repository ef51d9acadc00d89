"""Open a checkpoint as a network, to evaluate, predict, export or take apart."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.config import ModelConfig, Task
from orchestrator.bucket import storage_path
from orchestrator.errors import CheckpointError
from orchestrator.runs.checkpoint import STATE, Checkpoint, newest_checkpoint, read_checkpoint
from orchestrator.runs.references import find_reference, is_reference

if TYPE_CHECKING:
    from model.build import Network


@dataclass(frozen=True, kw_only=True)
class OpenNetwork:
    """A network in evaluation mode with its weights, and what its checkpoint says of it."""

    network: "Network"
    task: Task
    class_names: tuple[str, ...]
    checkpoint: Checkpoint


def open_network(path: str | Path, *, output_stride: int | None = None) -> OpenNetwork:
    """Open a checkpoint directory, or the newest checkpoint of a run, as a network on the CPU.

    `path` is a checkpoint (step-NNNNNNNN), a run directory or its checkpoints directory, or a name
    of MLflow's, models:/NAME@best or runs:/ID, for one in the storage $ATROUS_STORAGE.
    `network(images)` takes RGB images (B, 3, H, W) in 0..255 and gives logits (B, K, H, W), or
    (B, K) from a classifier; `network.forward_low_resolution(images)` gives a segmentation's logits
    before the last upsampling. output_stride None leaves the one it was trained with.

    Raises:
        CheckpointError: there is no valid checkpoint, its weights do not fit its configuration, or
            the network cannot have the output stride.
    """
    from model.build import build_network

    named = is_reference(str(path))
    checkpoint = find_reference(str(path))[0] if named else _find(storage_path(path))
    state = checkpoint.state
    try:
        task, class_names = state["task"], tuple(state["class_names"])
        model = ModelConfig.model_validate(state["model"])
        network = build_network(model, task, len(class_names))
        network.load_state_dict(checkpoint.ema() or checkpoint.weights())
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: {STATE} and the weights do not make a network: {error}"
        ) from None
    if output_stride is not None:
        try:
            network.set_output_stride(output_stride)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path}: {error}") from None
    return OpenNetwork(
        network=network.eval(),
        task=task,
        class_names=class_names,
        checkpoint=checkpoint,
    )


def _find(path: Path) -> Checkpoint:
    if (path / STATE).exists():
        return read_checkpoint(path)
    if path.is_file():
        raise CheckpointError(
            f"{path}: weights alone do not say which network they are of: start a stage from them "
            "(start_from), or atrous import a TensorFlow checkpoint"
        )
    for directory in (path, path / "checkpoints"):
        if directory.is_dir() and (newest := newest_checkpoint(directory)) is not None:
            return newest
    raise CheckpointError(
        f"{path}: no valid checkpoint there; name a checkpoint (…/step-NNNNNNNN) or a run directory"
    )
