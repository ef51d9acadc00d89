"""Lists, states and comparisons of runs, from hand-made run directories."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli.main import app
from orchestrator.errors import RunError
from orchestrator.runs.overview import (
    Overview,
    best_first,
    compare,
    draw,
    find_run,
    members,
    overviews,
    wait,
)
from orchestrator.runs.run import Run, append_journal, run_directory
from orchestrator.runs.stop import asked_to_stop


def make(storage: Path, fingerprint: str, status: str, **fields: Any) -> Run:
    run = run_directory(storage, "tiny", fingerprint)
    split = {"digest": fingerprint}
    run.update(
        **{
            "stage": "tiny",
            "status": status,
            "steps": 4,
            "created": 1.0,
            "job": {"task": "segmentation", "optimizer": {"lr": 0.1}},
            "data": {"train": split, "val": split},
        }
        | fields
    )
    return run


def log(run: Run, *values: float) -> None:
    for step, value in enumerate(values, 1):
        append_journal(run.journal, {"step": step, "metrics": {"val/miou": value}})


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    good = make(tmp_path, "a" * 12, "finished", created=1.0)
    log(good, 0.5, 0.7)
    job = {"task": "segmentation", "optimizer": {"lr": 0.2}}
    log(make(tmp_path, "b" * 12, "failed", created=2.0, job=job, error="boom"), 0.6)
    return tmp_path


def test_newest_first_or_best_first(storage: Path) -> None:
    found = overviews(storage)
    assert [one.run.path.name[-1] for one in found] == ["b", "a"]
    assert [one.run.path.name[-1] for one in best_first(found, "val/miou")] == ["a", "b"]
    with pytest.raises(RunError, match="no run has the metric 'val/iou'; there are val/miou"):
        best_first(found, "val/iou")


def test_a_run_is_found_by_stage_name_and_path(storage: Path) -> None:
    assert find_run("tiny", storage).state == "failed"
    assert find_run("tiny-aaaaaaaaaaaa", storage).score == "val/miou 0.7000"
    assert find_run(str(storage / "runs/tiny-aaaaaaaaaaaa"), storage).step == 2
    with pytest.raises(RunError, match="did you mean 'tiny'"):
        find_run("tinny", storage)


def test_running_without_a_driver_is_interrupted(storage: Path) -> None:
    run = make(storage, "c" * 12, "running", created=3.0)
    assert find_run("tiny", storage).state == "interrupted"
    with run.lock():
        assert find_run("tiny", storage).state == "running"
        with pytest.raises(RunError, match="still running after 0 s"):
            wait("tiny", storage, 0, lambda _: None)


def test_the_exit_status_of_wait_is_the_runs(storage: Path) -> None:
    def status_of(target: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["wait", target, "--storage", str(storage)])
        return result.exit_code, result.output

    assert status_of("tiny-aaaaaaaaaaaa") == (0, "tiny-aaaaaaaaaaaa: finished: val/miou 0.7000\n")
    assert status_of("tiny-bbbbbbbbbbbb") == (1, "tiny-bbbbbbbbbbbb: failed: boom\n")


def test_only_what_differs_is_compared(storage: Path, tmp_path: Path) -> None:
    found = overviews(storage)
    table = compare(found)
    rows = dict(zip(table.columns[0].cells, table.columns[1].cells, strict=True))
    assert rows["optimizer.lr"] == "0.2"
    assert "task" not in rows
    assert rows["val/miou"] == "0.6"
    draw(found, ["val/miou"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_pipeline_is_told_waited_for_and_stopped_by_its_name(storage: Path) -> None:
    def command(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, [*arguments, "--storage", str(storage)])
        return result.exit_code, result.output

    pipeline = Run(storage / "pipelines/whole-dddddddddddd")
    stages = {"stages": [{"name": "tiny"}, {"name": "to-come"}]}
    pipeline.update(name="whole", status="stopped", created=1.0, job=stages, reason="max_hours: 2")
    assert command("wait", "whole") == (75, f"{pipeline.path.name}: stopped: max_hours: 2\n")
    text = command("status", "whole")[1]
    assert "tiny-bbbbbbbbbbbb" in text  # the newest of its stages
    assert "tiny-aaaaaaaaaaaa" not in text
    assert "whole-dddddddddddd: stopped\nreason: max_hours: 2\n" in text
    told = json.loads(command("status", "whole", "--json")[1])
    assert (told["state"], told["reason"]) == ("stopped", "max_hours: 2")
    assert [stage["stage"] for stage in told["stages"]] == ["tiny"]
    assert command("stop", "whole")[0] == 1  # it does not run
    pipeline.update(status="running")
    with pipeline.lock():
        assert command("stop", "whole")[0] == 0
    assert asked_to_stop(pipeline) == "atrous stop"
    pipeline.update(status="finished", reason=None)
    assert command("wait", "whole") == (0, f"{pipeline.path.name}: finished: 2 stages\n")


def test_stages_of_a_pipeline_are_those_that_started_from_one_another(storage: Path) -> None:
    """Not the newest of each: where the first one failed, the second has not run."""
    job = {"task": "segmentation"}

    def start(fingerprint: str) -> dict[str, Any]:
        return {"stage": "tiny", "fingerprint": fingerprint, "digest": fingerprint, "weights": "w"}

    make(storage, "a" * 12, "finished").update(fingerprint="a")
    make(storage, "b" * 12, "failed", created=2.0).update(fingerprint="b")
    make(storage, "c" * 12, "finished", created=3.0, stage="later", job=job, start=start("a"))
    pipeline = Run(storage / "pipelines/whole-dddddddddddd")
    stages = [{"name": "later", "start_from": {"checkpoint": "tiny"}}, {"name": "tiny"}]
    pipeline.update(name="whole", status="failed", created=2.0, job={"stages": stages})

    def shown() -> list[str]:
        return [one.run.path.name[-1] for one in members(Overview(pipeline), storage)]

    assert shown() == ["b"]
    make(storage, "e" * 12, "finished", created=2.5, stage="later", job=job, start=start("b"))
    assert shown() == ["e", "b"]


def test_a_run_was_touched_when_it_last_logged_something(storage: Path) -> None:
    one = Overview(make(storage, "c" * 12, "running", created=3.0))
    late = one.record["updated"] + 1000
    append_journal(one.run.journal, {"step": 9, "time": late, "metrics": {"val/miou": 0.1}})
    assert one.updated == late
