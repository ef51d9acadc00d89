"""Whether this machine, the cluster, the storage and the tracking server can carry a job."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.config import as_size
from orchestrator.cluster import Resources, connect
from orchestrator.config import StageSettings
from orchestrator.errors import AtrousError
from orchestrator.sections import Cluster
from orchestrator.tracking import tracking_uri

_LITTLE_SHM = 2**30  # bytes
_PROBE_SECONDS = 3.0


@dataclass(frozen=True)
class Finding:
    """What keeps a job from running (error), or may surprise (warning); the text has the cure."""

    level: Literal["error", "warning"]
    where: str
    text: str


def check_cluster(stages: Sequence[StageSettings]) -> tuple[list[Finding], list[str]]:
    """Whether every stage's least workers fit; and the kinds of GPU that there are.

    Looks at the cluster in RAY_ADDRESS, else at this machine, where no Ray is started for it.
    """
    if not os.environ.get("RAY_ADDRESS"):
        nodes, accelerators, grows = [_this_machine()], list[str](), False
        where = "this machine"
    else:
        try:
            nodes, accelerators, grows = _cluster()
        except (AtrousError, ConnectionError, RuntimeError) as error:
            address = os.environ["RAY_ADDRESS"]
            text = f"no Ray cluster at {address} ({error}); correct RAY_ADDRESS or --address"
            return [Finding("error", "cluster", text)], []
        where = "the cluster"
    return list(_fit(stages, nodes, where, grows=grows)), accelerators


def _fit(
    stages: Sequence[StageSettings], nodes: Sequence[Resources], where: str, *, grows: bool
) -> Iterator[Finding]:
    """One finding for all stages that do not fit."""
    lacking = {
        stage.name: (stage.cluster.min_workers, worker_needs(stage.cluster), places)
        for stage in stages
        if (places := sum(_places(node, worker_needs(stage.cluster)) for node in nodes))
        < stage.cluster.min_workers
    }
    if not lacking:
        return
    total = Resources(cpus=sum(n.cpus for n in nodes), gpus=sum(n.gpus for n in nodes))
    wanted = ", ".join(
        f"{name} ({workers} workers of {worker}: room for {places})"
        for name, (workers, worker, places) in lacking.items()
    )
    text = (
        f"{where} has {total} on {len(nodes)} node{'s' * (len(nodes) > 1)}, too little for {wanted}"
    )
    if grows:
        yield Finding("warning", "cluster", f"{text}; it must grow first, which is waited for")
    else:
        cure = "lower cluster.workers, cpus_per_worker or gpus_per_worker, or take a larger cluster"
        yield Finding("error", "cluster", f"{text}; {cure}")


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


def _cluster() -> tuple[list[Resources], list[str], bool]:
    """Nodes, kinds of GPU, and whether an autoscaler is at work."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_get

    connect()
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [Resources(cpus=node.get("CPU", 0), gpus=node.get("GPU", 0)) for node in alive]
    marks = {key.split(":", 1)[1] for node in alive for key in node if "accelerator_type:" in key}
    return nodes, sorted(marks), _internal_kv_get("__autoscaling_status") is not None


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
    """Memory for batches, shared memory for Ray, disk for the cache: of this machine.

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
