"""A stage's Ray Train trainer, and how its workers learn that they will be taken away."""

import math
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import LoggingConfig

from orchestrator.job.sections import Cluster
from orchestrator.runs.liveness import START, Liveness
from orchestrator.runs.run import Run
from orchestrator.runs.stop import Wish

# The workers' own watch comes first: it writes stacks. Seconds that torch waits longer.
_WATCH_FIRST = 60
_RESERVE = 30.0  # seconds, at most, for the last checkpoint before a node goes
_terminated = threading.Event()


_TorchBackend: Any = TorchConfig().backend_cls


class _Backend(_TorchBackend):  # type: ignore[misc]
    """Ray's way to set torch up; then each worker's main thread listens to SIGTERM."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(_listen)


class _Config(TorchConfig):  # type: ignore[misc]
    @property
    def backend_cls(self) -> type:
        return _Backend


def _listen() -> None:
    """A notice in place of Ray's handler, which ends the process before it can save anything."""
    signal.signal(signal.SIGTERM, lambda *_: _terminated.set())


class Notice:
    """What a worker wishes because its node is drained or preempted, or because of SIGTERM.

    A checkpoint at once, then training as usual until shortly before the node goes: only then does
    Ray Train know how many workers there is room for. After SIGTERM, or where nobody says when
    the node goes, a checkpoint and the end.
    """

    def __init__(self) -> None:
        self._noticed_at: float | None = None

    def __call__(self) -> Wish:
        """The wish by now. Ray's `get_preemption_info` would wait for all workers to ask it;
        here each reads its own notice, and they agree on it with the next step."""
        from ray.train.v2._internal.execution.context import get_train_context

        if _terminated.is_set():
            return Wish.STOP
        context = getattr(get_train_context(), "preemption_context", None)
        info = context.preemption_info if context is not None else None
        if info is None:
            return Wish.NONE
        if not info.deadline_ms:
            return Wish.STOP
        now = time.time()
        self._noticed_at = self._noticed_at or now
        goes_at = info.deadline_ms / 1000
        reserve = min(_RESERVE, (goes_at - self._noticed_at) / 2)
        return Wish.SAVE if now < goes_at - reserve else Wish.STOP


def watch(run: Run, cluster: Cluster) -> Liveness:
    """The watch over this worker of Ray Train."""
    context = ray.train.get_context()
    return Liveness(
        run,
        context.get_world_rank(),
        context.get_world_size(),
        cluster.hang_after,
        Notice() if cluster.max_workers else None,
    )


def make_trainer(
    worker: Callable[[dict[str, Any]], None],
    assignment: Mapping[str, Any],
    cluster: Cluster,
    name: str,
    storage: str,
    callbacks: Sequence[UserCallback] = (),
) -> TorchTrainer:
    """A trainer that runs `worker` on a cluster's workers, and starts lost ones again."""
    workers = cluster.workers
    gpus = {"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}
    return TorchTrainer(
        worker,
        train_loop_config=dict(assignment),
        torch_config=_Config(timeout_s=math.ceil(START * cluster.hang_after) + _WATCH_FIRST),
        scaling_config=ScalingConfig(
            num_workers=workers if isinstance(workers, int) else tuple(workers),
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={"CPU": cluster.cpus_per_worker} | gpus,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=list(callbacks),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
