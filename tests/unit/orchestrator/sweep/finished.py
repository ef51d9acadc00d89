"""Sweeps of hand-made decisions."""

from pathlib import Path
from typing import Any

from orchestrator.job.sweep import SweepJob
from orchestrator.runs.run import Run, append_journal
from tests.unit.orchestrator.jobs import stage

Entry = dict[str, Any]
SPACE = {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}, "model.output_stride": {"choice": [8, 16]}}


def sweep_job(storage: Path, **changes: Any) -> SweepJob:
    """A sweep of one stage over its rate and output stride."""
    job: dict[str, Any] = {
        "kind": "sweep",
        "name": "tune-tiny",
        "storage": str(storage),
        "stages": [stage("tiny-voc", "segmentation", "tiny-voc")],
        "space": SPACE,
        "objective": {"metric": "val/miou", "mode": "max"},
        "budget": {"trials": 4},
    }
    return SweepJob.model_validate(job | changes)


def begin(trial: int, lr: float = 0.01, output_stride: int = 16, **values: Any) -> list[Entry]:
    """A trial that was suggested and started."""
    values = {"optimizer.lr": lr, "model.output_stride": output_stride} | values
    return [
        {"kind": "suggest", "trial": trial, "values": values},
        {"kind": "start", "trial": trial, "run": f"runs/tiny-voc-{trial}", "steps": 6},
    ]


def evaluated(trial: int, step: int, miou: float, **metrics: float) -> Entry:
    """An evaluation of a trial."""
    metrics = {"val/miou": miou} | metrics
    return {"kind": "result", "trial": trial, "step": step, "metrics": metrics}


def ended(trial: int, status: str = "finished", **fields: Any) -> Entry:
    """A trial that ended."""
    return {"kind": "end", "trial": trial, "status": status} | fields


def record(job: SweepJob, entries: list[Entry]) -> Run:
    """The directory of a sweep that decided so."""
    sweep = Run(Path(job.storage) / "sweeps" / f"{job.name}-0123456789ab")
    sweep.update(
        name=job.name,
        fingerprint="0123456789ab",
        status="finished",
        created=1.0,
        job=job.model_dump(mode="json"),
    )
    for entry in entries:
        append_journal(sweep.path / "decisions.jsonl", entry)
    return sweep
