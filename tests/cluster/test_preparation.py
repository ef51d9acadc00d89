"""Preparation on a real cluster of two nodes: the same bytes, whatever dies on the way."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import simplejpeg

from data_pipeline.formats.sample import Item, Sample
from data_pipeline.manifest import FILE_NAME, read_manifest
from data_pipeline.parts import Part, ShardTask, in_processes
from data_pipeline.prepare import Settings, prepare
from data_pipeline.storage import open_storage
from orchestrator.launch.cluster import connect
from orchestrator.launch.ray_tasks import on_cluster
from tests.cluster.conftest import descendants, linked_programs
from tests.cluster.test_ray_job import RAY, ROOT, free_port
from tests.object_store import ACCESS_KEY, SECRET_KEY, Server, bucket, store

pytestmark = pytest.mark.cluster
__all__ = ["bucket", "store"]  # fixtures
CPUS = 2  # of each node


def start(environment: dict[str, str], log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [*RAY, "start", f"--num-cpus={CPUS}", "--disable-usage-stats", "--block", *arguments]
    with log.open("w") as file:
        return subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=file, stderr=file, start_new_session=True
        )


@pytest.fixture(scope="module")
def environment(store: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of the nodes and the commands: the object store is in it."""
    programs = linked_programs(tmp_path_factory.mktemp("programs"))
    return os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{store.port}",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture(scope="module")
