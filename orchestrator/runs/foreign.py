"""Weights that are no checkpoint of ours: read safely, and kept in the storage as safetensors."""

import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import ModelConfig, Task
from orchestrator.bucket import BucketPath, storage_path
from orchestrator.errors import CheckpointError
from orchestrator.files import put_in_place, save_tensors, sha256, staging

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

TIMM, TENSORFLOW = "timm:", "tf:"
SAFETENSORS, PICKLES = ".safetensors", (".pt", ".pth", ".bin", ".ckpt")
Tensors = Mapping[str, "torch.Tensor"]


def is_foreign(place: str) -> bool:
    """Whether a start_from names weights of others: timm:NAME, tf:PATH, or a file."""
    return place.startswith((TIMM, TENSORFLOW)) or place.endswith((SAFETENSORS, *PICKLES))


def fetch_weights(place: str, model: ModelConfig, task: Task, storage: Path) -> Path:
    """A safetensors file with the weights at `place`, under their own names, or ours from tf:.

    Raises:
        CheckpointError: there are none, they are damaged, or not weights alone.
    """
    path = storage_path(place)
    if place.endswith(SAFETENSORS) and not isinstance(path, BucketPath):
        if not path.is_file():
            raise CheckpointError(f"start_from: {path}: no such file")
        return path
    directory = storage / "weights"
    with staging(directory / "new") as folder:
        try:
            file = _fetch(place, model, task, folder)
        except (ValueError, FileNotFoundError) as error:
            raise CheckpointError(f"start_from: {error}") from None
        kept = directory / f"{sha256(file)}{SAFETENSORS}"
        if not (isinstance(kept, BucketPath) and kept.is_file()):
            put_in_place(file, kept)
    return kept


def _fetch(place: str, model: ModelConfig, task: Task, folder: Path) -> Path:
    """A safetensors file in `folder` with the weights at `place`."""
    path, file = storage_path(place), folder / f"weights{SAFETENSORS}"
    if isinstance(path, BucketPath):
        path = path.save_to(folder / path.name)
        if place.endswith(SAFETENSORS):
            return path
    if place.startswith(TIMM):
        tensors = _timm(place, model, task)
    elif place.startswith(TENSORFLOW):
        tensors = _tensorflow(place, model, task)
    else:
        tensors = read_pickle(path)
    # Clones, because safetensors refuses tensors that share memory.
    save_tensors(file, {name: tensor.clone() for name, tensor in tensors.items()})
    return file


def _timm(place: str, model: ModelConfig, task: Task) -> Tensors:
    import torch

    from model.build import build_network
    from model.importers import timm_weights

    with torch.device("meta"):
        backbone = build_network(model, task, num_classes=1).backbone
    return timm_weights(place.removeprefix(TIMM), backbone.normalization)


def _tensorflow(place: str, model: ModelConfig, task: Task) -> Tensors:
    from model.importers import from_tensorflow, read_variables

    path = str(Path(place.removeprefix(TENSORFLOW)).expanduser())
    imported = from_tensorflow(model, task, read_variables(path))
    if imported.unplaced:
        log.warning("%s: %s", place, imported.report())
    return imported.tensors


def read_pickle(path: Path) -> Tensors:
    """The tensors of a file of torch.save, read without running anything the file says.

    The state dict may be the file's content or one of its entries.

    Raises:
        CheckpointError: no such file, damaged, holds more than tensors and plain values, or no
            state dict.
    """
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        why = re.search(r"(Unsupported \w+: .*?) (was|is) not", str(error))
        raise CheckpointError(
            f"{path}: refused: it is damaged, or holds objects that would run code when read"
            f"{f' ({why[1]})' if why else ''}; save its state_dict alone, best as .safetensors"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: not a file of torch.save, or damaged: {error}") from None
    for name in ("", "state_dict", "model", "model_state_dict", "model_state"):
        entry = content.get(name) if name and isinstance(content, dict) else content
        tensors = _tensors(entry)
        if tensors:
            return tensors
    raise CheckpointError(
        f"{path}: no state dict: neither the file's content nor its entry state_dict, model, "
        "model_state_dict or model_state has tensors by name"
    )


def _tensors(content: Any) -> dict[str, "torch.Tensor"]:
    import torch

    if not isinstance(content, dict):
        return {}
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
