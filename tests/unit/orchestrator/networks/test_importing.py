from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.build import build_network
from model.config import ModelConfig
from model.importers import tensorflow_names
from orchestrator.errors import CheckpointError, JobFileError
from orchestrator.job.job_file import load_job
from orchestrator.networks.importing import import_checkpoint
from orchestrator.networks.network import open_network
from orchestrator.runs.checkpoint import read_checkpoint
from orchestrator.runs.lineage import as_lines, trace
from tests.unit.orchestrator import jobs


@pytest.fixture
def job(tmp_path: Path, tiny_data: Path) -> Any:
    content = {"kind": "stage", "data_root": str(tiny_data)}
    content |= jobs.stage("s", "segmentation", "tiny-voc")
    return load_job(jobs.write(tmp_path / "job.yaml", content))


def _save(path: Path, classes: int = 21, **others: Any) -> torch.nn.Module:
    """The variables of a random network as an .npz; returns the network."""
    network = build_network(ModelConfig.model_validate(jobs.SEGMENTER), "segmentation", classes)
    own, variables = network.state_dict(), {}
    for name, foreign in tensorflow_names(network).items():
        value = own[name]
        if value.ndim < 4:
            value.uniform_(0.5, 1.5)
        if value.ndim == 4:
            axes = (2, 3, 0, 1) if foreign.endswith("depthwise_weights") else (2, 3, 1, 0)
            value = value.permute(axes)
        variables[foreign] = value.numpy()
    np.savez(path, **variables, **others)
    return network.eval()


def test_an_imported_checkpoint_opens_as_the_same_network(tmp_path: Path, job: Any) -> None:
    network = _save(tmp_path / "v.npz", global_step=np.array(7))
    source, out = f"tf:{tmp_path / 'v.npz'}", tmp_path / "imported"
    checkpoint, report = import_checkpoint(source, job, out)
    assert "1 variables left out" in report
    assert read_checkpoint(out).digest == checkpoint.digest
    opened = open_network(out)
    assert opened.class_names[:2] == ("background", "aeroplane")
    assert not opened.network.training
    images = torch.randint(0, 256, (2, 3, 33, 49), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(opened.network(images), network(images))
        opened = open_network(out, output_stride=8)
        network.set_output_stride(8)
        found = opened.network.forward_low_resolution(images)
        assert torch.equal(found, network.forward_low_resolution(images))
    assert f"started from {source}" in as_lines(trace(checkpoint))[-1]


def test_classes_have_numbers_where_the_data_set_is_not_prepared(tmp_path: Path) -> None:
    _save(tmp_path / "v.npz", classes=3)
    content = {"kind": "stage", "data_root": str(tmp_path)} | jobs.stage("s", "segmentation", "x")
    job = load_job(jobs.write(tmp_path / "job.yaml", content))
    checkpoint, _ = import_checkpoint(f"tf:{tmp_path / 'v.npz'}", job, tmp_path / "out")
    assert open_network(checkpoint.path).class_names == ("class 0", "class 1", "class 2")


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path, job: Any) -> None:
    _save(tmp_path / "more.npz", **{"aspp9/weights": np.zeros(3)})
    _save(tmp_path / "classes.npz", classes=5)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="1 variables without a place in the network: aspp9"):
        import_checkpoint(f"tf:{tmp_path / 'more.npz'}", job, out)
    with pytest.raises(CheckpointError, match=r"5 classes, but data\.train\.dataset tiny-voc has"):
        import_checkpoint(f"tf:{tmp_path / 'classes.npz'}", job, out)
    with pytest.raises(CheckpointError, match="name the checkpoint as tf:PATH"):
        import_checkpoint(str(tmp_path / "more.npz"), job, out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        import_checkpoint(f"tf:{tmp_path / 'classes.npz'}", job, out)


def test_a_pipelines_stage_is_named(tmp_path: Path, tiny_data: Path) -> None:
    _save(tmp_path / "v.npz")
    job = load_job(jobs.write(tmp_path / "job.yaml", jobs.pipeline_job(tiny_data)))
    source = f"tf:{tmp_path / 'v.npz'}"
    with pytest.raises(JobFileError, match="--stage None: the pipeline tiny has tiny-voc"):
        import_checkpoint(source, job, tmp_path / "out")
    checkpoint, _ = import_checkpoint(source, job, tmp_path / "out", stage="tiny-voc")
    assert checkpoint.state["stage"] == "tiny-voc"
