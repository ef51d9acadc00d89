"""Writes the shards of a split in parallel processes, each with a part file to resume from."""

import io
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path

import cv2
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.formats.sample import Item, Sample
from data_pipeline.manifest import Shard
from data_pipeline.shards import write_shard
from data_pipeline.storage import Storage, open_storage

PARTS = ".parts"
_KEY = b"atrous.part"
_CONNECTIONS = 16


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to write; `digest` stands for all its inputs."""

    place: str  # of the split
    name: str
    digest: str
    items: Sequence[Item]
    load: Callable[[Item], Sample]
    fetch: Callable[[Sequence[Item]], Sequence[Item]] | None
    reuse_broken: bool  # whether a shard that lacks broken inputs counts as finished


@dataclass(frozen=True, kw_only=True)
class Part:
    """One written shard and the inputs left out of it, each {"key", "reason"}."""

    shard: Shard
    skipped: Sequence[dict[str, str]]


def run_tasks(tasks: Sequence[ShardTask], workers: int) -> Iterator[Part]:
    """Do `tasks`, those already done first, in no particular order."""
    todo = []
    storage = open_storage(tasks[0].place)
    with ThreadPoolExecutor(_CONNECTIONS) as threads:
        parts = threads.map(lambda task: _read_part(storage, task), tasks)
        for task, part in zip(tasks, parts, strict=True):
            if part is None:
                todo.append(task)
            else:
                yield part
    if workers == 1 or len(todo) <= 1:
        yield from map(write_part, todo)
        return
    # Not fork: the caller may hold threads, and locks of theirs would be copied locked.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(todo)), mp_context=context, initializer=_start_worker
    ) as pool:
        try:
            for future in as_completed([pool.submit(write_part, task) for task in todo]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def write_part(task: ShardTask) -> Part:
    """Write one shard, then the part file that says it is finished."""
    skipped: list[dict[str, str]] = []
    storage = open_storage(task.place)
    shard, rows = write_shard(storage, task.name, _samples(task, skipped))
    header = {"digest": task.digest, "shard": asdict(shard), "skipped": skipped}
    table = rows.replace_schema_metadata({_KEY: json.dumps(header).encode()})
    with storage.writing(part_name(task.name)) as file:
        pq.write_table(table, file)
    return Part(shard=shard, skipped=skipped)


def read_rows(storage: Storage, shard: Shard) -> pa.Table:
    """The manifest rows of a finished shard."""
    part = io.BytesIO(storage.read_whole(part_name(shard.name)))
    return pq.ParquetFile(part).read().replace_schema_metadata(None)


def _samples(task: ShardTask, skipped: list[dict[str, str]]) -> Iterator[Sample]:
    for item in task.fetch(task.items) if task.fetch else task.items:
        try:
            yield task.load(item)
        except DataError as error:
            skipped.append({"key": item.key, "reason": str(error)})


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
