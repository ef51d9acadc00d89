"""Run directories in a bucket: the same numbers, whatever becomes of the store, and movable."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from data_pipeline.object_store import ObjectStore
from orchestrator.bucket import BucketPath, storage_path
from orchestrator.cli.main import app
from orchestrator.errors import RunTakenOver
from orchestrator.files import remove_tree
from orchestrator.job.sections import Checkpoints
from orchestrator.launch.machine import check_storage
from orchestrator.launch.stage import PlannedStage, finished_result
from orchestrator.networks.network import open_network
from orchestrator.runs import run_writer
from orchestrator.runs.checkpoint import checkpoint_paths, newest_checkpoint
from orchestrator.runs.checkpoint_writer import CheckpointWriter
from orchestrator.runs.garbage import delete, find_garbage
from orchestrator.runs.record import Metrics
from orchestrator.runs.run import Run, all_runs, read_journal
from orchestrator.runs.run_writer import RunWriter
from tests.object_store import Proxy, bucket, proxy, store
from tests.unit.orchestrator.killed_writer import TOP1, check, contents
from tests.unit.orchestrator.runs.test_durability import assert_same
from tests.unit.orchestrator.training.test_training import plan, run

__all__ = ["bucket", "proxy", "store"]  # fixtures

CHANGES = ("put", "delete")


@pytest.fixture(scope="module")
def undisturbed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> PlannedStage:
    planned = plan(tiny_data, tmp_path_factory.mktemp("undisturbed"))
    run(planned)
    return planned


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATROUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def storage(bucket: str) -> BucketPath:
    path = storage_path(f"s3://{bucket}")
    assert isinstance(path, BucketPath)
    return path


@contextmanager
def at_step(step: int, do: Callable[[], None]) -> Iterator[None]:
    """Do something when the metrics of a step are logged."""
    log = RunWriter.log

    def logged(self: RunWriter, done: int, metrics: Metrics) -> None:
        log(self, done, metrics)
        if done == step:
            do()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunWriter, "log", logged)
        yield


def die() -> None:
    raise KeyboardInterrupt("killed")


def copy(source: Path, target: Path) -> None:
    """As `aws s3 cp --recursive` would."""
    files = (
        [path for path, _ in source.below()]
        if isinstance(source, BucketPath)
        else [path for path in source.rglob("*") if path.is_file()]
    )
    for path in files:
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())


def test_all_of_a_run_lies_in_the_bucket(
    undisturbed: PlannedStage,
    tiny_data: Path,
    storage: BucketPath,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_writer, "_SECONDS", 0.05)
    planned = plan(tiny_data, storage)
    with planned.run.lock():
        run(planned)
    assert_same(planned, undisturbed)
    on_disk = {
        str(path.relative_to(undisturbed.run.path))
        for path in undisturbed.run.path.rglob("*")
        if path.is_file() and "ray" not in path.parts
    }
    path = planned.run.path
    assert isinstance(path, BucketPath)
    assert {str(one.relative_to(path)) for one, _ in path.below()} == on_disk | {"owner.json"}
    kinds = [[event["kind"] for event in one.run.events()] for one in (planned, undisturbed)]
    assert kinds[0] == kinds[1]


def test_another_machine_sees_all_of_it(
    tiny_data: Path, storage: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(tiny_data, storage)
    run(planned)
    later = plan(tiny_data, storage, start_from=str(planned.run.checkpoints), seed=1)
    assert later.start is not None
    assert later.start.weights.startswith("s3://")
    assert plan(tiny_data, storage, start_from=str(planned.run.path), seed=1).start == later.start
    run(later)
    monkeypatch.setenv("ATROUS_CACHE", str(tmp_path / "of another"))

    def told(*arguments: str, status: int = 0) -> str:
        shown = CliRunner().invoke(app, [*arguments, "--storage", str(storage)])
        assert shown.exit_code == status, shown.output
        return re.sub(r"\s+", " ", shown.output)

    name = planned.run.path.name
    assert name in told("runs")
    assert json.loads(told("status", name, "--json"))["state"] == "finished"
    assert "finished" in told("wait", name)
    assert "nothing to stop" in told("stop", name, status=1)
    assert "seed" in told("compare", name, later.run.path.name)
    assert f"checkpoint {storage}" in told("lineage", str(later.run.path))
    before = len(checkpoint_paths(planned.run.checkpoints))
    assert "before the last checkpoint of a finished run" in told("gc", "--delete")
    assert len(checkpoint_paths(planned.run.checkpoints)) < before
    assert open_network(str(planned.run.path)).checkpoint.step == 6
    later.run.set_aside()
    assert len(all_runs(storage)) == 2
    assert not later.run.finished
    assert finished_result(later) is None
    assert sum(newest_checkpoint(one.checkpoints) is not None for one in all_runs(storage)) == 2


@pytest.mark.parametrize("step", [3, 5])
def test_killed_in_a_bucket_equals_undisturbed(
    undisturbed: PlannedStage, tiny_data: Path, storage: BucketPath, step: int
) -> None:
    planned = plan(tiny_data, storage)
    with at_step(step, die), pytest.raises(KeyboardInterrupt):
        run(planned)
    run(planned)
    assert_same(planned, undisturbed)


def test_a_store_that_is_away_for_a_while_changes_nothing(
    undisturbed: PlannedStage,
    tiny_data: Path,
    storage: BucketPath,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(run_writer, "_SECONDS", 0.05)
    monkeypatch.setattr("orchestrator.bucket.HastyBucketPath.patience", 0.2)
    planned = plan(tiny_data, storage)

    def go_away() -> None:
        proxy.down = True
        threading.Timer(2.0, setattr, (proxy, "down", False)).start()

    with at_step(2, go_away):
        run(planned)
    assert_same(planned, undisturbed)
    assert "heartbeats wait: s3://tests/" in caplog.text


@pytest.mark.parametrize("there", ["to a disk", "to a bucket"])
def test_a_run_goes_on_where_its_prefix_was_copied_to(
    undisturbed: PlannedStage,
    tiny_data: Path,
    storage: BucketPath,
    tmp_path: Path,
    there: str,
) -> None:
    source, target = (storage, tmp_path) if there == "to a disk" else (tmp_path, storage)
    planned = plan(tiny_data, source)
    with at_step(5, die), pytest.raises(KeyboardInterrupt):
        run(planned)
    copy(source, target)
    remove_tree(source / "runs")
    moved = plan(tiny_data, target)
    assert moved.run.path.name == planned.run.path.name
    assert newest_checkpoint(moved.run.checkpoints)
    run(moved)
    assert moved.run.read()["attempts"] == 2
    assert_same(moved, undisturbed)


class Killed(BaseException):
    """The process is no more."""


@contextmanager
def dies_at(change: int) -> Iterator[list[str]]:
    """The changes of the store, of which the last is the one that was not made any more."""
    changes: list[str] = []

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(self: ObjectStore, key: str, *arguments: Any, **named: Any) -> Any:
            if len(changes) >= change:
                raise Killed
            changes.append(f"{name} {key}")
            if len(changes) >= change:
                raise Killed
            return method(self, key, *arguments, **named)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(ObjectStore, name, counting(name, getattr(ObjectStore, name)))
        yield changes


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("change", [7, 16])
def test_killed_at_a_put_of_a_run_equals_undisturbed(
    undisturbed: PlannedStage, tiny_data: Path, storage: BucketPath, change: int
) -> None:
    planned = plan(tiny_data, storage)
    with dies_at(change) as changes, pytest.raises(Killed):
        run(planned)
    assert len(changes) == change
    run(planned)
    assert_same(planned, undisturbed)


def write_all(directory: Path, first: int = 1) -> int:
    """Write checkpoints; the last step that was complete."""
    complete = first - 1
    writer = CheckpointWriter(directory, Checkpoints(keep=1, keep_best=1), lambda: None, print)
    try:
        for step in range(first, len(TOP1) + 1):
            writer.save(contents(step))
            writer.finish(lambda _: None)
            complete = step
    except Killed:
        pass
    finally:
        writer.close()
    return complete


def test_killed_at_any_put_and_delete_leaves_whole_checkpoints(
    storage: BucketPath,
) -> None:
    for change in range(1, 200, 3):
        directory = storage / str(change)
        with dies_at(change) as changes:
            complete = write_all(directory)
        step = check(directory, complete)
        write_all(directory, step + 1)
        check(directory, len(TOP1))
        if step < len(TOP1):
            left = {path.name for path in checkpoint_paths(directory)}
            assert left == {"step-00000001", "step-00000003"}
        if len(changes) < change:
            break
    assert change > 20


def test_a_checkpoint_that_a_store_does_not_take_is_told(
    storage: BucketPath, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    writer = CheckpointWriter(storage, Checkpoints(), ready=lambda: None, tell=told.append)
    proxy.down = True
    with monkeypatch.context() as impatient:
        impatient.setattr(BucketPath, "patience", 0.2)
        writer.save(contents(1))
        writer.close()
    (text,) = told
    assert re.match(r"checkpoint of step 1: not written, s3://.*tried \d times.*; earlier", text)
    proxy.down = False
    writer.finish(lambda _: None)
    check(storage, 1)


def test_a_writer_that_was_left_behind_cannot_spoil_a_checkpoint(storage: BucketPath) -> None:
    """It sends a file of the same checkpoint, of other numbers, when the new one is complete."""
    directory = storage / "checkpoints"
    old = CheckpointWriter(directory, Checkpoints(), ready=lambda: None, tell=print)
    upload = BucketPath.upload

    def late(self: BucketPath, file: Path, ready: Callable[[], None]) -> None:
        patch.undo()
        write_all(directory)

        def fenced() -> None:
            raise RunTakenOver("the new one writes")

        upload(self, file, fenced)

    patch = pytest.MonkeyPatch()
    patch.setattr(BucketPath, "upload", late)
    some = contents(1)
    old.save(type(some)(**vars(some) | {"weights": {"w": torch.zeros(50)}}))
    with pytest.raises(RunTakenOver):
        old.finish(lambda _: None)
    old.close()
    check(directory, len(TOP1))


def test_garbage_of_a_bucket(storage: BucketPath) -> None:
    left = Run(storage / "runs" / "old-0123")
    left.update(stage="old", fingerprint="f" * 64, created=1.0, status="failed")
    (left.checkpoints / "step-00000001" / "model.safetensors").write_bytes(b"12345678")
    (found,) = find_garbage(storage, older_than=-1)
    assert found.bytes > 8
    delete(found)
    assert all_runs(storage) == []
    assert storage.below() == []


def test_a_store_that_keeps_no_two_writers_apart_is_refused(
    storage: BucketPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_storage(storage, 0) == []
    put = ObjectStore.put
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "put", lambda self, name, data, **_: put(self, name, data))
        (finding,) = check_storage(storage, 0)
    assert "does not honour conditional PUT" in finding.text
    (finding,) = check_storage(storage_path("s3://no-such-bucket/x"), 0)
    assert "there is no such bucket" in finding.text
    assert storage.below() == []


def test_the_journal_goes_on_from_a_step_in_a_bucket(storage: BucketPath) -> None:
    run = Run(storage / "run")
    run.update(attempts=1)
    for first in (1, 3):
        with RunWriter(run, 1, Checkpoints()) as writer:
            writer.go_on_from(first - 1)
            for step in range(first, first + 4):
                writer.log(step, {"train/loss": float(first)})
    steps = [(line["step"], line["metrics"]["train/loss"]) for line in read_journal(run.journal)]
    assert steps == [(1, 1.0), (2, 1.0), (3, 3.0), (4, 3.0), (5, 3.0), (6, 3.0)]
