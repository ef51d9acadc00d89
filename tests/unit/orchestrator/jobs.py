"""Tiny job files: the twins of the recipes, on the same code path."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

MODEL = {
    "backbone": "xception41",
    "width": 0.02,
    "middle_units": 1,
    "batch_norm": {"momentum": 0.1},
}
SEGMENTER = MODEL | {
    "aspp_channels": 8,
    "decoder": {"low_level_channels": 8, "channels": 8},
}


def stage(name: str, task: str, dataset: str, **changes: Any) -> dict[str, Any]:
    """A stage of a few steps in this process."""
    segmentation = task == "segmentation"
    settings: dict[str, Any] = {
        "name": name,
        "task": task,
        "model": SEGMENTER if segmentation else MODEL,
        "data": {
            "train": {"dataset": dataset, "split": "train", "crop": 33},
            "val": {"dataset": dataset, "split": "val"},
            "threads": 2,
        },
        "optimizer": {"name": "sgd", "lr": 0.05},
        "schedule": {"name": "poly"},
        "global_batch": 8,
        "steps": 6,
        "evaluate": {"every": 3},
        "checkpoint": {"every": 2},
        "log_every": 1,
        "cluster": {"workers": 0},
    }
    return deepcopy(settings | changes)


def stage_job(data: Path, **changes: Any) -> dict[str, Any]:
    """A job file of one classification stage."""
    return {"kind": "stage", "data_root": str(data)} | stage(
        "tiny-imagenet", "classification", "tiny-imagenet", **changes
    )


def pipeline_job(data: Path) -> dict[str, Any]:
    """Backbone, COCO, VOC."""
    return {
        "kind": "pipeline",
        "name": "tiny",
        "data_root": str(data),
        "stages": [
            stage("tiny-voc", "segmentation", "tiny-voc", start_from="tiny-coco"),
            stage("tiny-coco", "segmentation", "tiny-coco", start_from="tiny-imagenet"),
            stage("tiny-imagenet", "classification", "tiny-imagenet"),
        ],
    }


def write(path: Path, job: dict[str, Any]) -> Path:
    """A job file."""
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    return path
