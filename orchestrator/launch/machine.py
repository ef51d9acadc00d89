"""Whether this machine, the cluster, the storage and the tracking server can carry a job."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.config import as_size
from orchestrator.errors import RunError
from orchestrator.job.config import StageSettings
from orchestrator.job.sections import Cluster
from orchestrator.launch.cluster import Resources, connect
from orchestrator.runs.tracking import tracking_uri

_LITTLE_SHM = 2**30  # bytes
_PROBE_SECONDS = 3.0
_NODE_GROUP = "ray.io/node-group"


@dataclass(frozen=True)
class Finding:
    """What keeps a job from running (error), or may surprise (warning); the text has the cure."""

    level: Literal["error", "warning"]
    where: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Room:
    """What stages may run on; `grows`: an autoscaler adds nodes where it is too little."""

    where: str
    nodes: tuple[Resources, ...]
    accelerators: tuple[str, ...] = ()
    grows: bool = False


def find_room() -> Room:
    """The cluster in RAY_ADDRESS, else this machine, where no Ray is started for it.

    Raises:
        RunError: no cluster answers at the address.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return Room(where="this machine", nodes=(_this_machine(),))
    try:
        return _cluster()
    except (ConnectionError, RuntimeError, ValueError) as error:
        address = os.environ["RAY_ADDRESS"]
        raise RunError(
            f"no Ray cluster at {address} ({error}); correct RAY_ADDRESS or --address"
        ) from None


def check_room(stages: Sequence[StageSettings], room: Room) -> list[Finding]:
    """Whether every stage's least workers fit; one finding for all that do not."""
    lacking = {
        stage.name: (stage.cluster.min_workers, worker_needs(stage.cluster), places)
        for stage in stages
        if (places := sum(_places(node, worker_needs(stage.cluster)) for node in room.nodes))
        < stage.cluster.min_workers
    }
    if not lacking:
        return []
    total = Resources(cpus=sum(n.cpus for n in room.nodes), gpus=sum(n.gpus for n in room.nodes))
    wanted = ", ".join(
        f"{name} ({workers} workers of {worker}: room for {places})"
        for name, (workers, worker, places) in lacking.items()
    )
    nodes = f"{len(room.nodes)} node{'s' * (len(room.nodes) != 1)}"
    text = f"{room.where} has {total} on {nodes}, too little for {wanted}"
    if room.grows:
        return [Finding("warning", "cluster", f"{text}; it must grow first, which is waited for")]
    cure = "lower cluster.workers, cpus_per_worker or gpus_per_worker, or take a larger cluster"
    return [Finding("error", "cluster", f"{text}; {cure}")]


def worker_needs(cluster: Cluster) -> Resources:
    """What one worker takes."""
    return Resources(cpus=cluster.cpus_per_worker, gpus=cluster.gpus_per_worker)


def _places(node: Resources, worker: Resources) -> int:
    """Workers that fit on a node."""
    of_cpus = int(node.cpus // worker.cpus)
    return min(of_cpus, int(node.gpus / worker.gpus)) if worker.gpus else of_cpus


def _this_machine() -> Resources:
    import torch

    return Resources(cpus=float(os.cpu_count() or 1), gpus=float(torch.cuda.device_count()))


def _cluster() -> Room:
    import ray

    connect()
    alive = [node for node in ray.nodes() if node["Alive"]]
    resources = [node["Resources"] for node in alive]
    kinds = {key.partition(":")[2] for one in resources for key in one if "accelerator_type" in key}
    return Room(
        where="the cluster",
        nodes=tuple(Resources(cpus=r.get("CPU", 0), gpus=r.get("GPU", 0)) for r in resources),
        accelerators=tuple(sorted(kinds)),
        # Nodes that an autoscaler or KubeRay started belong to a group.
        grows=any(_NODE_GROUP in node.get("Labels", {}) for node in alive),
    )


def check_storage(storage: Path, room: int) -> list[Finding]:
    """Whether checkpoints can be written there: rename, lock, force to disk; and `room` bytes."""
    place = next(path for path in (storage, *storage.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".atrous-") as directory:
            first, second = Path(directory) / "first", Path(directory) / "second"
            with first.open("wb") as file:
                file.write(b"x")
                file.flush()
                os.fsync(file.fileno())
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.replace(first, second)
    except OSError as error:
        text = (
            f"{place} cannot be written to with rename, lock and fsync ({error}); correct storage: "
            "or its permissions"
        )
        return [Finding("error", "storage", text)]
    free = shutil.disk_usage(place).free
    if free < room:
        text = (
            f"{place} has {free / 2**30:.1f} GiB free, checkpoints need {room / 2**30:.1f}; make "
            "room, or lower checkpoint.keep and keep_best"
        )
        return [Finding("error", "storage", text)]
    return []


def check_tracking(storage: Path) -> list[Finding]:
    """Whether an MLflow server answers; without one metrics wait in the storage."""
    from urllib.error import HTTPError, URLError
    from urllib.request import urlopen

    uri = tracking_uri(storage)
    if not uri.startswith(("http://", "https://")):
        return []
    try:
        urlopen(f"{uri.rstrip('/')}/health", timeout=_PROBE_SECONDS).close()
    except HTTPError:  # somebody answers
        return []
    except (URLError, OSError, ValueError) as error:
        text = (
            f"no MLflow server answers at {uri} ({error}); training goes on without it, and the "
            "next run sends what was kept; correct MLFLOW_TRACKING_URI or start it"
        )
        return [Finding("warning", "tracking", text)]
    return []


def check_machine(stages: Sequence[StageSettings]) -> list[Finding]:
    """Memory for batches and shared memory for Ray, of this machine.

    A cluster's nodes are not looked at.
    """
    found = []
    shm = Path("/dev/shm")
    on_ray = any(stage.cluster.min_workers for stage in stages)
    if on_ray and shm.exists() and (size := shutil.disk_usage(shm).total) < _LITTLE_SHM:
        text = (
            f"/dev/shm has {size / 2**20:.0f} MiB: Ray then keeps its objects on disk, and NCCL "
            "may fail; start the container with --shm-size=8g"
        )
        found.append(Finding("warning", "machine", text))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for stage in stages:
        height, width = as_size(stage.data.train.crop)
        # Of image and mask, for the batches that are in the works and the one in training.
        batches = stage.global_batch * height * width * 4 * (stage.data.prefetch + 2)
        if batches > memory / 2:
            text = (
                f"data.prefetch: {stage.data.prefetch} batches take {batches / 2**30:.1f} GiB, "
                f"this machine has {memory / 2**30:.1f}; lower data.prefetch or global_batch"
            )
            found.append(Finding("warning", stage.name, text))
    return found
