"""Writes the shards of a split in parallel, each with a part file to resume from.

In processes of this machine; or whatever else can call functions runs the same tasks anywhere.
"""

import io
import json
import multiprocessing
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import cv2
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.archives import File, file_place
from data_pipeline.errors import DataError, StorageUnavailable
from data_pipeline.formats.sample import Item, Sample
from data_pipeline.in_order import InOrder
from data_pipeline.manifest import Shard
from data_pipeline.raw_files import file_version
from data_pipeline.shards import write_shard
from data_pipeline.storage import Storage, is_local, join, open_storage

PARTS = ".parts"
_KEY = b"atrous.part"
_CONNECTIONS = 16
_READERS = 8  # of a shard's inputs, where they lie in a bucket


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to write; `digest` stands for all its inputs."""

    place: str  # of the split
    name: str
    digest: str
    items: Sequence[Item]
    load: Callable[[Item], Sample]
    fetch: Callable[[Sequence[Item]], Sequence[Item]] | None
    sources: tuple[File, ...]  # files that all items depend on
    reuse_broken: bool  # whether a shard that lacks broken inputs counts as finished


@dataclass(frozen=True, kw_only=True)
class Part:
    """One written shard and the inputs left out of it, each {"key", "reason"}."""

    shard: Shard
    skipped: Sequence[dict[str, str]]


# Does tasks by `write_part` (or `write_part_on_node`), in any order.
Run = Callable[[Sequence[ShardTask]], Iterator[Part]]


def run_tasks(tasks: Sequence[ShardTask], run: Run) -> Iterator[Part]:
    """Do `tasks`, those already done first, in no particular order."""
    storage = open_storage(tasks[0].place)
    # Listed, not asked for one by one: file systems of a network remember for a while that a file
    # was not there. One that the listing lacks is written again, which does no harm.
    listed = set(storage.names(f"{PARTS}/"))
    todo = [task for task in tasks if part_name(task.name) not in listed]
    candidates = [task for task in tasks if part_name(task.name) in listed]
    with ThreadPoolExecutor(_CONNECTIONS) as threads:
        parts = threads.map(partial(_read_part, storage), candidates)
        for task, part in zip(candidates, parts, strict=True):
            if part is None:
                todo.append(task)
            else:
                yield part
    if todo:
        yield from run(todo)


def in_processes(workers: int) -> Run:
    """Do tasks in so many processes of this machine; in this one, where one is enough."""

    def run(tasks: Sequence[ShardTask]) -> Iterator[Part]:
        if workers == 1 or len(tasks) == 1:
            yield from map(write_part, tasks)
            return
        # Not fork: the caller may hold threads, and locks of theirs would be copied locked.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            min(workers, len(tasks)), mp_context=context, initializer=_start_worker
        ) as pool:
            try:
                for future in as_completed([pool.submit(write_part, task) for task in tasks]):
                    yield future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    return run


def write_part(task: ShardTask) -> Part:
    """Write one shard, then the part file that says it is finished.

    Raises:
        DataError: the shard cannot be written, or a store cannot be reached.
    """
    skipped: list[dict[str, str]] = []
    storage = open_storage(task.place)
    try:
        shard, rows = write_shard(storage, task.name, _samples(task, skipped))
        header = {"digest": task.digest, "shard": asdict(shard), "skipped": skipped}
        table = rows.replace_schema_metadata({_KEY: json.dumps(header).encode()})
        with storage.writing(part_name(task.name)) as file:
            pq.write_table(table, file)
    except OSError as error:
        raise DataError(
            f"{join(task.place, task.name)}: cannot be written ({error.strerror or error}); make "
            "room or correct the destination, then start again: it goes on from here"
        ) from error
    return Part(shard=shard, skipped=skipped)


@contextmanager
def marker(place: str) -> Iterator[str]:
    """Name of a file beside the parts, there for as long as other machines work on the split."""
    name = f"{PARTS}/{uuid.uuid4().hex}.marker"
    storage = open_storage(place)
    with storage.writing(name):
        pass
    try:
        yield name
    finally:
        storage.delete(name)


def input_sizes(task: ShardTask) -> list[int | None]:
    """What this machine sees of the inputs on disks: the size of each, None for a missing one."""
    found = (file_version(place) for place in _places(task))
    return [version[0] if version else None for version in found]


def write_part_on_node(task: ShardTask, marker: str, sizes: Sequence[int | None]) -> Part:
    """`write_part` on another machine than the one that found the `marker` and `sizes`.

    Raises:
        DataError: it does not see the same source or destination. Its missing inputs would pass
            for broken ones, its shards be lost on its own disk.
    """
    cure = "prepare from and to paths that all nodes share, or s3://"
    if open_storage(task.place).size(marker) is None:
        raise DataError(f"{task.place}: the destination is another one here; {cure}")
    for place, here, there in zip(_places(task), input_sizes(task), sizes, strict=True):
        if here != there:
            shown = "not there" if here is None else f"{here} bytes"
            raise DataError(f"{place}: {shown}, but {there} bytes for the driver; {cure}")
    return write_part(task)


def _places(task: ShardTask) -> list[str]:
    """The files on disks that a task reads, or may read, itself."""
    files = [*task.sources, *(file for item in task.items for file in item.files)]
    return [place for place in dict.fromkeys(map(file_place, files)) if is_local(place)]


def read_rows(storage: Storage, shard: Shard) -> pa.Table:
    """The manifest rows of a finished shard."""
    part = io.BytesIO(storage.read_whole(part_name(shard.name)))
    return pq.ParquetFile(part).read().replace_schema_metadata(None)


def _samples(task: ShardTask, skipped: list[dict[str, str]]) -> Iterator[Sample]:
    items = task.fetch(task.items) if task.fetch else task.items
    for item, result in zip(items, _load(task, items), strict=True):
        if isinstance(result, Sample):
            yield result
        else:
            skipped.append({"key": item.key, "reason": result})


def _load(task: ShardTask, items: Sequence[Item]) -> Iterator[Sample | str]:
    """The samples of items, or what is wrong with them, in order; from a bucket some at a time."""
    calls: list[Callable[[], Sample | str]]
    calls = [partial(_try_to_load, task.load, item) for item in items]
    files = (file for item in items for file in item.files)
    if all(is_local(file_place(file)) for file in files):
        yield from (call() for call in calls)
    else:
        groups = ((None, [call]) for call in calls)
        yield from (result for _, (result,) in InOrder(groups, _READERS, 2 * _READERS))


def _try_to_load(load: Callable[[Item], Sample], item: Item) -> Sample | str:
    """The sample, or what is wrong with it."""
    try:
        return load(item)
    except StorageUnavailable:
        raise  # no fault of the sample
    except DataError as error:
        return str(error)


def _read_part(storage: Storage, task: ShardTask) -> Part | None:
    """What an earlier run wrote, if it wrote this very shard to the end."""
    name = part_name(task.name)
    if storage.size(name) is None:
        return None
    try:
        part = io.BytesIO(storage.read_whole(name))
        metadata = pq.read_metadata(part).metadata or {}
    except pa.ArrowInvalid:
        return None  # cut short by a power loss
    size = storage.size(task.name)
    header = json.loads(metadata.get(_KEY, b"{}"))
    if header.get("digest") != task.digest or header["shard"]["size"] != size:
        return None
    if header["skipped"] and not task.reuse_broken:
        return None
    return Part(shard=Shard(**header["shard"]), skipped=header["skipped"])


def part_name(shard: str) -> str:
    """Name of the part file of a shard."""
    return f"{PARTS}/{Path(shard).stem}.parquet"


def _start_worker() -> None:
    """Leave the cores to the other workers, and end with the parent even if that is killed."""
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
