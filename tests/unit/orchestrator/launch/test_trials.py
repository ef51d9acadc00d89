"""What `atrous plan` says of a sweep."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli.main import app
from orchestrator.errors import JobFileError
from orchestrator.launch.plan_view import explaining_lines
from orchestrator.launch.preflight import preflight
from orchestrator.launch.selection import select
from orchestrator.launch.trials import most_trials
from tests.unit.orchestrator.jobs import stage
from tests.unit.orchestrator.sweep.finished import sweep_job

PRICED = {"workers": 1, "gpus_per_worker": 1, "price_per_gpu_hour": 3.0}


def planned(data: Path, storage: Path, **changes: Any) -> tuple[str, Any]:
    """The line about the trials, and the forecast of the dearest."""
    job = sweep_job(storage, data_root=str(data), **changes)
    report = preflight(job)
    [line] = [one for one in explaining_lines(job, report) if "trial" in one]
    return line, report.forecasts[-1]


def test_all_trials_are_reckoned_as_the_dearest(tiny_data: Path, tmp_path: Path) -> None:
    tuned = stage("tiny-voc", "segmentation", "tiny-voc", cluster=PRICED)
    base = {"stages": [tuned], "budget": {"trials": 50, "cost": 7.0}}
    cheap = {"model.output_stride": {"choice": [16, 32]}}
    line, found = planned(tiny_data, tmp_path, **base, space=cheap)
    dear = {"model.output_stride": {"choice": [8, 16]}, "steps": {"choice": [6, 60]}}
    dearer_line, dearer = planned(tiny_data, tmp_path, **base, space=dear)
    assert dearer.hours > 8 * found.hours
    assert line.startswith("tiny-voc: 50 trials, each at most ")
    assert f"{50 * dearer.gpu_hours:.3g} GPU-hours, {50 * dearer.money:.2f} to pay" in dearer_line
    assert dearer_line.endswith("but no more than the budget's 7 to pay.")


def test_a_grid_has_as_many_trials_as_combinations(tmp_path: Path) -> None:
    space = {"model.output_stride": {"choice": [8, 16]}, "seed": {"randint": [0, 4]}}
    grid: dict[str, Any] = {"space": space, "search": {"name": "grid"}}
    assert most_trials(sweep_job(tmp_path, **grid, budget={})) == 10
    assert most_trials(sweep_job(tmp_path, **grid, budget={"trials": 4})) == 4


def test_a_sweep_is_run_as_a_whole(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match="are for pipelines; tune-tiny is a sweep"):
        select(sweep_job(tmp_path), ["tiny-voc"])


def test_the_recipes_have_their_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATROUS_STORAGE", str(tmp_path))
    output = CliRunner().invoke(app, ["plan", "jobs/tune_demo.yaml"]).output
    assert "tune-demo-cityscapes: 8 trials, each at most" in output
