"""One owner of a run at a time, on a disk and in a bucket, whatever becomes of it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.bucket import storage_path
from orchestrator.errors import RunError, RunTakenOver
from orchestrator.runs import lease
from orchestrator.runs.run import Run
from tests.object_store import Proxy, bucket, proxy, store

__all__ = ["bucket", "proxy", "store"]  # fixtures

ELSEWHERE = {"boot": "another", "pids": "another", "pid": 1, "started": "1"}


@pytest.fixture(params=["disk", "bucket"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    if request.param == "disk":
        (tmp_path / "runs").mkdir()
        return Run(tmp_path / "runs" / "a")
    return Run(storage_path(f"s3://{request.getfixturevalue('bucket')}") / "runs" / "a")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "DEAD_AFTER", 1.0)
    monkeypatch.setattr(lease, "_TICK", 0.05)
    monkeypatch.setattr(lease, "_SETTLED", 0.05)


def foreign(run: Run, **changes: Any) -> Any:
    """Of a process on another machine."""
    record = {"token": "its", "who": "process 1 on far", "since": 1.8e9, "beat": 0}
    run.path.mkdir(parents=True, exist_ok=True)
    lease.file_of(run.path).write_text(json.dumps(record | {"process": ELSEWHERE} | changes))


class Beating:
    """A process on another machine, that lives until it is told not to."""

    def __init__(self, run: Run) -> None:
        self.run, self.ended = run, threading.Event()
        self.thread = threading.Thread(target=self._beat)

    def __enter__(self) -> "Beating":
        foreign(self.run)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _beat(self) -> None:
        beat = 0
        while not self.ended.wait(0.2):
            foreign(self.run, beat=(beat := beat + 1))


def owner(run: Run) -> Any:
    return json.loads(lease.file_of(run.path).read_text())


def test_a_run_has_one_owner(run: Run) -> None:
    assert not run.is_driven()
    with run.lock():
        assert run.is_driven()
        told = rf"a is being run by process {os.getpid()} on .* since 20.*UTC; give the same"
        with pytest.raises(RunError, match=told), run.lock():
            pass
        assert run.is_driven()
    assert not run.is_driven()
    with run.lock():
        pass


def test_the_record_changes_as_long_as_the_owner_lives(run: Run) -> None:
    with run.lock():
        first = owner(run)
        while owner(run)["beat"] < first["beat"] + 2:
            time.sleep(0.05)
        assert owner(run)["token"] == first["token"]
    assert owner(run)["token"] is None


def test_of_many_at_once_one_comes_first(run: Run) -> None:
    barrier, done = threading.Barrier(8), threading.Event()
    owners, refused = [], []

    def take() -> None:
        barrier.wait()
        try:
            with run.lock():
                owners.append(1)
                done.wait()
        except RunError:
            refused.append(1)
            if len(refused) == 7:
                done.set()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(owners), len(refused)) == (1, 7)


def test_who_lives_on_another_machine_is_left_alone(run: Run) -> None:
    with Beating(run):
        assert run.is_driven()
        with pytest.raises(RunError, match="process 1 on far since 2027"), run.lock():
            pass


def test_who_died_on_another_machine_is_succeeded(run: Run) -> None:
    foreign(run)
    assert not run.is_driven()
    foreign(run, beat=1)  # one sign more
    began = time.monotonic()
    with run.lock():
        assert time.monotonic() - began > lease.DEAD_AFTER
        assert owner(run)["token"] != "its"
    foreign(run, token=None)  # it let go
    with run.lock():
        pass


def test_a_storage_that_is_away_is_no_death(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was so for the owner too, who speaks once it is back."""
    foreign(run)
    read, looks = lease._read, []

    def late(directory: Path) -> Any:
        looks.append(1)
        if len(looks) == 3:
            time.sleep(2 * lease.DEAD_AFTER)
            threading.Timer(lease.DEAD_AFTER / 2, foreign, (run,), {"beat": 1}).start()
        return read(directory)

    monkeypatch.setattr(lease, "_read", late)
    with pytest.raises(RunError, match="process 1 on far"), run.lock():
        pass


def test_of_two_that_saw_it_die_one_succeeds(run: Run) -> None:
    foreign(run)
    barrier, outcomes = threading.Barrier(2), []

    def take() -> None:
        barrier.wait()
        try:
            with run.lock():
                time.sleep(1.5)
            outcomes.append("owner")
        except RunError:
            outcomes.append("refused")

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["owner", "refused"]


def test_an_owner_that_was_given_up_writes_no_more(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """It was stopped, or cut off from the store, for so long that another took over."""
    with run.lock():
        run.update(status="running")
        before = (run.path / "run.json").read_text()
        foreign(run)
        for write in (lambda: run.update(status="failed"), lambda: run.note("ended")):
            with pytest.raises(RunTakenOver, match="process 1 on far took this run over"):
                write()
        while "took this run over" not in caplog.text:  # its thread notices too
            time.sleep(0.05)
    assert owner(run)["token"] == "its"  # nor does it let go of what is not its own
    assert (run.path / "run.json").read_text() == before
    assert run.events() == []


@pytest.fixture
def child(run: Run) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns the run."""
    program = (
        "import sys, time; from orchestrator.bucket import storage_path\n"
        "from orchestrator.runs.run import Run\n"
        "with Run(storage_path(sys.argv[1])).lock(): print('owner', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "owner\n"
    yield process
    process.kill()
    process.wait()


def test_a_death_on_this_machine_is_seen_at_once(
    run: Run, child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "DEAD_AFTER", 1000.0)
    assert run.is_driven()
    with pytest.raises(RunError, match=f"process {child.pid} on"), run.lock():
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not run.is_driven()
    with run.lock():
        assert f"process {os.getpid()} " in owner(run)["who"]


def test_who_attaches_waits_for_the_owner(run: Run) -> None:
    told: list[str] = []
    with Beating(run) as other:

        def end(text: str) -> None:
            told.append(text)
            other.ended.set()

        with run.lock(end):
            assert owner(run)["token"] != "its"
    assert len(told) == 1
    assert "process 1 on far" in told[0]
    assert "this command waits" in told[0]


def test_a_store_that_is_away_for_a_while_costs_nobody_a_run(bucket: str, proxy: Proxy) -> None:
    run = Run(storage_path(f"s3://{bucket}") / "a")
    with run.lock():
        proxy.down = True
        time.sleep(1)
        proxy.down = False
        first = owner(run)
        while owner(run)["beat"] == first["beat"]:
            time.sleep(0.05)
        run.update(status="running")
    assert owner(run)["token"] is None


def test_an_answer_that_is_lost_is_not_a_takeover(bucket: str, proxy: Proxy) -> None:
    run, proxy.matching = Run(storage_path(f"s3://{bucket}") / "a"), "owner.json"
    proxy.faults.extend([None, "lost", None, None])
    with run.lock():
        for _ in range(3):
            proxy.faults.append("lost")
            first = owner(run)
            while owner(run)["beat"] < first["beat"] + 2:
                time.sleep(0.05)
        run.update(status="running")
    assert owner(run)["token"] is None
