"""Commands run as a user runs them, in processes of their own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from orchestrator.runs.run import Run, read_journal


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a command: runs land in the test's directory."""
    return os.environ | {"ATROUS_STORAGE": str(tmp_path / "storage"), "PYTHONUNBUFFERED": "1"}


Atrous = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def atrous(environment: dict[str, str]) -> Atrous:
    """Run `atrous ARGUMENTS` to its end."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "orchestrator", *map(str, arguments)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=500, check=False
        )

    return run


def only_run(storage: Path) -> Run | None:
    """The one run under a storage."""
    found = list((storage / "runs").glob("*/run.json"))
    return Run(found[0].parent) if found else None


def wait_for_step(storage: Path, step: int, seconds: float = 240) -> Run:
    """Wait until the journal of the only run reaches a step."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        run = only_run(storage)
        if run and any(record["step"] >= step for record in read_journal(run.journal)):
            return run
        time.sleep(0.1)
    raise TimeoutError(f"no step {step} under {storage} after {seconds} s")


def wait_for_event(run: Run, kind: str, number: int = 1, seconds: float = 240) -> dict[str, Any]:
    """Wait for the so-many-th event of a kind."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = [event for event in run.events() if event["kind"] == kind]
        if len(found) >= number:
            return found[number - 1]
        time.sleep(0.1)
    raise TimeoutError(f"not {number} times {kind!r} in {run.path} after {seconds} s")


def free_port() -> int:
    """A port that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def linked_programs(place: Path) -> Path:
    """This environment's programs by a link in `place`: Ray 2.60 starts no nodes and no jobs with a
    Python whose path has a space."""
    link = place / "environment"
    link.symlink_to(sys.prefix)
    return link / "bin"


class Nodes:
    """A Ray cluster of several nodes with one CPU each, all on this machine."""

    def __init__(self) -> None:
        from ray._raylet import GcsClient

        # Sockets lie in it, whose paths must be short.
        self._place = tempfile.mkdtemp(prefix="ray-")
        self._python = linked_programs(Path(self._place)) / "python"
        self._environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": self._place}
        self._processes: list[subprocess.Popen[bytes]] = []
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self._start(
            "--head",
            f"--port={port}",
            f"--ray-client-server-port={free_port()}",
            f"--temp-dir={self._place}",
            "--include-dashboard=false",
        )
        self._gcs = GcsClient(address=self.address)
        self._wait_for(1)

    def _start(self, *arguments: str) -> None:
        command = [str(self._python), "-m", "ray.scripts.scripts", "start", *arguments, "--block"]
        command += ["--num-cpus=1", "--disable-usage-stats", "--object-store-memory=100000000"]
        # Two nodes on one machine: neither may take the usual ports.
        command += [f"--dashboard-agent-listen-port={free_port()}"]
        command += ["--min-worker-port=0", "--max-worker-port=0"]
        log = Path(self._place, f"node-{len(self._processes)}.log")
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                env=self._environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._processes.append(process)

    def _wait_for(self, number: int, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while len(self.node_ids()) < number:
            if time.monotonic() > deadline:
                self.close()
                raise TimeoutError(f"fewer than {number} nodes after {seconds} s")
            time.sleep(0.2)

    def node_ids(self) -> list[str]:
        """Those that live, the head first."""
        nodes = [n for n in self._gcs.get_all_node_info(timeout=30).values() if n.state == 0]
        return [node.node_id.hex() for node in sorted(nodes, key=lambda n: not n.is_head_node)]

    def add(self) -> None:
        """One more node."""
        number = len(self.node_ids()) + 1
        self._start(f"--address={self.address}")
        self._wait_for(number)

    def kill_last(self) -> None:
        """kill -9 of a node's raylet, with which its workers end."""
        for pid, command in descendants(self._processes[-1].pid):
            if "raylet/raylet" in command.split()[0]:
                os.kill(pid, signal.SIGKILL)

    def drain_last(self, seconds: int) -> None:
        """Announce that a node will be taken away."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
        command += [f"--address={self.address}", f"--node-id={self.node_ids()[-1]}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
        command += [f"--deadline-remaining-seconds={seconds}"]
        subprocess.run(command, env=self._environment, check=True, capture_output=True)

    def close(self) -> None:
        """End all nodes."""
        for process in self._processes:
            for pid in [process.pid, *(pid for pid, _ in descendants(process.pid))]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)  # SIGTERM would drain the node, half a minute
            process.wait()
        shutil.rmtree(self._place, ignore_errors=True)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """Two nodes."""
    cluster = Nodes()
    try:
        cluster.add()
        yield cluster
    finally:
        cluster.close()


def descendants(pid: int) -> list[tuple[int, str]]:
    """Process id and command of all processes below one."""
    listing = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 2) for line in listing.stdout.splitlines()]
    found, parents = [], {pid}
    while new := [row for row in rows if int(row[1]) in parents and row not in found]:
        found += new
        parents = {int(row[0]) for row in new}
    return [(int(row[0]), row[2]) for row in found]


def series(run: Run) -> list[tuple[int, str]]:
    """The journal without timings."""
    return [
        (
            record["step"],
            json.dumps(
                {
                    k: v
                    for k, v in record["metrics"].items()
                    if not any(timed in k for timed in ("second", "wait", "stall", "mfu"))
                }
            ),
        )
        for record in read_journal(run.journal)
    ]
