import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli.main import app
from orchestrator.errors import RunError
from orchestrator.job.job_file import load_job
from orchestrator.networks.complexity import job_rows
from tests.unit.orchestrator import jobs


def _call(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["complexity", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_job_file_is_counted_at_its_crop_and_as_it_is_evaluated(
    tmp_path: Path, tiny_data: Path
) -> None:
    content = {"kind": "stage", "data_root": str(tiny_data)}
    content |= jobs.stage("s", "segmentation", "tiny-voc")
    content["evaluate"] = {"scales": [0.5, 1.0], "flip": True, "output_stride": 8}
    path = jobs.write(tmp_path / "job.yaml", content)
    train, evaluate = json.loads(_call(str(path), "--json"))
    assert (train["use"], train["output_stride"], train["size"]) == ("train", 16, [33, 33])
    assert (train["classes"], train["passes"]) == (21, 1)
    assert (evaluate["output_stride"], evaluate["passes"]) == (8, 4)
    assert evaluate["true"] > 2 * train["true"] > 0
    assert evaluate["paper_convention"] >= evaluate["true"]
    more = json.loads(_call(str(path), "--json", "--classes", "22"))
    assert more[0]["parameters"] - train["parameters"] == 8 + 1


def test_a_network_that_cannot_be_built_is_told(tmp_path: Path) -> None:
    content = {"kind": "stage"} | jobs.stage("s", "classification", "absent")
    content["model"] = {"backbone": "timm:resnet1"}
    job = load_job(jobs.write(tmp_path / "job.yaml", content))
    with pytest.raises(RunError, match=r"s: model: timm .* has no model 'resnet1'"):
        job_rows(job, None)


def test_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    from model import complexity

    few = [row for row in complexity.paper_rows() if (row.table, row.row) in {(3, 11), (5, 13)}]
    monkeypatch.setattr(complexity, "paper_rows", lambda: few)
    rows = json.loads(_call("--tables", "--json"))
    assert [(row["table"], row["row"], row["paper"]) for row in rows] == [
        (3, 11, 52.43),
        (5, 13, 54.17),
    ]
    assert rows[1]["ours"] == pytest.approx(54.05, abs=0.01)
    assert rows[1]["true"] == pytest.approx(54.04, abs=0.01)
    assert "resnet_v1_101_beta OS32" in _call("--tables")


def test_one_of_a_job_file_and_the_tables() -> None:
    result = CliRunner().invoke(app, ["complexity"])
    assert result.exit_code == 2
    assert "give a job file, or --tables" in result.output
