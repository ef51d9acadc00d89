"""What run records and checkpoints say of metrics, data and versions."""

import math
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.dataset import Dataset

Metrics = dict[str, float]

HEADLINE = {
    "segmentation": "val/miou",
    "classification": "val/top1",
    "multilabel": "val/mean_average_precision",
}


def evaluated(metrics: Mapping[str, Any]) -> Metrics:
    """Those that an evaluation made."""
    return {name: value for name, value in metrics.items() if name.startswith("val/")}


def headline(state: Mapping[str, Any]) -> str:
    """The metric that a checkpoint's task is judged by."""
    name = HEADLINE[state["task"]]
    return f"{name} {state['metrics'][name]:.4f}" if name in state["metrics"] else "not evaluated"


def score(state: Mapping[str, Any]) -> float | None:
    """The metric that a checkpoint's task is judged by; None where it was not evaluated."""
    value = state.get("metrics", {}).get(HEADLINE.get(state.get("task", "")))
    return value if value is not None and math.isfinite(value) else None


def data_record(split: "Dataset") -> dict[str, Any]:
    """Identity and origin of a split."""
    manifest = split.manifest
    return {
        "dataset": manifest.dataset,
        "split": manifest.split,
        "digest": manifest.digest,
        "num_samples": manifest.num_samples,
        "manifest": manifest.place,
        "source": manifest.source.get("path"),
        "format": manifest.source.get("format"),
        "skipped": manifest.source.get("skipped", 0),
    }


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    packages = ("atrous", "torch", "ray", "mlflow", "timm", "numpy")
    return {"python": platform.python_version(), "machine": platform.machine()} | {
        package: _version(package) for package in packages
    }


def code_record() -> dict[str, Any]:
    """The code that runs, as `atrous submit` packed it or git knows it.

    "commit" and "dirty" (whether files differ from it) are None outside of a checkout, "sha256"
    where nothing was packed.
    """
    packed = os.environ.get("ATROUS_CODE_SHA256")
    commit, dirty = os.environ.get("ATROUS_CODE_COMMIT"), os.environ.get("ATROUS_CODE_DIRTY") == "1"
    here = Path(__file__)
    # Where another project's environment has it, that project's git does not track it.
    if packed is None and _git(here.parent, "ls-files", here.name):
        commit = _git(here.parent, "rev-parse", "HEAD")
        dirty = bool(_git(here.parent, "status", "--porcelain", "--untracked-files=no"))
    known = {"commit": commit, "dirty": dirty if commit else None, "sha256": packed}
    return {"version": _version("atrous")} | known


def _git(place: Path, *arguments: str) -> str | None:
    """What git says; None where it does not know the place, or is not there."""
    command = ["git", "-C", str(place), *arguments]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # Atrous itself, where a job brings it as its working directory
        return "not installed"


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all that is in a record; items of a list by their names."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, item in enumerate(value):
            yield from flatten(item, f"{prefix}.{item.get('name', index)}")
    else:
        yield prefix, value