def head(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster of one node."""
    port, place = free_port(), tmp_path_factory.mktemp("cluster")
    ports = ("dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    arguments = [f"--port={port}", *(f"--{name}={free_port()}" for name in ports)]
    node = start(environment, place / "head.log", "--head", *arguments)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        end(node)


@pytest.fixture
def second_node(
    environment: dict[str, str], head: str, tmp_path: Path
) -> Iterator[subprocess.Popen[bytes]]:
    wait_until_up(environment, head)
    agent = f"--dashboard-agent-listen-port={free_port()}"
    node = start(environment, tmp_path / "node.log", f"--address={head}", agent)
    try:
        yield node
    finally:
        end(node)


def end(node: subprocess.Popen[bytes]) -> None:
    """Asked politely, a head takes half a minute."""
    for pid, _ in [(node.pid, ""), *descendants(node.pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    node.wait(timeout=60)


def wait_until_up(environment: dict[str, str], head: str) -> None:
    for _ in range(60):
        command = [*RAY, "health-check", "--address", head]
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        if done.returncode == 0:
            return
        time.sleep(0.5)
    raise TimeoutError(done.stderr)


def make_source(place: Path, count: int) -> Path:
    for number in range(count):
        path = place / "train" / f"class{number % 3}" / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(simplejpeg.encode_jpeg(np.full((8, 9 + number, 3), number, np.uint8)))
    return place


def prepare_by_command(
    environment: dict[str, str], *arguments: str | Path, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator", "data", "prepare", *map(str, arguments)]
    return subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


def test_from_bucket_to_bucket(
    head: str, environment: dict[str, str], bucket: str, tmp_path: Path
) -> None:
    wait_until_up(environment, head)
    source = make_source(tmp_path / "raw", 20)
    raw = open_storage(f"s3://{bucket}/raw")
    for path in source.rglob("*.JPEG"):
        with raw.writing(path.relative_to(source).as_posix()) as file:
            file.write(path.read_bytes())
    done = prepare_by_command(
        environment | {"RAY_ADDRESS": head}, "imagenet", raw.place, f"s3://{bucket}/data"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    wanted = prepare("imagenet", source, tmp_path / "data", workers=1)["train"]
    assert f"manifest {wanted.digest}" in done.stdout
    assert read_manifest(f"s3://{bucket}/data/train").digest == wanted.digest


def test_a_node_that_does_not_see_the_source_is_named(
    head: str, environment: dict[str, str], tmp_path: Path
) -> None:
    """/proc/self/cwd is another folder for the workers than for the command."""
    wait_until_up(environment, head)
    make_source(tmp_path / "raw", 3)
    arguments = ("imagenet", "/proc/self/cwd/raw", tmp_path / "out", "--address", head)
    done = prepare_by_command(environment, *arguments, "--skip-broken", cwd=tmp_path)
    assert done.returncode == 1
    assert "error: node " in done.stderr
    assert "JPEG: not there, but " in done.stderr
    assert "prepare from and to paths that all nodes share, or s3://" in done.stderr
    assert not (tmp_path / "out/train" / FILE_NAME).exists()


SCRIPT = """
import sys
import time
from data_pipeline.prepare import Settings, prepare
from orchestrator.launch.ray_tasks import on_cluster

def report(split, done, total):
    print(split, done, flush=True)
    if done == 5:
        time.sleep(60)  # the kill comes now

source, target, address = sys.argv[1:]
prepare("imagenet", source, target, Settings(samples_per_shard=1),
        workers=on_cluster(address), progress=report)
"""


def test_a_killed_command_goes_on(head: str, environment: dict[str, str], tmp_path: Path) -> None:
    wait_until_up(environment, head)
    source, out = make_source(tmp_path / "raw", 40), tmp_path / "out"
    command = [sys.executable, "-c", SCRIPT, str(source), str(out), head]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        for _ in range(5):
            assert process.stdout.readline().startswith("train ")
        process.kill()
    parts = list((out / "train/.parts").glob("*.parquet"))
    assert 5 <= len(parts) <= 5 + 2 * 2 * CPUS  # what was handed over may be finished
    written = {path.stem: (out / f"train/{path.stem}.tar").stat() for path in parts}
    assert not (out / "train" / FILE_NAME).exists()
    again = subprocess.run(
        [*command[:2], SCRIPT.replace("done == 5", "False"), *command[3:]],
        capture_output=True, text=True, env=environment, cwd=ROOT, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    for name, status in written.items():
        assert (out / f"train/{name}.tar").stat().st_ino == status.st_ino
    settings = Settings(samples_per_shard=1)
    fresh = prepare("imagenet", source, tmp_path / "fresh", settings, workers=1)["train"]
    assert read_manifest(out / "train").digest == fresh.digest
    assert not (out / "train/.parts").exists()


def patient_sample(item: Item) -> Sample:
    """Waits until a node has died, the file of which is the item's label."""
    while not Path(item.label).exists():
        time.sleep(0.05)
    data = item.key.encode() * 100
    return Sample(key=item.key, image=data, image_extension="jpg", width=1, height=1)


class Counted(list[ShardTask]):
    """Tasks that know how many of them were taken."""

    taken = 0

    def __iter__(self) -> Iterator[ShardTask]:
        for task in super().__iter__():
            self.taken += 1
            yield task


def tasks(place: Path, died: Path) -> Counted:
    return Counted(
        ShardTask(
            place=str(place),
            name=f"shard-{number:06d}.tar",
            digest=str(number),
            items=[Item(key=f"sample{number}", label=str(died))],
            load=patient_sample,
            fetch=None,
            sources=(),
            reuse_broken=False,
        )
        for number in range(30)
    )


def shards(parts: Sequence[Part]) -> list[Any]:
    return sorted((part.shard.name, part.shard.sha256) for part in parts)


def kill_at_work(node: subprocess.Popen[bytes], died: Path) -> None:
    """Kill the node's raylet, and its workers with it, when they have tasks."""
    for _ in range(600):
        below = descendants(node.pid)
        if any("ray::prepare" in command for _, command in below):
            os.kill(next(pid for pid, command in below if "/raylet/raylet" in command), 9)
            break
        time.sleep(0.1)
    else:
        died.with_name("never had a task").touch()
    died.touch()


@pytest.fixture
def _disconnected() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.mark.usefixtures("_disconnected")
def test_a_lost_node_costs_its_tasks_only(
    head: str, second_node: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes cannot import it
    connect(head)
    while ray.cluster_resources().get("CPU") != 2 * CPUS:
        time.sleep(0.1)
    died = tmp_path / "died"
    threading.Thread(target=kill_at_work, args=(second_node, died)).start()
    todo, parts = tasks(tmp_path / "here", died), []
    run = on_cluster(head)
    assert run is not None
    for part in run(todo):
        parts.append(part)
        assert todo.taken - len(parts) <= 2 * 2 * CPUS  # the others are not in Ray's hands yet
    assert not (tmp_path / "never had a task").exists()
    alone = in_processes(1)(tasks(tmp_path / "there", died))
    assert shards(parts) == shards(list(alone))
    assert list((tmp_path / "here").glob(".parts/*.marker")) == []
