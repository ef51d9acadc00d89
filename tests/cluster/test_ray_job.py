"""`ray job submit` of a pipeline against a live cluster."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.runs.run import all_runs
from tests.cluster.conftest import linked_programs
from tests.unit.orchestrator.jobs import pipeline_job, stage_job, write

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]


RAY = ["python", "-m", "ray.scripts.scripts"]  # of the PATH below


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node started in the project's directory; the environment to submit from."""
    place = tmp_path_factory.mktemp("cluster")
    dashboard = free_port()
    environment = os.environ | {
        "PATH": f"{linked_programs(place)}{os.pathsep}{os.environ['PATH']}",
        "ATROUS_STORAGE": str(place / "storage"),
        "RAY_AUTH_MODE": "disabled",
    }
    start = [*RAY, "start", "--head", f"--port={free_port()}", f"--dashboard-port={dashboard}"]
    # The agent's default port is taken where another Ray runs on this machine.
    start += [
        f"--dashboard-agent-listen-port={free_port()}",
        f"--ray-client-server-port={free_port()}",
    ]
    start += ["--num-cpus=2", "--disable-usage-stats", "--block"]
    log = (place / "head.log").open("w")
    head = subprocess.Popen(
        start, env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
    )
    try:
        yield environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        os.killpg(head.pid, 15)
        head.wait(timeout=60)
        log.close()


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


def test_atrous_submit_packs_a_project_and_ends_as_its_job(
    cluster: dict[str, str],
    submitted: subprocess.CompletedProcess[str],
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    """The stage that the pipeline before did is found done."""
    job = stage_job(tiny_data, cluster={"workers": 2})
    write(tmp_path / "tiny.yaml", job)
    for command in (["init"], ["add", "tiny.yaml"], ["commit", "-m", "job"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *command], check=True)
    command = [sys.executable, "-m", "orchestrator", "submit", "tiny.yaml", "--follow"]
    command += ["--address", cluster["RAY_API_SERVER_ADDRESS"]]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], env=cluster, cwd=tmp_path, capture_output=True, text=True
        )

    good = run()
    assert good.returncode == 0, good.stdout + good.stderr
    assert "largest: tiny.yaml" in good.stdout
    assert "tiny-imagenet: was done before" in good.stdout
    bad = run("--set", "global_batch=4000")
    assert bad.returncode == 1, bad.stdout + bad.stderr
    assert "do not fill a global batch of 4000" in bad.stdout
