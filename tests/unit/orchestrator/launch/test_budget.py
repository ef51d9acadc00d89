"""Limits of a job, from the command line to the records."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from orchestrator.cli.main import app
from orchestrator.errors import JobStopped
from orchestrator.job.job_file import load_job
from orchestrator.launch.budget import limit_findings, limit_lines
from orchestrator.launch.pipeline import run_job
from orchestrator.launch.preflight import Report, preflight
from orchestrator.launch.report import Display
from orchestrator.runs.bill import Bill, add_bills
from orchestrator.runs.run import all_runs
from tests.unit.orchestrator.jobs import pipeline_job, stage_job, write


def command(*arguments: Any) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_a_limit_stops_with_a_checkpoint_and_a_larger_one_goes_on(
    tiny_data: Path, tmp_path: Path
) -> None:
    settings = stage_job(tiny_data, steps=60, max_hours=1e-6, checkpoint={"every": 60})
    path = write(tmp_path / "job.yaml", settings | {"storage": str(tmp_path)})
    stopped = command("run", path)
    assert stopped.exit_code == 75, stopped.output
    assert "max_hours: " in stopped.output
    assert "the same command goes on from there, after a limit with a larger one" in stopped.output
    (run,) = all_runs(tmp_path)
    assert any(run.checkpoints.iterdir())
    assert command("wait", "tiny-imagenet", "--storage", tmp_path).exit_code == 75
    status = command("status", "tiny-imagenet", "--storage", tmp_path)
    assert "reason: stopped (max_hours: " in status.output

    assert command("run", path, "--set", "max_hours=1").exit_code == 0
    (run,) = all_runs(tmp_path)
    record = json.loads(command("status", "tiny-imagenet", "--storage", tmp_path, "--json").output)
    assert (record["state"], record["attempts"], record["reason"]) == ("finished", 2, None)
    assert record["overrides"] == ["max_hours=1"]
    assert record["bill"]["cpu_hours"] > 0
    (link,) = json.loads(
        command("lineage", "tiny-imagenet", "--storage", tmp_path, "--json").output
    )
    assert link["overrides"] == ["max_hours=1"]
    assert link["code"] == record["code"]
    assert "CPU-hours" in command("runs", "--storage", tmp_path).output


def test_after_the_deadline_no_data_is_prepared(tmp_path: Path) -> None:
    data = {"new": {"format": "voc", "source": str(tmp_path)}}
    job = stage_job(tmp_path) | {"datasets": data, "deadline": "2020-01-01T00:00:00Z"}
    display: Display = None  # type: ignore[assignment]
    with pytest.raises(JobStopped, match=r"tiny-imagenet: not started \(deadline: 2020-01-01"):
        run_job(load_job(write(tmp_path / "job.yaml", job)), display)


def spent(hours: float, begin: float = 0.0) -> Bill:
    span = (begin * 3600, (begin + hours) * 3600)
    return Bill(wall=0, lost={}, gpu_seconds=0, cpu_seconds=0, money=None, spans=(span,))


def test_hours_side_by_side_count_once() -> None:
    assert add_bills([spent(3), spent(1, begin=1), spent(2, begin=2)]).hours == 4
    assert add_bills([spent(1), spent(1, begin=5)]).hours == 2


def test_the_plan_compares_limits_with_the_forecast(tiny_data: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "job.yaml", pipeline_job(tiny_data))
    enough = ("max_hours=100", "deadline=2100-01-01T00:00:00Z")
    job = load_job(path, enough)
    report = preflight(job)
    assert limit_findings(job, report) == []
    hours, deadline = limit_lines(job, report)
    assert hours.startswith("tiny: max_hours: about 0.0 of 100")
    assert deadline.startswith("tiny: deadline: 2100-01-01 00:00+00:00; done about at ")
    assert not {"max_hours", "deadline"} & {one.text.split(":")[0] for one in report.findings}
    few = ("max_hours=1e-9", "stages.tiny-coco.max_hours=1e-9", "deadline=2020-01-01T00:00:00Z")
    found = [one for one in preflight(load_job(path, few)).findings if "limit" in one.text]
    assert [(one.level, one.where, one.text.split(":")[0]) for one in found] == [
        ("warning", "tiny", "max_hours"),
        ("warning", "tiny", "deadline"),
        ("warning", "tiny-coco", "max_hours"),
    ]


def test_the_forecast_follows_the_longest_chain_and_counts_what_is_spent(
    tiny_data: Path, tmp_path: Path
) -> None:
    """VOC from COCO from ImageNet: 1 + 2 + 4 hours, of which COCO has half behind it."""
    from types import SimpleNamespace

    job = load_job(write(tmp_path / "job.yaml", pipeline_job(tiny_data)), ("max_hours=7",))
    hours: Any = {"tiny-voc": 1, "tiny-coco": 2, "tiny-imagenet": 4}
    forecasts: Any = [
        SimpleNamespace(stage=name, hours=each, money=None) for name, each in hours.items()
    ]
    report = Report(forecasts=forecasts, bills={"tiny-coco": spent(1)})
    assert limit_lines(job, report) == ["tiny: max_hours: about 7.0 of 7, branches side by side"]
    report.done.append("tiny-imagenet")
    report.unknown["tiny-voc"] = "prepared first"
    assert limit_lines(job, report)[0].startswith("tiny: max_hours: at least 3.0 of 7")
