"""What is told while a sweep runs."""

import io
from pathlib import Path

from rich.console import Console

from orchestrator.runs.run import Run, append_journal
from orchestrator.sweep.table import SweepDisplay
from tests.unit.orchestrator.sweep.finished import begin, ended, evaluated, sweep_job


def test_without_a_terminal_each_event_is_a_line(tmp_path: Path) -> None:
    stream = io.StringIO()
    with SweepDisplay(Console(file=stream, width=40), sweep_job(tmp_path), 2) as display:
        for entry in [*begin(0), evaluated(0, 3, 0.2)]:
            display.take(entry, told=True)
        decide = {"kind": "decide", "trial": 0, "step": 3, "action": "continue", "why": ""}
        for entry in [decide, evaluated(0, 6, 0.25), ended(0), *begin(1, lr=3.0)]:
            display.take(entry)
        display.take({"kind": "budget", "why": "2 GPU-hours are spent"})
        display.take(ended(1, "nan", error="the loss of step 2 is not finite"))
        display.update()
    assert stream.getvalue().splitlines() == [
        "trial 0: step 6: val/miou 0.25",
        "trial 0: finished at step 6: val/miou 0.25 (1 of 2 trials ended)",
        "trial 1: optimizer.lr=3, model.output_stride=16, run runs/tiny-voc-1",
        "2 GPU-hours are spent",
        "trial 1: nan: the loss of step 2 is not finite (2 of 2 trials ended)",
    ]


def test_on_a_terminal_a_table_stands_with_the_time_that_is_left(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=120, height=30, force_terminal=True)
    run = Run(tmp_path / "runs/tiny-voc-1")
    run.path.mkdir(parents=True)
    with SweepDisplay(console, sweep_job(tmp_path), 4) as display:
        for entry in [*begin(0), evaluated(0, 6, 0.25), ended(0), *begin(1)]:
            display.take(entry)
        refused = {"kind": "suggest", "trial": 2, "values": {"optimizer.lr": 9.0}}
        for entry in [refused, ended(2, "invalid")]:
            display.take(entry)
        append_journal(run.journal, {"step": 1, "metrics": {}})
        display.update()
        append_journal(run.journal, {"step": 3, "metrics": {}})
        display.update()
    last = stream.getvalue().rpartition("sweep tune-tiny")[2]
    assert "1 of 4 trials ended, at most" in last
    assert "3/6" in last
    assert last.index("running") < last.index("finished")
