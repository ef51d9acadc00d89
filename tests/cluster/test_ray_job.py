"""`ray job submit` of a pipeline against a live cluster."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from orchestrator.runs.run import all_runs
from tests.cluster.conftest import descendants, linked_programs, wait_for_step
from tests.unit.orchestrator.jobs import pipeline_job, stage_job, write

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]


RAY = ["python", "-m", "ray.scripts.scripts"]  # of the PATH below


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Head:
    """A head node in the project's directory, and the environment to submit to it from."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self.environment = os.environ | {
            "PATH": f"{linked_programs(place)}{os.pathsep}{os.environ['PATH']}",
            "ATROUS_STORAGE": str(place / "storage"),
            "RAY_AUTH_MODE": "disabled",
        }
        self.start()

    def start(self) -> None:
        """Start it, on ports of its own."""
        dashboard = free_port()
        start = [*RAY, "start", "--head", f"--port={free_port()}", f"--dashboard-port={dashboard}"]
        # The agent's default port is taken where another Ray runs on this machine.
        start += [f"--dashboard-agent-listen-port={free_port()}"]
        start += [f"--ray-client-server-port={free_port()}"]
        start += ["--num-cpus=2", "--disable-usage-stats", "--block"]
        self.environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
        with (self._place / "head.log").open("a") as log:
            self._process = subprocess.Popen(
                start,
                env=self.environment,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        """kill -9 of the node: Ray, the command, its workers."""
        for pid in [self._process.pid, *(pid for pid, _ in descendants(self._process.pid))]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait(timeout=60)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    started = Head(tmp_path_factory.mktemp("cluster"))
    try:
        yield started
    finally:
        started.close()


@pytest.fixture(scope="module")
def cluster(head: Head) -> dict[str, str]:
    """The environment to submit from."""
    return head.environment


def executable(path: Path, job: dict[str, Any]) -> Path:
    """A job file as those in jobs/ are."""
    write(path, job)
    path.write_text(f"#!/usr/bin/env -S python -m orchestrator\n{path.read_text()}")
    path.chmod(0o755)
    return path


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*RAY, "job", "submit", "--address", environment["RAY_API_SERVER_ADDRESS"]]
    for _ in range(30):  # until the head answers
        done = subprocess.run(
            [*command, *arguments],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        said = done.stderr + done.stdout
        if not any(text in said for text in ("Failed to connect", "No available agent")):
            return done
        time.sleep(2)
    raise TimeoutError(done.stderr)


@pytest.fixture(scope="module")
def submitted(
    cluster: dict[str, str], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> subprocess.CompletedProcess[str]:
    job = pipeline_job(tiny_data)
    for stage in job["stages"]:
        stage["cluster"] = {"workers": 2 if stage["name"] == "tiny-imagenet" else 1}
    path = executable(tmp_path_factory.mktemp("job") / "pipeline.yaml", job)
    return submit(cluster, "--working-dir", ".", "--", str(path))


def test_a_pipeline_runs_on_the_cluster(
    cluster: dict[str, str], submitted: subprocess.CompletedProcess[str]
) -> None:
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    runs = {run.read()["stage"]: run for run in all_runs(Path(cluster["ATROUS_STORAGE"]))}
    assert {name for name, run in runs.items() if run.finished} == {
        "tiny-imagenet",
        "tiny-coco",
        "tiny-voc",
    }
    assert "tiny-voc: done" in submitted.stdout


def test_a_failing_stage_fails_the_job(
    cluster: dict[str, str],
    submitted: subprocess.CompletedProcess[str],
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    job = pipeline_job(tiny_data)
    job["stages"] = [job["stages"][2]]
    job["stages"][0] |= {"start_from": "nothing-of-that-name", "cluster": {"workers": 1}}
    # Without --working-dir: the job's directory is the head's.
    done = submit(cluster, "--", str(executable(tmp_path / "failing.yaml", job)))
    assert done.returncode != 0
    # The stream of a job that ends at once can be empty; the kept log is not.
    identity = re.search(r"raysubmit_\w+", done.stdout)
    assert identity is not None
    command = [*RAY, "job", "logs", "--address", cluster["RAY_API_SERVER_ADDRESS"], identity[0]]
    logs = subprocess.run(command, env=cluster, capture_output=True, text=True, check=True)
    assert "no finished run of it under" in logs.stdout


def make_project(place: Path, job: dict[str, Any]) -> None:
    """A git repository with a job file."""
    write(place / "tiny.yaml", job)
    for command in (["init"], ["add", "tiny.yaml"], ["commit", "-m", "job"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(place), *identity, *command], check=True)


def atrous(
    cluster: dict[str, str], place: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator", *arguments]
    if arguments[0] == "submit":
        command += ["--address", cluster["RAY_API_SERVER_ADDRESS"]]
    return subprocess.run(command, env=cluster, cwd=place, capture_output=True, text=True)


def test_atrous_submit_packs_a_project_and_ends_as_its_job(
    cluster: dict[str, str],
    submitted: subprocess.CompletedProcess[str],
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    """The stage that the pipeline before did is found done."""
    make_project(tmp_path, stage_job(tiny_data, cluster={"workers": 2}))
    good = atrous(cluster, tmp_path, "submit", "tiny.yaml", "--follow")
    assert good.returncode == 0, good.stdout + good.stderr
    assert "largest: tiny.yaml" in good.stdout
    assert "tiny-imagenet: was done before" in good.stdout
    bad = atrous(cluster, tmp_path, "submit", "tiny.yaml", "--follow", "--set", "global_batch=4000")
    assert bad.returncode == 1, bad.stdout + bad.stderr
    assert "do not fill a global batch of 4000" in bad.stdout


def test_a_job_goes_on_after_the_death_of_the_head(
    head: Head, submitted: subprocess.CompletedProcess[str], tiny_data: Path, tmp_path: Path
) -> None:
    """Nothing of the cluster is left but the storage; the new head knows no job."""
    storage = tmp_path / "storage"
    changes = {"steps": 600, "checkpoint": {"every": 20}, "evaluate": {"every": 600}}
    job = stage_job(tiny_data, cluster={"workers": 1}, **changes)
    make_project(tmp_path, job | {"storage": str(storage)})
    assert atrous(head.environment, tmp_path, "submit", "tiny.yaml").returncode == 0
    run = wait_for_step(storage, 40)
    head.kill()
    place = ("--storage", str(storage))
    told = atrous(head.environment, tmp_path, "wait", "tiny-imagenet", *place)
    assert (told.returncode, "interrupted" in told.stdout) == (1, True)
    head.start()
    for _ in range(30):  # until the head answers
        again = atrous(head.environment, tmp_path, "submit", "tiny.yaml", "--follow")
        if "no Ray cluster at" not in again.stderr and "No available agent" not in again.stderr:
            break
        time.sleep(2)
    assert again.returncode == 0, again.stdout + again.stderr
    assert run.read()["attempts"] == 2
    started = [event["step"] for event in run.events() if event["kind"] == "start"]
    assert len(started) == 2
    assert started[1] >= 20
    told = atrous(head.environment, tmp_path, "wait", "tiny-imagenet", *place)
    assert told.returncode == 0
