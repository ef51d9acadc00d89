"""Which stages run when: order, room, failures, limits; training is played."""

import io
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from orchestrator.errors import JobStopped, StageFailed, StageStopped
from orchestrator.job.config import PipelineJob, StageSettings
from orchestrator.launch import graph
from orchestrator.launch.cluster import Resources
from orchestrator.launch.graph import Graph
from orchestrator.launch.report import Display
from orchestrator.launch.stage import StageResult
from orchestrator.runs.bill import begin, end
from orchestrator.runs.run import Run, append_journal
from orchestrator.runs.stop import Signals, asked_to_stop, let_run
from tests.unit.orchestrator.jobs import stage

PRICE = 3600.0  # of a GPU-hour: 1 a second


class _Display(Display):
    """What a played stage lacks is not shown."""

    started = update = finished = lambda *_: None  # type: ignore[assignment]


@dataclass
class Stand:
    """A cluster of 4 CPUs where stages last until they may end; what began and ended, in order."""

    storage: Path
    acts: dict[str, Callable[[], None]] = field(default_factory=dict)  # at a stage's end
    log: list[str] = field(default_factory=list)
    parent: Any = None
    running: set[str] = field(default_factory=set)
    together: list[set[str]] = field(default_factory=list)

    def run(self, *stages: dict[str, Any], **limits: Any) -> list[StageResult]:
        job = {"kind": "pipeline", "name": "p", "storage": str(self.storage), "stages": stages}
        display = _Display(Console(file=io.StringIO()))
        wanted = PipelineJob.model_validate(job | limits)
        return Graph(wanted, display, Signals(), self.parent).run()

    def plan(self, settings: StageSettings, *_: Any) -> Any:
        return SimpleNamespace(
            stage=settings, run=Run(self.storage / settings.name), steps=10, start=None
        )

    def open(self, planned: Any, _: Any) -> None:
        planned.run.update(status="running", attempts=planned.run.read().get("attempts", 0) + 1)
        begin(planned.run, planned.stage.cluster)
        planned.run.note("workers", world=1)
        let_run(planned.run)

    def train(self, planned: Any) -> StageResult:
        name = planned.stage.name
        self.log.append(name)
        self.running.add(name)
        self.together.append(set(self.running))
        try:
            self.acts.get(name, lambda: None)()
            if name in self.acts and (why := asked_to_stop(planned.run)):
                raise StageStopped(name, 3, 10, why)
        except StageStopped as stop:
            end(planned.run, "stopped", reason=stop.reason)
            raise
        except Exception as error:
            end(planned.run, "failed")
            raise StageFailed(f"{name}: {error}") from error
        finally:
            self.running.remove(name)
        end(planned.run, "finished")
        return self.result(planned)

    def earlier(self, planned: Any) -> StageResult | None:
        return self.result(planned) if planned.run.finished else None

    def result(self, planned: Any) -> StageResult:
        name: Any = planned.stage.name
        return StageResult(name=name, run=planned.run, checkpoint=name, start=None, reused=False)

    def until_asked(self, name: str) -> Callable[[], None]:
        """A stage that lasts until it is asked to stop."""
        return lambda: wait_until(lambda: asked_to_stop(Run(self.storage / name)))


def wait_until(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    made = Stand(tmp_path)
    room = SimpleNamespace(total=Resources(cpus=4, gpus=4), check_fits=lambda *_: None)
    tracker = SimpleNamespace(close=lambda: None)
    for name, value in {
        "_TICK": 0.01,
        "plan_stage": made.plan,
        "finished_result": made.earlier,
        "open_run": made.open,
        "train_stage": made.train,
        "Tracker": lambda *_: tracker,
        "is_tracked": lambda _: True,
        "cluster.connect": lambda **_: room,
        "Branch.abandoned": lambda _: False,
    }.items():
        monkeypatch.setattr(f"orchestrator.launch.graph.{name}", value)
    return made


def make(name: str, after: str | None = None, workers: int = 1, **changes: Any) -> dict[str, Any]:
    cluster = {"workers": workers, "gpus_per_worker": 1, "price_per_gpu_hour": PRICE}
    start = {"start_from": after} if after else {}
    return stage(name, "classification", "d", **{"cluster": cluster} | start | changes)


def test_branches_run_side_by_side_as_far_as_there_is_room(stand: Stand) -> None:
    barrier = threading.Barrier(2, timeout=20)
    stand.acts = {"a": barrier.wait, "b": barrier.wait}
    stand.run(make("a", workers=2), make("b", workers=2), make("c", workers=2))
    assert {"a", "b"} in stand.together
    assert max(len(names) for names in stand.together) == 2
    assert stand.log[2] == "c"


def test_a_large_stage_is_not_overtaken_for_ever(stand: Stand) -> None:
    """The small ones of a chain get ready one after another; the large one was ready before."""
    stand.acts["s1"] = lambda: time.sleep(0.1)  # so that the large one finds no room
    small = [make("s1"), make("s2", "s1"), make("s3", "s2")]
    stand.run(small[0], make("large", workers=4), *small[1:])
    assert stand.log == ["s1", "large", "s2", "s3"]


def test_those_that_got_ready_at_the_same_time_may_go_before(stand: Stand) -> None:
    both = threading.Barrier(2, timeout=20)
    stand.acts = {"s1": both.wait, "s2": both.wait}
    stand.run(make("s1"), make("large", workers=4), make("s2"))
    assert stand.log[-1] == "large"


def test_a_failed_branch_stops_no_other_and_only_what_is_missing_runs_again(stand: Stand) -> None:
    def fail() -> None:
        raise ValueError("boom")

    stages = [make("a"), make("b", "a"), make("c"), make("d", "c"), make("e", "b")]
    stand.acts["b"] = fail
    with pytest.raises(StageFailed, match=r"b: boom\ne: not run: b failed"):
        stand.run(*stages)
    assert sorted(stand.log) == ["a", "b", "c", "d"]
    stand.acts.clear()
    stand.log.clear()
    results = stand.run(*stages)
    assert stand.log == ["b", "e"]
    assert [result.name for result in results] == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    ("limit", "larger", "reason"),
    [
        ({"max_hours": 0.1 / 3600}, {"max_hours": 1}, r"max_hours: \S+ of \S+ hours are used"),
        ({"max_cost": 0.1}, {"max_cost": 1000}, r"max_cost: 0\.\d+ of 0\.1 are spent"),
    ],
)
def test_a_limit_stops_all_and_a_larger_one_goes_on(
    stand: Stand, limit: dict[str, float], larger: dict[str, float], reason: str
) -> None:
    stages = [make("a"), make("b"), make("c", "a")]
    stand.acts = {"a": stand.until_asked("a"), "b": stand.until_asked("b")}
    with pytest.raises(JobStopped) as stopped:
        stand.run(*stages, **limit)
    for name in ("a", "b"):
        assert f"{name}: stopped ({reason.partition(':')[0]}" in str(stopped.value)
        assert Run(stand.storage / name).read()["status"] == "stopped"
    assert stopped.match(rf"c: not started \({reason}\)")
    stand.acts.clear()
    stand.log.clear()
    with pytest.raises(JobStopped, match=r"a: not started \("):  # what is used stays used
        stand.run(*stages, **limit)
    assert stand.log == []
    assert len(stand.run(*stages, **larger)) == 3
    assert Run(stand.storage / "a").read()["attempts"] == 2


