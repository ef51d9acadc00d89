"""A pipeline whose data sets lie in a bucket: prepared there, trained from there."""

import io
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from data_pipeline.dataset import open_dataset
from orchestrator.job.config import Prepared
from orchestrator.job.job_file import load_job
from orchestrator.launch.pipeline import run_job
from orchestrator.launch.report import Display
from orchestrator.runs.run import read_journal
from tests.object_store import SECRET_KEY, bucket, proxy, store
from tests.unit.orchestrator.jobs import stage, write

__all__ = ["bucket", "proxy", "store"]  # fixtures


def test_a_pipeline_prepares_and_trains_in_a_bucket(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATROUS_CACHE", str(tmp_path / "cache"))
    small = stage("small", "classification", "drawn", steps=4, evaluate={"every": 4})
    data = small["data"] | {"cache": {"size": "10 MB"}}
    data["train"]["block_size"] = 4
    counts = {"imagenet/train": 24, "imagenet/val": 8}
    job = {
        "kind": "pipeline",
        "name": "tiny",
        "data_root": f"s3://{bucket}/data",
        "datasets": {"drawn": {"format": "imagenet", "synthesize": {"counts": counts, "size": 64}}},
    }

    def train(changes: dict[str, object]) -> list[object]:
        storage = str(tmp_path / "on-disk" if changes else tmp_path / "in-bucket")
        settings = job | changes | {"storage": storage, "stages": [small | {"data": data}]}
        with Display(Console(file=io.StringIO())) as display:
            (result,) = run_job(load_job(write(tmp_path / "job.yaml", settings)), display)
        written = "".join(
            path.read_text() for path in Path(storage).rglob("*.json") if path.is_file()
        )
        assert SECRET_KEY not in written
        return [
            (record["step"], record["metrics"]["train/loss"])
            for record in read_journal(result.run.journal)
            if "train/loss" in record["metrics"]
        ]

    losses = train({})
    assert open_dataset(f"s3://{bucket}/data", "drawn", "train").num_samples == 24
    assert list((tmp_path / "cache").glob("??/*"))
    assert len(losses) == 4
    assert train({"data_root": str(tmp_path / "data")}) == losses


def test_raw_data_may_lie_in_a_bucket(tmp_path: Path) -> None:
    assert Prepared(format="voc", source="s3://bucket/raw/voc").source == "s3://bucket/raw/voc"
    assert Prepared(format="voc", source=str(tmp_path)).source == str(tmp_path)
    with pytest.raises(ValidationError, match="not gs:; copy or mount it"):
        Prepared(format="voc", source="gs://bucket/raw/voc")
