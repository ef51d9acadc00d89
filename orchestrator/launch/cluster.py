"""The Ray cluster a job runs on: the one it was submitted to, or one of its own on this machine."""

import logging
import os
import re
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from orchestrator.errors import RunError
from orchestrator.job.sections import Cluster
from orchestrator.runs.server import first_line

_TIMEOUT = 20.0  # seconds


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
        kinds = (("CPU", self.cpus), ("GPU", self.gpus))
        parts = [f"{there:g} {kind}{'s' * (there != 1)}" for kind, there in kinds if there]
        return " and ".join(parts) or "nothing"


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


def connect(address: str | None = None, hang_after: float | None = None) -> Connection:
    """Connect to the cluster at `address` or in RAY_ADDRESS (set in every Ray job), else start one.

    Our own cluster runs without a token: with one, Ray would leave a token file in the home
    directory that changes how every later `ray start` and `ray job submit` behaves.

    Ray Train waits `hang_after` seconds and a minute for workers that do not answer it, and 10
    seconds, not 60, for room that a lost node no longer has before it counts the nodes again.

    Raises:
        RunError: there is none at the address.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    ours = not address
    if ours:
        os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    if hang_after is not None:  # workers watch themselves and write stacks first
        os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(hang_after + 60))
    import ray

    if not ray.is_initialized():
        if ours:
            _start_ray()
        else:
            try:
                _check_answers(str(address))
                with _keeping_sigterm():
                    ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
            except OSError as error:  # ConnectionError is one
                raise RunError(
                    f"no Ray cluster answers at {address} ({error}); start it (ray start --head), "
                    "or correct --address or RAY_ADDRESS"
                ) from None
    return Connection(ours=ours)


def _start_ray() -> None:
    """A cluster of this machine alone, for this process.

    Raises:
        RunError: its parts did not come up within the seconds that Ray gives them.
    """
    import ray

    # Ray 2.60 gives bash the unquoted path of Python: /my projects/.venv/bin/python fails.
    quoted = shlex.quote(sys.executable)
    try:
        with _keeping_sigterm():
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                runtime_env={"py_executable": quoted} if quoted != sys.executable else None,
            )
    except Exception as error:  # of no type of its own
        raise RunError(
            f"Ray did not start on this machine ({first_line(error)}); give the same "
            "command again when the machine is less busy, or look into Ray's logs, "
            "/tmp/ray/session_latest/logs"
        ) from error


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Keep the handler that a command set for SIGTERM; `ray.init` puts its own in its place."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _check_answers(address: str) -> None:
    """Fail at once where nothing listens at [ray://]HOST:PORT; Ray would try for many minutes."""
    if match := re.fullmatch(r"(?:ray://)?([^/]+):(\d+)", address):
        socket.create_connection((match[1].strip("[]"), int(match[2])), _TIMEOUT).close()
