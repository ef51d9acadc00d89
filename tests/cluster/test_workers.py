"""Two workers compute what one computes."""

from pathlib import Path

import pytest

from orchestrator.runs.run import Run, read_journal
from tests.cluster.conftest import Atrous, only_run
from tests.unit.orchestrator.jobs import stage, write

pytestmark = pytest.mark.cluster
COMPARED = ("train/loss", "train/lr", "val/miou", "val/pixel_accuracy")


def test_two_workers_give_the_losses_of_one(
    tiny_data: Path, tmp_path: Path, atrous: Atrous, environment: dict[str, str]
) -> None:
    """Unequal parts (3 slots over 2 workers), unequal counts of labelled pixels, one loss.

    Batch norm is synchronised and dropout off: its masks are each worker's own. No image-level
    features: statistics of 3 pooled values multiply rounding (docs/log.md).
    """
    settings = stage("tiny-voc", "segmentation", "tiny-voc")
    job = {"kind": "stage", "data_root": str(tiny_data)} | settings
    job["model"] |= {"batch_norm": {"sync": True}, "image_level_features": False, "dropout": 0.0}
    job["optimizer"]["lr"] = 0.002
    job |= {"global_batch": 3, "steps": 5}
    journals = []
    for workers in (0, 2):
        environment["ATROUS_STORAGE"] = str(tmp_path / str(workers))
        job["cluster"] = {"workers": workers}
        done = atrous("run", write(tmp_path / "job.yaml", job))
        assert done.returncode == 0, done.stdout + done.stderr
        run = only_run(tmp_path / str(workers))
        assert isinstance(run, Run)
        journals.append(read_journal(run.journal))
    for one, two in zip(*journals, strict=True):
        assert one["step"] == two["step"]
        exact = [{k: v for k, v in r["metrics"].items() if k in COMPARED} for r in (one, two)]
        assert exact[0] == pytest.approx(exact[1], rel=1e-5)
