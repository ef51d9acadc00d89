"""The Ray cluster a job runs on: the one it was submitted to, or one of its own on this machine."""

import logging
import os
import shlex
import sys
from dataclasses import dataclass

from orchestrator.errors import RunError
from orchestrator.sections import Cluster


@dataclass(frozen=True, kw_only=True)
class Resources:
    """CPUs and GPUs."""

    cpus: float
    gpus: float

    def __sub__(self, other: "Resources") -> "Resources":
        return Resources(cpus=self.cpus - other.cpus, gpus=self.gpus - other.gpus)

    def covers(self, other: "Resources") -> bool:
        """Whether `other` fits in."""
        return self.cpus >= other.cpus and self.gpus >= other.gpus

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPUs" if self.gpus else ""
        return f"{self.cpus:g} CPUs{gpus}"


def needed(cluster: Cluster) -> Resources:
    """The least a stage starts with."""
    workers = cluster.min_workers
    return Resources(cpus=workers * cluster.cpus_per_worker, gpus=workers * cluster.gpus_per_worker)


@dataclass(frozen=True, kw_only=True)
class Connection:
    """A cluster this process is connected to; `ours` ends with this process and cannot grow."""

    ours: bool

    @property
    def total(self) -> Resources:
        """What the cluster has at present, free or not."""
        import ray

        total = ray.cluster_resources()
        return Resources(cpus=total.get("CPU", 0), gpus=total.get("GPU", 0))

    def check_fits(self, stage: str, cluster: Cluster) -> None:
        """Refuse a stage that a cluster of fixed size can never run.

        Raises:
            RunError: names what is missing and the cure.
        """
        need = needed(cluster)
        if self.ours and not self.total.covers(need):
            raise RunError(
                f"{stage}: cluster: {cluster.min_workers} workers need {need}, this machine has "
                f"{self.total}; lower cluster.workers or gpus_per_worker, or submit to a cluster"
            )


def connect() -> Connection:
    """Connect to the cluster in RAY_ADDRESS (set in every Ray job), else start one here.

    Our own cluster runs without a token: with one, Ray would leave a token file in the home
    directory that changes how every later `ray start` and `ray job submit` behaves.
    """
    ours = not os.environ.get("RAY_ADDRESS")
    if ours:
        os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if not ray.is_initialized():
        if ours:
            # Ray 2.60 gives bash the unquoted path of Python: /my projects/.venv/bin/python fails.
            quoted = shlex.quote(sys.executable)
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                runtime_env={"py_executable": quoted} if quoted != sys.executable else None,
            )
        else:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
    return Connection(ours=ours)
