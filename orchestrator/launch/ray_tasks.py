"""Preparation of data sets as tasks of a Ray cluster: a shard each, on whatever node has room."""

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.parts import Part, Run, ShardTask, input_sizes, marker, write_part_on_node
from orchestrator.errors import RunError
from orchestrator.launch import cluster

_AHEAD = 2  # tasks per CPU that are handed over; the arguments of the others stay here
_RETRIES = 10  # after a lost node or worker
_PATIENCE = 60.0  # seconds

log = logging.getLogger(__name__)


def on_cluster(address: str | None = None, limit: int | None = None) -> Run | None:
    """Runs tasks on the cluster at `address` or in RAY_ADDRESS; None where there is neither.

    At most `limit` run at the same time. It is connected to when there is something to do.
    """
    if not (address or os.environ.get("RAY_ADDRESS")):
        return None
    return partial(_run, address, limit)


def _run(address: str | None, limit: int | None, tasks: Sequence[ShardTask]) -> Iterator[Part]:
    cluster.connect(address)
    import ray

    write = ray.remote(_write).options(name="prepare", num_cpus=1, max_retries=_RETRIES)
    waiting, running = iter(tasks), dict[Any, str]()
    with marker(tasks[0].place) as mark:
        try:
            while True:
                for task in islice(waiting, max(0, _room(limit) - len(running))):
                    running[write.remote(task, mark, input_sizes(task))] = task.name
                if not running:
                    return
                for reference in _wait(list(running)):
                    yield _result(reference, running.pop(reference))
        finally:
            for reference in running:
                ray.cancel(reference)


def _wait(running: list[Any]) -> list[Any]:
    """One of the tasks that are done, when there is one."""
    import ray

    while not (done := ray.wait(running, timeout=_PATIENCE)[0]):
        if not ray.cluster_resources().get("CPU"):
            log.warning("the cluster has no CPUs; preparation waits for nodes that have some")
    return done


def _room(limit: int | None) -> int:
    """How many tasks the cluster, which may have grown, is to know of."""
    import ray

    room = max(1, int(ray.cluster_resources().get("CPU", 0))) * _AHEAD
    return min(room, limit or room)


def _write(task: ShardTask, mark: str, sizes: Sequence[int | None]) -> Part:
    try:
        return write_part_on_node(task, mark, sizes)
    except DataError as error:
        import ray

        node = f"{socket.gethostname()}, {ray.util.get_node_ip_address()}"
        raise type(error)(f"node {node}: {error}") from None


def _result(reference: Any, name: str) -> Part:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, DataError):
            raise error.cause from None
        reason = str(error.cause).partition("\n")[0]
        if "No module named" in reason:
            raise RunError(
                f"a node of the cluster lacks Atrous ({reason}); install it on all nodes, or send "
                "it along: ray job submit --working-dir . -- python -m orchestrator data ..."
            ) from None
        raise
    except RayError as error:  # its node or worker died, every time
        raise RunError(
            f"{name}: {type(error).__name__} {_RETRIES + 1} times: {str(error).splitlines()[0]}; "
            "start again: it goes on from here"
        ) from error
