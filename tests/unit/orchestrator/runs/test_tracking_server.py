"""A real MLflow server over HTTP that dies in the midst of a run and comes back."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlflow
import pytest

from orchestrator.files import read_json
from orchestrator.runs import tracking
from orchestrator.runs.references import find_reference
from orchestrator.runs.tracking import Tracker, is_tracked
from tests.unit.orchestrator.runs.test_tracking import everything, run_id
from tests.unit.orchestrator.written_run import WrittenRun


@contextmanager
def server(port: int, database: Path) -> Iterator[None]:
    """An MLflow server on loopback, killed at the end with all its workers."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}"),
            *("--workers=1", f"--backend-store-uri=sqlite:///{database}"),
            f"--artifacts-destination={database.parent / 'artifacts'}",
        ],
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=(database.parent / "server.log").open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        wait_until(lambda: answers(port) or process.poll() is not None)
        assert process.poll() is None, (database.parent / "server.log").read_text()
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port: int) -> bool:
    with suppress(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        return True
    return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180  # starting takes seconds, on a busy machine many
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_server_that_is_killed_and_comes_back_has_all_of_it_once(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri, database = f"http://127.0.0.1:{port}", storage / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(tracking, "_EVERY", 0.1)
    written = WrittenRun(storage)
    picture = written.run.artifacts / "predictions" / "step-00000006.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"a picture")
    parent = Tracker(storage, WrittenRun(storage, "whole").run)
    tracker = Tracker(storage, written.run, parent)
    with server(port, database):
        written.log(1, 2)
        written.save(2)
        wait_until(lambda: (read_json(written.run.tracking) or {}).get("sent_step") == 2)
    written.log(3, 4)
    written.save(4, miou=0.3)
    checkpoint = written.finish(miou=0.5)
    tracker.close()
    assert not is_tracked(written.run)
    with server(port, database):
        Tracker(storage, written.run, parent).close()
        parent.close()
        assert is_tracked(written.run)
        found = everything(mlflow.MlflowClient(uri), run_id(written))
        assert found["status"] == "FINISHED"
        assert found["points"]["train/loss"] == [(n, 1 / n) for n in range(1, 7)]
        assert found["points"]["val/miou"] == [(4, 0.3), (6, 0.5)]
        assert found["inputs"] == ["1" * 32, "2" * 32]
        assert found["models"] == ["READY"] * 3
        assert len(found["outputs"]) == 3
        client = mlflow.MlflowClient(uri)
        names = {item.path for item in client.list_artifacts(run_id(written))}
        assert names == {"job.yaml", "predictions"}
        assert found["tags"]["mlflow.parentRunId"] == run_id(WrittenRun(storage, "whole"))
        assert find_reference("models:/voc@best", storage)[0].digest == checkpoint.digest
