"""Whether this machine, the cluster, the storage and the tracking server can carry a job."""

import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.config import as_size
from data_pipeline.storage import is_local
from orchestrator.bucket import BucketPath
from orchestrator.errors import RunError
from orchestrator.job.config import StageSettings
from orchestrator.job.sections import Cluster
from orchestrator.launch.cluster import Resources, connect
from orchestrator.runs.server import tracking_uri

_LITTLE_SHM = 2**30  # bytes
_PROBE_SECONDS = 3.0
_HASTE = 5.0  # seconds in which a store should answer
_NOTHING = "manifest.json"  # whether it is there makes no difference
_TRACKED_BY = ("http", "https", "file", "sqlite", "postgresql", "mysql", "mssql", "databricks")
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
    lacking: dict[str, list[str]] = {}
    for stage in stages:
        worker = worker_needs(stage.cluster)
        workers = stage.cluster.min_workers or int(worker.gpus > 0)  # 0: of this process a GPU
        places = sum(_places(node, worker) for node in room.nodes)
        if places < workers:
            what = f"{workers} worker{'s' * (workers > 1)} of {worker} (room for {places})"
            lacking.setdefault(what, []).append(stage.name)
    if not lacking:
        return []
    total = Resources(cpus=sum(n.cpus for n in room.nodes), gpus=sum(n.gpus for n in room.nodes))
    wanted = "; ".join(
        f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}"
        for what, names in lacking.items()
    )
    nodes = f"{len(room.nodes)} node{'s' * (len(room.nodes) != 1)}"
    text = f"{room.where} has {total} on {nodes}, too little for {wanted}"
    if room.grows:
        return [Finding("warning", "cluster", f"{text}; it must grow first, which is waited for")]
    cure = "lower cluster.workers, cpus_per_worker or gpus_per_worker, or take a larger cluster"
    if not os.environ.get("RAY_ADDRESS"):
        cure += " (atrous plan --address looks at another)"
    return [Finding("error", "cluster", f"{text}; {cure}")]


def worker_needs(cluster: Cluster) -> Resources:
    """What one worker takes; the process itself is given no CPUs."""
    if not cluster.max_workers:
        return Resources(cpus=0, gpus=cluster.gpus_per_worker)
    return Resources(cpus=cluster.cpus_per_worker, gpus=cluster.gpus_per_worker)


def _places(node: Resources, worker: Resources) -> int:
    """Workers that fit on a node."""
    shares = [(node.cpus, worker.cpus), (node.gpus, worker.gpus)]
    return min((int(there // taken) for there, taken in shares if taken), default=1)


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


def wait_for_no_hub() -> None:
    """Where the hub of timm's weights cannot be reached, look into its cache alone, and at once.

    Its client would try again for a minute and a half.
    """
    from urllib.error import HTTPError, URLError
    from urllib.request import urlopen

    from huggingface_hub import constants

    try:
        urlopen(constants.ENDPOINT, timeout=_PROBE_SECONDS).close()
    except HTTPError:  # somebody answers
        return
    except (URLError, OSError, ValueError):
        constants.HF_HUB_OFFLINE = True


def check_storage(storage: Path, room: int) -> list[Finding]:
    """Whether checkpoints can be written there: rename, lock, force to disk; and `room` bytes.

    In a bucket: conditional PUT, list, delete; how much room there is, it does not say.
    """
    if isinstance(storage, BucketPath):
        return _check_bucket(storage)
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


def check_answers(place: str) -> None:
    """Ask the store of a place once: those who read there would wait for it, minutes each.

    Raises:
        DataError: it is away, or refuses.
    """
    if not is_local(place):
        from data_pipeline.object_store import ObjectStore

        ObjectStore(place.partition("://")[2], patience=_HASTE).size(_NOTHING)


def _check_bucket(storage: BucketPath) -> list[Finding]:
    probe = storage / f"probe-{uuid.uuid4().hex}"
    try:
        decides = bool(probe.write_if(b"1", None)) and not probe.write_if(b"2", None)
        decides &= not probe.write_if(b"3", '"another"') and probe.read_bytes() == b"1"
        found = probe in storage.iterdir()
        probe.unlink()
    except OSError as error:
        text = f"{storage} cannot be written to ({error}); correct storage:, or what it says"
        return [Finding("error", "storage", text)]
    if not (decides and found):
        text = (
            f"{storage}: the store does not honour conditional PUT (If-None-Match, If-Match), or "
            "does not list what was put: nothing would keep two commands from writing one run; "
            "take another store or a newer version, or a directory"
        )
        return [Finding("error", "storage", text)]
    return []


def check_tracking(storage: Path) -> list[Finding]:
    """Whether an MLflow server answers, or could; without one metrics wait in the storage."""
    from urllib.error import HTTPError, URLError
    from urllib.request import urlopen

    uri = tracking_uri(storage)
    scheme, separator, _ = uri.partition("://")
    if separator and scheme.partition("+")[0] not in _TRACKED_BY:
        text = (
            f"MLFLOW_TRACKING_URI: {scheme}:// is nothing that MLflow writes to; give http://HOST, "
            "or a database such as postgresql+psycopg2://HOST/NAME"
        )
        return [Finding("error", "tracking", text)]
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
