"""Shards that others wrote, from the command line and in the data sets of a pipeline."""

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import webdataset as wds
from pydantic import ValidationError
from rich.console import Console
from typer.testing import CliRunner

from data_pipeline.dataset import open_dataset
from orchestrator.cli.main import app
from orchestrator.job.config import PipelineJob, Prepared
from orchestrator.job.job_file import load_job
from orchestrator.launch.pipeline import run_job
from orchestrator.launch.preflight import preflight
from orchestrator.launch.report import Display
from orchestrator.launch.stage import StageResult
from tests.unit.orchestrator.jobs import stage, write


def write_shards(folder: Path, name: str, counts: tuple[int, ...], seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.PCG64(seed))
    for shard, count in enumerate(counts):
        with wds.TarWriter(str(folder / f"{name}-{shard:03d}.tar")) as tar:
            for row in range(count):
                pixels = rng.integers(0, 256, (40, 44, 3), dtype=np.uint8)
                entry = {"jpg": simplejpeg.encode_jpeg(pixels), "cls": row % 3}
                tar.write({"__key__": f"{name}/{shard}{row:03d}"} | entry)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_shards(tmp_path / "raw", "train", (5, 9, 2))
    write_shards(tmp_path / "raw", "val", (4,), seed=1)
    (tmp_path / "raw/classes.txt").write_text("ant\nbee\ncow\n")
    return tmp_path / "raw"


def job(tmp_path: Path, **shards: Any) -> dict[str, Any]:
    section = {
        "splits": {"train": "train-{000..002}.tar", "val": ["val-*.tar"]},
        "task": "classification",
        "classes": "classes.txt",
    }
    foreign = {"format": "shards", "source": str(tmp_path / "raw"), "shards": section | shards}
    return {
        "kind": "pipeline",
        "name": "tiny",
        "storage": str(tmp_path / "storage"),
        "datasets": {"insects": foreign},
        "stages": [stage("small", "classification", "insects", steps=2, evaluate={"every": 2})],
    }


def run(tmp_path: Path, **shards: Any) -> tuple[StageResult, str]:
    output = io.StringIO()
    with Display(Console(file=output, width=300)) as display:
        path = write(tmp_path / "job.yaml", job(tmp_path, **shards))
        (result,) = run_job(load_job(path), display)
    return result, output.getvalue()


def test_a_pipeline_indexes_once_and_trains(
    raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "data_pipeline")
    result, shown = run(tmp_path)
    assert "data insects: train 16, val 4" in shown
    assert not result.reused
    manifest = open_dataset(tmp_path / "storage/data", "insects", "train").manifest
    assert manifest.class_names == ("ant", "bee", "cow")
    assert not list((tmp_path / "storage").rglob("*.tar"))
    assert run(tmp_path)[0].reused
    assert not caplog.records
    write_shards(raw, "train", (5, 9), seed=7)
    changed = run(tmp_path)[0]
    assert "2 of 3 shards are new or have changed" in caplog.text
    assert not changed.reused
    assert changed.run.path != result.run.path


def test_a_stage_alone_indexes_too(raw: Path, tmp_path: Path) -> None:
    """From a job file of kind: stage, which knows what it trains on as a pipeline does."""
    whole = job(tmp_path)
    (alone,) = whole["stages"]
    alone |= {"kind": "stage", "storage": whole["storage"], "datasets": whole["datasets"]}
    path = write(tmp_path / "stage.yaml", alone)
    assert list(preflight(load_job(path)).unknown) == ["small"]
    with Display(Console(file=io.StringIO())) as display:
        (result,) = run_job(load_job(path), display)
    assert not result.reused
    assert run(tmp_path)[0].reused  # the same stage in a pipeline
    alone["datasets"]["insects"]["source"] = str(tmp_path / "nowhere")
    assert preflight(load_job(write(path, alone))).done == ["small"]


def test_preflight_knows_what_will_be_indexed(raw: Path, tmp_path: Path) -> None:
    settings = job(tmp_path)
    report = preflight(PipelineJob.model_validate(settings))
    assert report.unknown == {"small": "insects is prepared first"}
    run(tmp_path)
    report = preflight(PipelineJob.model_validate(settings))
    assert report.errors == []
    assert report.done == ["small"]
    (raw / "train-001.tar").write_bytes(b"short")
    assert preflight(PipelineJob.model_validate(settings)).errors == []  # indexed again at launch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": None}, "format: shards goes together with the section shards"),
        ({"format": "folder"}, "format: shards goes together with the section shards"),
        ({"limit": 3}, "no splits, no limit"),
        ({"splits": ["train"]}, "no splits, no limit"),
        ({"shards": {"splits": {}, "task": "classification", "classes": 3}}, "at least 1 item"),
        ({"shards": {"splits": {"train": "."}, "task": "boxes", "classes": 3}}, "'segmentation'"),
        ({"shards": {"splits": {"train": "."}, "task": "multilabel"}}, "classes"),
    ],
)
def test_what_the_section_may_say(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Prepared.model_validate(job(tmp_path)["datasets"]["insects"] | changes)


def test_the_command_indexes(raw: Path, tmp_path: Path) -> None:
    shards = [str(path) for path in sorted(raw.glob("train-*.tar"))]  # as a shell expands them
    options = ["--task", "classification", "--classes", str(raw / "classes.txt")]
    arguments = ["data", "index", *shards, str(tmp_path / "data/insects"), *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "train: 16 samples, manifest " in result.output
    assert open_dataset(tmp_path / "data", "insects", "train").num_samples == 16
    verified = CliRunner().invoke(app, ["data", "verify", str(tmp_path / "data/insects")])
    assert "3 shards, 16 samples: all intact" in verified.output
    wrong = CliRunner().invoke(app, [*arguments[:-2], "--classes", "3", "--task", "boxes"])
    assert wrong.exit_code == 2
    assert "--task" in wrong.output
