"""Fixtures of all tests: nothing leaves the test's own directories, no token, no server."""

import os
from pathlib import Path

import pytest
import torch

os.environ["RAY_AUTH_MODE"] = "disabled"  # else Ray leaves a token in the home directory
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)
torch.set_num_threads(1)  # before any fixture of a module: sums of other threads differ

TINY_COUNTS = {
    "imagenet/train": 48,
    "imagenet/val": 16,
    "coco/train": 80,
    "coco/val": 24,
    "voc/train": 24,
    "voc/val": 9,
    "voc/extra": 8,
}


@pytest.fixture(autouse=True)
def _quiet_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs land in the test's directory; one thread, so that numbers repeat."""
    monkeypatch.setenv("ATROUS_STORAGE", str(tmp_path / "storage"))
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared tiny data sets: tiny-imagenet, tiny-coco, tiny-voc."""
    from data_pipeline.formats.synthetic import synthesize
    from data_pipeline.prepare import prepare

    root = tmp_path_factory.mktemp("data")
    layouts = ("imagenet", "coco", "voc")
    raw = synthesize(root / "raw", layouts=layouts, counts=TINY_COUNTS, size=64)
    for layout in layouts:
        prepare(layout, raw[layout], root / f"tiny-{layout}", workers=1)
    return root
