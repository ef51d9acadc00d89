"""Samples by whole blocks, those of a remote data set read before they are needed."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from data_pipeline.dataset import Block, Dataset, RawSample
from data_pipeline.plan import SampleIndex
from data_pipeline.storage import LoadingCache

_AHEAD_BYTES = 256 << 20  # of blocks read and not yet used, by a loader
_AHEAD_BLOCKS = 256
_CONNECTIONS = 16

Upcoming = Iterator[tuple[int, SampleIndex]]  # (step, sample) in the order of the steps


class BlockReader:
    """Reads samples through whole blocks: one read of the storage serves a block's samples.

    `num_blocks` blocks are kept; with one for each slot of the rank and a few to spare, no block
    that a slot is still reading drops out. Of a remote data set the blocks of `upcoming` samples
    are read ahead, up to 256 MB of them. Use it in a `with` statement: its threads end there.
    """

    def __init__(
        self,
        dataset: Dataset,
        block_size: int,
        num_blocks: int,
        upcoming: Upcoming | None = None,
    ) -> None:
        self._dataset = dataset
        self._block_size = block_size
        self._blocks: LoadingCache[SampleIndex, Block] = LoadingCache(num_blocks, self._load)
        self._upcoming = upcoming if dataset.remote else None
        self._next: tuple[int, SampleIndex] | None = None
        self._ahead: dict[SampleIndex, Future[Block]] = {}
        self._ahead_limit = _blocks_ahead(dataset, block_size)
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        if self._upcoming is not None:
            self._pool = ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="atrous-read-ahead")

    def read(self, shard: int, row: int) -> RawSample:
        """Read one sample.

        Raises:
            DataError: the shard is missing, shorter than the manifest says, or damaged there.
        """
        if self._block_size == 1 and self._pool is None:
            return self._dataset.read(shard, row)
        key = self._key(SampleIndex(shard, row))
        block = self._blocks.get(key)
        if self._ahead:
            with self._lock:
                self._ahead.pop(key, None)
        return block.sample(row)

    def advance(self, step: int) -> None:
        """Read ahead what fits, from the samples of `step` on; called before they are read."""
        if self._pool is None or self._upcoming is None:
            return  # the disk's own read-ahead does
        while len(self._ahead) < self._ahead_limit:
            self._next = self._next or next(self._upcoming, None)
            if self._next is None:
                return
            (needed, sample), self._next = self._next, None
            key = self._key(sample)
            with self._lock:
                if needed >= step and key not in self._ahead and key not in self._blocks:
                    self._ahead[key] = self._pool.submit(self._read_block, key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is not None:
            # At the regular end samples are still being read: what is on its way is needed.
            self._pool.shutdown(wait=False, cancel_futures=kind is not None)

    def _key(self, sample: SampleIndex) -> SampleIndex:
        return SampleIndex(sample.shard, sample.row - sample.row % self._block_size)

    def _load(self, key: SampleIndex) -> Block:
        with self._lock:
            future = self._ahead.pop(key, None)
        return future.result() if future else self._read_block(key)

    def _read_block(self, key: SampleIndex) -> Block:
        stop = min(key.row + self._block_size, self._dataset.shard_samples[key.shard])
        return self._dataset.read_block(key.shard, key.row, stop)


def _blocks_ahead(dataset: Dataset, block_size: int) -> int:
    """How many blocks of usual size fit into the bytes that may be read ahead."""
    size = sum(shard.size for shard in dataset.manifest.shards)
    block = block_size * size / max(1, dataset.num_samples)
    return max(2, min(_AHEAD_BLOCKS, int(_AHEAD_BYTES / max(1.0, block))))
