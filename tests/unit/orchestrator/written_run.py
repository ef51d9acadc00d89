"""Run directories as training leaves them, without training: for what only reads them."""

import time
from pathlib import Path
from typing import Any

import torch

from orchestrator.runs.checkpoint import Checkpoint, save_checkpoint
from orchestrator.runs.run import Run, append_journal, run_directory

DATA = {
    "train": {"dataset": "voc", "split": "train", "digest": "1" * 64, "num_samples": 9},
    "val": {"dataset": "voc", "split": "val", "digest": "2" * 64, "num_samples": 3},
}
for _split in DATA.values():
    _split |= {"manifest": "voc", "source": "raw", "format": "voc", "skipped": 0}


class WrittenRun:
    """A run of a stage that is written step by step."""

    def __init__(
        self, storage: Path, stage: str = "voc", fingerprint: str = "f" * 64, **fields: Any
    ) -> None:
        self.run: Run = run_directory(storage, stage, fingerprint)
        self.run.update(
            name=stage,
            stage=stage,
            fingerprint=fingerprint,
            status="running",
            created=time.time(),
            attempts=1,
            steps=6,
            job={"name": stage, "task": "segmentation", "checkpoint": {}},
            start=None,
            data=DATA,
            **fields,
        )
        self._number = float(int(fingerprint[:4], 16))

    def log(self, *steps: int, miou: float | None = None, loss: float = 1.0) -> None:
        """Lines of the journal; with `miou` of an evaluation."""
        for step in steps:
            metrics = {"train/loss": loss / step}
            if miou is not None:
                metrics |= {"val/miou": miou, "val/iou/a (b)": miou}
            append_journal(
                self.run.journal, {"step": step, "time": time.time(), "metrics": metrics}
            )

    def save(self, step: int, miou: float | None = None) -> Checkpoint:
        """A checkpoint."""
        state = {
            "stage": self.run.read()["stage"],
            "task": "segmentation",
            "fingerprint": self.run.read()["fingerprint"],
            "step": step,
            "metrics": {} if miou is None else {"val/miou": miou, "val/iou/a (b)": miou},
            "model": {"backbone": "xception41"},
            "class_names": ["a (b)"],
            "data": DATA,
            "parents": [],
            "time": time.time(),
        }
        weights = {"backbone.w": torch.tensor([self._number, float(step)])}
        return save_checkpoint(self.run.checkpoints, weights, {}, state)

    def finish(self, miou: float = 0.5) -> Checkpoint:
        """The last steps, to the end."""
        self.log(5)
        self.log(6, miou=miou)
        checkpoint = self.save(6, miou)
        self.run.update(
            status="finished",
            checkpoint=str(checkpoint.path.relative_to(self.run.path)),
            digest=checkpoint.digest,
            metrics=dict(checkpoint.state["metrics"]),
        )
        return checkpoint
