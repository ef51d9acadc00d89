"""Heartbeats, the end of workers that hang, and what a notice makes a worker wish."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.files import write_json
from orchestrator.runs import liveness
from orchestrator.runs.liveness import EXIT_HUNG, Liveness, last_beat, read_beats, who_is_behind
from orchestrator.runs.run import Run
from orchestrator.runs.stop import Wish, ask_to_stop, let_run
from orchestrator.training import trainer

STUCK = """
import sys, time
from pathlib import Path
from orchestrator.runs.liveness import Liveness
from orchestrator.runs.run import Run

def stuck_in_the_data():
    time.sleep(600)

run, rank, world = Run(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
with Liveness(run, rank, world, hang_after=1.0, notice=None) as alive:
    alive.alive("waits for data", step=40 + rank)
    stuck_in_the_data()
"""


def hang(run: Run, rank: int, world: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", STUCK, str(run.path), str(rank), str(world)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.update(attempts=2)
    let_run(run)
    return run


def worker(run: Run, rank: int = 0, world: int = 2, notice: Any = None) -> Liveness:
    (run.path / "workers").mkdir(exist_ok=True)
    return Liveness(run, rank, world, hang_after=600, notice=notice)


def test_workers_that_hang_write_stacks_say_who_is_behind_and_end(run: Run) -> None:
    workers = [hang(run, rank, world=2) for rank in (0, 1)]
    said = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [EXIT_HUNG, EXIT_HUNG]
    for rank in (0, 1):
        stacks = (run.path / "stacks" / f"attempt-2-rank-000{rank}.txt").read_text()
        assert "in stuck_in_the_data" in stacks
        assert f"step {40 + rank} done, waits for data" in stacks
    (event,) = [event for event in run.events() if event["kind"] == "hang"]  # told once
    assert f"rank 0 on {read_beats(run)[0]['node']} last finished step 40 (waits" in event["text"]
    assert event["text"].index("rank 0") < event["text"].index("rank 1")  # who is behind first
    assert "no progress" in said[0]
    assert (event["attempt"], event["step"]) == (2, 40)


def test_a_worker_that_does_not_answer_is_named(run: Run) -> None:
    other = worker(run, rank=1)
    other.alive("computes", step=7)
    other._beat()  # and never again
    waiting = hang(run, rank=0, world=2)
    waiting.communicate(timeout=120)
    assert waiting.returncode == EXIT_HUNG
    text = run.events()[-1]["text"]
    assert "last finished step 7 (computes) and does not answer" in text
    assert "rank 0" not in text


def test_a_worker_that_never_started_is_named() -> None:
    beat = {"rank": 0, "node": "a", "step": 0, "doing": "starting", "hung": True}
    assert who_is_behind([beat], world=2) == "rank 1 never spoke"


def test_others_wait_for_the_first_worker_as_long_as_it_gets_on(run: Run) -> None:
    first, second = worker(run), worker(run, rank=1)
    first.alive("saves a checkpoint")
    first._beat()
    second._moved_at = 0.0
    second._look_at_first()
    assert second._moved_at > 0
    second._moved_at = 0.0
    first._beat()  # it lives, and did nothing since
    second._look_at_first()
    assert second._moved_at == 0
    first.alive("saves a checkpoint")
    first._beat(hung=True)
    second._look_at_first()
    assert second._moved_at == 0


@pytest.mark.parametrize(("slept", "ends"), [(3600.0, False), (1.0, True)])
def test_time_in_which_the_whole_process_stood_still_does_not_count(
    run: Run, slept: float, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-Z for an hour, and an hour without a mark."""
    sleeps: list[float | None] = [slept, None]
    ended: list[float] = []
    alive = worker(run)
    monkeypatch.setattr(alive, "_sleep", lambda: sleeps.pop(0))
    monkeypatch.setattr(alive, "_end", ended.append)
    alive._moved_at -= 3600.0
    alive._watch()
    assert bool(ended) is ends


def test_the_driver_sees_a_beat_only_where_workers_are(run: Run) -> None:
    assert last_beat(run) is None
    alive = worker(run)
    alive._beat()
    before = last_beat(run)
    time.sleep(0.001)
    alive._beat()
    assert before is not None
    assert last_beat(run) != before
    liveness.forget_workers(run)
    assert last_beat(run) is None


def test_marks_around_each_item(run: Run) -> None:
    alive = worker(run)
    seen = [(item, alive._doing, alive._marks) for item in alive.watched("ab", "waits for data")]
    assert seen == [("a", "computes", 2), ("b", "computes", 4)]
    assert alive._doing == "waits for data"


def test_a_wish_of_the_driver_is_one_to_stop(run: Run) -> None:
    alive = worker(run)
    assert alive._look_for_wish() is Wish.NONE
    ask_to_stop(run, "SIGTERM")
    assert alive._look_for_wish() is Wish.STOP


def test_a_notice_wants_one_checkpoint_and_not_where_there_just_was_one(run: Run) -> None:
    wishes = {"now": Wish.NONE}
    alive = worker(run, notice=lambda: wishes["now"])
    alive._wish = alive._look_for_wish()
    assert alive.wish() is Wish.NONE
    wishes["now"] = Wish.SAVE
    alive._wish = alive._look_for_wish()
    assert alive.wish() is Wish.SAVE
    alive.saved()
    assert alive.wish() is Wish.NONE
    assert alive._look_for_wish() is Wish.NONE
    wishes["now"] = Wish.STOP
    assert alive._look_for_wish() is Wish.STOP


@pytest.mark.parametrize(
    ("deadline", "passed", "wish"),
    [
        (None, 0, Wish.STOP),
        (0, 0, Wish.STOP),
        (120, 0, Wish.SAVE),
        (120, 89, Wish.SAVE),
        (120, 91, Wish.STOP),
        (20, 9, Wish.SAVE),
        (20, 11, Wish.STOP),
    ],
)
def test_a_notice_saves_at_once_and_leaves_shortly_before_the_node_goes(
    deadline: float | None, passed: float, wish: Wish, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train.v2._internal.execution import context

    now = [1000.0]
    milliseconds = deadline and int((now[0] + deadline) * 1000)
    info = SimpleNamespace(deadline_ms=milliseconds)
    preempted = SimpleNamespace(preemption_context=SimpleNamespace(preemption_info=info))
    monkeypatch.setattr(context, "get_train_context", lambda: preempted)
    monkeypatch.setattr(trainer.time, "time", lambda: now[0])
    notice = trainer.Notice()
    notice()
    now[0] += passed
    assert notice() is wish


def test_ray_still_has_what_a_notice_reads() -> None:
    """Not a public name: an update of Ray must not make notices fall silent."""
    from ray.train.v2._internal.execution.context import TrainContext
    from ray.train.v2._internal.execution.preemption import PreemptionContext

    assert "preemption_context" in TrainContext.__dataclass_fields__
    assert PreemptionContext().preemption_info is None


def test_a_storage_that_is_away_ends_nothing_and_is_told_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(liveness, "_TICK", 0.01)
    tried = []

    def fail(path: Path, content: Any) -> None:
        tried.append(path)
        if 1 < len(tried) < 5:
            raise OSError("no route to host")
        write_json(path, content)

    monkeypatch.setattr(liveness, "write_json", fail)
    monkeypatch.setattr(liveness, "beat_every", lambda _: 0.0)
    with worker(run) as alive:
        alive.alive("computes", step=5)
        deadline = time.monotonic() + 60
        while len(tried) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert json.loads((run.path / "workers" / "rank-0000.json").read_text())["step"] == 5
    assert caplog.messages == ["heartbeats wait: no route to host"]


def test_patience_until_the_first_step_of_each_start(run: Run) -> None:
    alive = worker(run)
    patience = []
    for mark in (alive.builds, lambda: alive.alive("computes", step=1), alive.builds):
        mark()
        patience.append(alive._patience)
    assert patience == [1800, 600, 1800]
