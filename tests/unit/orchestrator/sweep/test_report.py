"""A sweep's directory in tables, pictures and commands."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli.main import app
from orchestrator.errors import RunError
from orchestrator.runs.run import Run
from orchestrator.sweep.report import find_sweep, write_results
from tests.unit.orchestrator.jobs import stage
from tests.unit.orchestrator.sweep.finished import Entry, begin, ended, evaluated, record, sweep_job

BOTH = [{"metric": "val/miou", "mode": "max"}, {"metric": "multiply_adds", "mode": "min"}]


def four_trials() -> list[Entry]:
    rates, entries = (0.001, 0.01, 0.05, 0.1), list[Entry]()
    for trial, lr in enumerate(rates):
        entries += begin(trial, lr=lr, output_stride=8 if trial == 1 else 16)
        entries.append(evaluated(trial, 6, 0.5 - abs(lr - 0.01), multiply_adds=10.0 - trial))
        entries.append(ended(trial))
    return entries


def ran(sweep: Run, storage: Path) -> None:
    """Give trial 1 its run."""
    run = Run(storage / "runs" / "tiny-voc-1")
    run.update(stage="tiny-voc", job=stage("tiny-voc", "segmentation", "tiny-voc"))


def is_picture(path: Path) -> bool:
    return path.read_bytes()[1:4] == b"PNG" and path.stat().st_size > 5000


def test_pictures_and_the_best_job_file_are_written(tmp_path: Path) -> None:
    job = sweep_job(tmp_path, objective=BOTH)
    sweep = record(job, [*four_trials(), *begin(4, lr=3.0), ended(4, "nan")])
    ran(sweep, tmp_path)
    write_results(sweep, job)
    pictures = sorted(path.name for path in (sweep.artifacts / "sweep").glob("*.png"))
    assert pictures == [
        "importance-multiply_adds.png",
        "importance-val-miou.png",
        "parallel-multiply_adds.png",
        "parallel-val-miou.png",
        "pareto.png",
    ]
    assert all(is_picture(sweep.artifacts / "sweep" / name) for name in pictures)
    assert (sweep.path / "best.yaml").exists()
    assert sweep.read()["best"]["number"] == 1


@pytest.mark.parametrize("status", ["failed", "invalid", "nan"])
def test_without_a_good_trial_nothing_is_written(tmp_path: Path, status: str) -> None:
    job = sweep_job(tmp_path)
    sweep = record(job, [*begin(0), ended(0, status, error="boom")])
    write_results(sweep, job)
    assert not (sweep.path / "best.yaml").exists()
    assert list((sweep.artifacts / "sweep").iterdir()) == []
    assert sweep.read()["best"] is None


def test_sections_and_fields_that_are_not_always_tuned_are_drawn(tmp_path: Path) -> None:
    space = {
        "model.batch_norm": {"choice": [{"sync": True}, {"frozen": True}]},
        "model.batch_norm.momentum": {
            "uniform": [0.1, 0.5],
            "when": {"model.batch_norm": {"sync": True}},
        },
        "data.train.crop": {"choice": [33, [33, 49]]},
    }
    job = sweep_job(tmp_path, space=space)
    entries: list[Entry] = []
    for trial in range(5):
        sync = bool(trial % 2)
        values = {
            "model.batch_norm": {"sync": True} if sync else {"frozen": True},
            "data.train.crop": [33, 49] if trial < 2 else 33,
        }
        values |= {"model.batch_norm.momentum": 0.1 * trial + 0.1} if sync else {}
        entries += [
            {"kind": "suggest", "trial": trial, "values": values},
            {"kind": "start", "trial": trial, "run": f"runs/tiny-voc-{trial}", "steps": 6},
            evaluated(trial, 3, 0.1 * trial),
            ended(trial, "stopped"),
        ]
    sweep = record(job, entries)
    write_results(sweep, job)
    for name in ("parallel.png", "importance.png"):
        assert is_picture(sweep.artifacts / "sweep" / name)


def test_a_sweep_is_found_by_name_directory_or_newest(tmp_path: Path) -> None:
    sweep = record(sweep_job(tmp_path), [])
    newer = Run(tmp_path / "sweeps" / "tune-tiny-ffff")
    newer.update(name="tune-tiny", created=2.0)
    assert find_sweep("tune-tiny", tmp_path).path == newer.path
    assert find_sweep(sweep.path.name, tmp_path).path == sweep.path
    assert find_sweep(str(sweep.path), tmp_path).path == sweep.path
    with pytest.raises(RunError, match="did you mean 'tune-tiny'"):
        find_sweep("tune-tinny", tmp_path)


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["sweep", *arguments])
    return result.exit_code, result.output or str(result.exception)


def test_commands_show_trials_and_write_their_job_files(tmp_path: Path) -> None:
    sweep = record(sweep_job(tmp_path), four_trials())
    ran(sweep, tmp_path)
    place = ("--storage", str(tmp_path))
    status, output = call("show", "tune-tiny", *place)
    rows = [line.split() for line in output.splitlines()]
    trials = [row[0] for row in rows if "finished" in row and row[0].isdigit()]
    assert (status, trials) == (0, ["1", "0", "2", "3"])
    status, output = call("show", "tune-tiny", "--json", *place)
    told = json.loads(output)
    assert (told["best"], told["front"], told["state"]) == (1, [1], "finished")
    out = tmp_path / "my.yaml"
    assert call("best", "tune-tiny", "--out", str(out), *place)[0] == 0
    assert "Trial 1 of the sweep tune-tiny, number 1 of 4" in out.read_text()
    status, output = call("best", "tune-tiny", "--out", str(out), "--trial", "7", *place)
    assert status == 1
    assert "there is no trial 7" in output
