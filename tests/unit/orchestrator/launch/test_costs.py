"""The bill in words, and the lines of a run where there is no terminal."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from orchestrator.job.duration import as_time
from orchestrator.launch.costs import as_cost, bill_table, in_brief, so_far
from orchestrator.launch.report import Display
from orchestrator.runs.bill import Bill, read_account
from orchestrator.runs.run import Run, append_journal
from tests.unit.orchestrator.runs.test_bill import UNDISTURBED

CPU_ONLY = Bill(wall=10, lost={}, gpu_seconds=0, cpu_seconds=7200, money=None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(42.4, "42 s"), (150, "2.5 min"), (7300, "2.0 h"), (200_000, "2.3 d"), (0, "0 s")],
)
def test_times(seconds: float, text: str) -> None:
    assert as_time(seconds) == text


def test_costs() -> None:
    assert as_cost(CPU_ONLY) == "2.0 CPU-hours"
    assert as_cost(read_account(UNDISTURBED).bill()) == "0.344 GPU-hours, 0.69 to pay"
    assert in_brief(read_account(UNDISTURBED).bill()).endswith("to pay, goodput 60%")


def test_a_running_stage() -> None:
    account = read_account(UNDISTURBED[:4])
    assert so_far(account, 100, 120) == ["goodput 0%", "0.022 GPU-hours, 0.04 to pay"]
    account.take(UNDISTURBED[4])
    assert so_far(account, 101, 220)[2] == "100 s left"
    waiting = read_account([*UNDISTURBED[:2], {"kind": "device", "ideal_step": 3.0}])
    assert so_far(waiting, 100, 111)[2] == "at least 5.0 min left"


def result(path: Path, events: Any) -> Any:
    run = Run(path)
    run.update(status="finished")
    for event in events:
        append_journal(path / "events.jsonl", event)
    return SimpleNamespace(name=path.name, run=run)


def shown(table: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(table)
    return stream.getvalue()


def test_the_table_has_every_stage_and_all_together(tmp_path: Path) -> None:
    text = shown(bill_table([result(tmp_path / name, UNDISTURBED) for name in ("a", "b")]))
    assert "data wait 13%, evaluation 9%, waiting for workers 6%" in text
    (together,) = [line.split() for line in text.splitlines() if line.strip().startswith("all")]
    assert together[1:8] == ["5.5", "min", "0.689", "GPU-hours", "1.38", "60%", "data"]
    assert "all" not in shown(bill_table([result(tmp_path / "c", UNDISTURBED)]))


def test_lines_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events without a text are for the bill; after a restart lines begin anew at its step."""
    stream, run = io.StringIO(), Run(tmp_path)
    stage: Any = SimpleNamespace(name="voc", task="segmentation")
    planned: Any = SimpleNamespace(stage=stage, run=run, steps=60, start=None)
    stage.cluster, stage.global_batch = SimpleNamespace(workers=2), 8
    planned.train = SimpleNamespace(num_samples=100)
    monkeypatch.setattr("orchestrator.launch.report.stage_warnings", lambda _: [])
    monkeypatch.setattr("orchestrator.launch.report._LINE_EVERY", -1.0)

    def log(step: int) -> None:
        metrics = {"train/loss": 0.5, "train/images_per_second": 80.0, "train/mfu": 0.321}
        append_journal(run.journal, {"step": step, "metrics": metrics})

    with Display(Console(file=stream, width=200)) as display:
        display.started(planned)
        for event in UNDISTURBED[:2]:
            append_journal(tmp_path / "events.jsonl", {"text": ""} | event)
        log(10)
        display.update([planned])
        run.note("start", "starts at step 3, number of workers: 1", step=3)
        log(4)
        display.update([planned])
        display.failed("voc", "out of luck")
        display.failed("other", "never begun")
    lines = stream.getvalue().splitlines()
    assert lines[1].startswith("voc: step 10/60 loss 0.500, 80 images/s, MFU 32.1%, goodput 0%, ")
    assert lines[2] == "voc: starts at step 3, number of workers: 1"
    assert lines[3].startswith("voc: step 4/60 loss 0.500")
    assert lines[4].startswith("voc: failed: out of luck (10 s, ")
    assert lines[5] == "other: failed: never begun"