def test_a_stages_own_limit_leaves_the_others_alone(stand: Stand) -> None:
    stand.acts["a"] = stand.until_asked("a")
    with pytest.raises(JobStopped) as stopped:
        stand.run(make("a", max_hours=0.05 / 3600), make("b", "a"), make("c"))
    assert stopped.match(r"a: stopped \(max_hours: ")
    assert stopped.match("b: not started: a was stopped")
    assert Run(stand.storage / "c").finished


def test_a_stage_without_workers_is_not_waited_for(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph.Branch, "abandoned", lambda _: True)
    forever = threading.Event()
    stand.acts["a"] = lambda: forever.wait(20)
    with pytest.raises(JobStopped, match="it had no workers"):
        stand.run(make("a"), max_hours=0.01 / 3600)
    assert asked_to_stop(Run(stand.storage / "a"))  # should workers come after all
    assert Run(stand.storage / "a").read()["status"] == "stopped"
    forever.set()


def test_somebody_stops_one_stage(stand: Stand) -> None:
    def stop() -> None:
        graph.ask_to_stop(Run(stand.storage / "a"), "atrous stop")

    stand.acts["a"] = stop
    with pytest.raises(JobStopped, match=r"a: stopped \(atrous stop\) at step 3 of 10") as stopped:
        stand.run(make("a"), make("b"))
    assert stopped.value.exit_code == 75
    assert Run(stand.storage / "b").finished


def test_somebody_stops_the_whole_pipeline(stand: Stand) -> None:
    pipeline = Run(stand.storage / "pipelines/p")
    pipeline.path.mkdir(parents=True)
    let_run(pipeline)

    def stop() -> None:
        graph.ask_to_stop(pipeline, "atrous stop")
        stand.until_asked("a")()

    stand.parent = SimpleNamespace(run=pipeline)
    stand.acts["a"] = stop
    with pytest.raises(JobStopped) as stopped:
        stand.run(make("a", workers=4), make("b"))
    assert stopped.match(r"b: not started \(atrous stop\)\na: stopped \(atrous stop\) at step 3")


def test_after_the_deadline_nothing_starts_but_results_are_found(stand: Stand) -> None:
    stand.run(make("a"))
    passed = datetime.now(UTC) - timedelta(seconds=1)
    (result,) = stand.run(make("a"), deadline=passed)
    assert result.name == "a"
    with pytest.raises(JobStopped, match=r"b: not started \(deadline: .*\+00:00 has come\)"):
        stand.run(make("a"), make("b"), deadline=passed)
    assert stand.log == ["a"]


def test_the_time_between_a_kill_and_the_next_command_is_not_counted(stand: Stand) -> None:
    """The run was killed yesterday after an hour."""
    run, now = Run(stand.storage / "a"), time.time()
    run.update(status="running")
    terms = {"gpus_per_worker": 1, "cpus_per_worker": 1, "price_per_gpu_hour": PRICE}
    for kind, hours in (("attempt", 25), ("workers", 25), ("time", 24)):
        event = {"kind": kind, "time": now - 3600 * hours, "world": 1, "step": 5, "seconds": {}}
        append_journal(run.path / "events.jsonl", event | terms)
    assert len(stand.run(make("a"), max_hours=1.1, max_cost=1.1 * PRICE)) == 1
    with pytest.raises(JobStopped, match=r"max_hours: 1 of 0\.9 hours are used"):
        stand.run(make("a"), make("b"), max_hours=0.9)
