from pathlib import Path

import pytest

from orchestrator.errors import RunError
from orchestrator.runs.run import (
    EventReader,
    Run,
    all_runs,
    append_journal,
    read_journal,
    run_directory,
    truncate_journal,
)


def test_the_journal_goes_on_from_a_step(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert read_journal(path) == []
    for step in (1, 2, 3, 4):
        append_journal(path, {"step": step, "metrics": {"x": step}})
    with path.open("a") as file:
        file.write('{"step": 5, "met')  # cut by a kill
    assert [record["step"] for record in read_journal(path, after=2)] == [3, 4]
    truncate_journal(path, 3)
    append_journal(path, {"step": 4, "metrics": {}})
    assert [record["step"] for record in read_journal(path)] == [1, 2, 3, 4]


def test_a_run_has_one_owner(tmp_path: Path) -> None:
    run = run_directory(tmp_path, "a", "f" * 64)
    with (
        run.lock(),
        pytest.raises(RunError, match=r"a-ffffffffffff is being run by process \d+"),
        run.lock(),
    ):
        pass
    with run.lock():
        pass


def test_runs_are_found_newest_first(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        run_directory(tmp_path, name, "0" * 64).update(stage=name, created=number)
    assert [run.read()["stage"] for run in all_runs(tmp_path)] == ["b", "a"]


def test_events_are_read_as_they_come_and_survive_a_power_cut(tmp_path: Path) -> None:
    run = Run(tmp_path)
    reader = EventReader(run)
    assert reader.new() == []
    run.note("start", "starts", step=3)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"kind": "ti')
    assert [event["kind"] for event in reader.new()] == ["start"]
    run.note("ended")
    assert [event["kind"] for event in reader.new()] == ["ended"]
    assert [(event["kind"], event["text"]) for event in run.events()] == [
        ("start", "starts"),
        ("ended", ""),
    ]
