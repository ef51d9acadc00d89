"""The data plan: which sample lies at which step and slot. Pure arithmetic, no state, no files.

Blocks are permuted per epoch, the permuted sequence of samples is cut into one contiguous part per
slot, and the order inside a block is permuted too. So the position of a run is one integer, the
step, and the sequence of global batches is the same for every number of ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

_Word = TypeVar("_Word", int, NDArray[Any])  # an array of uint64

_MASK = (1 << 64) - 1
_CHUNK = 1 << 16  # words hashed at once: half a megabyte stays in the processor's cache
_BLOCK_ORDER, _ROW_ORDER, _SAMPLE = 1, 2, 3  # what a hash is for: keeps the three uses independent


class SampleIndex(NamedTuple):
    """Where a sample lies: shard number, and row of that shard."""

    shard: int
    row: int


@dataclass(frozen=True)
class _EpochOrder:
    """The blocks of one epoch: ascending by the hash of their number.

    `_mix` is a bijection, so the sorted hashes tell the numbers. Blocks are whole but for the last
    ones of shards: the order is made of runs of whole blocks, each but the last followed by a short
    one, and a run is where the next one begins.
    """

    hashes: NDArray[np.uint64]
    key: np.uint64
    starts: NDArray[np.int64]  # of each run: samples before it
    places: NDArray[np.int64]  # of each run: blocks before it

    def find(self, positions: NDArray[Any], block_size: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The blocks that hold `positions` of the sequence of samples, and where in them."""
        runs = np.searchsorted(self.starts, positions, side="right") - 1
        blocks, offsets = np.divmod(positions - self.starts[runs], block_size)
        words = _unmix(self.hashes[self.places[runs] + blocks]) ^ self.key
        return words.astype(np.int64), offsets


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The order of training samples, a pure function of its fields.

    `shard_samples` holds the number of samples of each shard; a block is a run of up to
    `block_size` neighbouring samples of one shard. Steps count over epochs: step t lies in epoch
    t // steps_per_epoch.

    Raises:
        ValueError: fewer samples than `global_batch`, or a size below one.
    """

    shard_samples: Sequence[int]
    block_size: int
    seed: int
    global_batch: int

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.global_batch < 1:
            raise ValueError(
                f"block_size {self.block_size} and global_batch {self.global_batch}: "
                "both must be at least 1"
            )
        if self.num_samples < self.global_batch:
            raise ValueError(
                f"{self.num_samples} samples do not fill a global batch of {self.global_batch}; "
                f"lower global_batch to at most {self.num_samples} or add samples"
            )

    @cached_property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return int(self._samples.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch; which samples are left over differs between epochs."""
        return self.num_samples // self.global_batch

    def sample(self, step: int, slot: int) -> SampleIndex:
        """The sample that `slot` of the global batch reads at `step`."""
        return self.samples(step, range(slot, slot + 1))[0]

    def samples(self, step: int, slots: range) -> list[SampleIndex]:
        """The samples that `slots` of the global batch read at `step`, in slot order.

        Raises:
            ValueError: a negative step, or a slot outside the global batch.
        """
        if step < 0 or any(slot not in range(self.global_batch) for slot in slots):
            raise ValueError(f"step {step}, {slots}: outside a global batch of {self.global_batch}")
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order = self._order_of_epoch(epoch)
        positions = np.array(slots, np.int64) * self.steps_per_epoch + step_in_epoch
        blocks, offsets = order.find(positions, self.block_size)
        lengths = self._lengths(blocks)
        if self.block_size > 1:
            for i in range(len(slots)):
                offsets[i] = self._row_order(epoch, int(blocks[i]), int(lengths[i]))[offsets[i]]
        shards = self._shards(blocks)
        rows = (blocks - self._first_blocks[shards]) * self.block_size + offsets
        return list(map(SampleIndex, shards.tolist(), rows.tolist()))

    @cached_property
    def _samples(self) -> NDArray[np.int64]:
        return np.asarray(self.shard_samples, np.int64)

    @cached_property
    def _first_blocks(self) -> NDArray[np.int64]:
        """Number of the first block of each shard, then the number of all blocks."""
        return np.concatenate(([0], np.cumsum(-(-self._samples // self.block_size))))

    def _shards(self, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._first_blocks, blocks, side="right") - 1

    def _lengths(self, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Samples in each of `blocks`: `block_size`, or what the end of the shard leaves."""
        shards = self._shards(blocks)
        starts = (blocks - self._first_blocks[shards]) * self.block_size
        return np.minimum(self.block_size, self._samples[shards] - starts)

    @cached_property
    def _order_of_epoch(self) -> Callable[[int], _EpochOrder]:
        # One epoch only: steps go forward, and with millions of blocks this is the one big object.
        return lru_cache(maxsize=1)(self._permute_blocks)

    def _permute_blocks(self, epoch: int) -> _EpochOrder:
        key = np.uint64(hash_words(_BLOCK_ORDER, self.seed, epoch))
        hashes = _sorted_hashes(int(self._first_blocks[-1]), key)
        last = self._first_blocks[1:][self._samples > 0] - 1  # block of each shard
        lengths = self._lengths(last)
        short, lengths = last[lengths < self.block_size], lengths[lengths < self.block_size]
        places = np.searchsorted(hashes, _mix(short.astype(np.uint64) ^ key))
        order = np.argsort(places)
        ends = (places[order] + 1) * self.block_size - np.cumsum(self.block_size - lengths[order])
        return _EpochOrder(
            hashes=hashes,
            key=key,
            starts=np.concatenate(([0], ends)),
            places=np.concatenate(([0], places[order] + 1)),
        )

    def _row_order(self, epoch: int, block: int, length: int) -> NDArray[np.int64]:
        return _permutation(length, hash_words(_ROW_ORDER, self.seed, epoch, block))


def slots_of_rank(global_batch: int, rank: int, world: int) -> range:
    """The contiguous slots of one rank; ranks differ by at most one slot.

    Raises:
        ValueError: more ranks than slots, so some rank would have nothing to train on.
    """
    if world > global_batch:
        raise ValueError(
            f"{world} workers cannot share a global batch of {global_batch}; "
            f"use at most {global_batch} workers or raise global_batch"
        )
    return _part(global_batch, rank, world)


def eval_indices(num_samples: int, rank: int, world: int) -> range:
    """The contiguous samples one rank evaluates; over all ranks each sample exactly once."""
    return _part(num_samples, rank, world)


def sample_seed(seed: int, epoch: int, shard: int, row: int) -> int:
    """The 64-bit seed of a sample's augmentation: by what the sample is, not by who loads it."""
    return hash_words(_SAMPLE, seed, epoch, shard, row)


def hash_words(*words: int) -> int:
    """Hash integers into 64 bits, the same on every machine and in every release."""
    state = 0
    for word in words:
        state = _mix(state ^ (word & _MASK))
    return state


def _part(total: int, rank: int, world: int) -> range:
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is outside a world of {world}")
    return range(total * rank // world, total * (rank + 1) // world)


def _permutation(length: int, key: int) -> NDArray[np.int64]:
    """A permutation of range(length) drawn by `key`.

    Not numpy's Generator, whose streams may change between releases: a sort of own hashes does not.
    """
    counters = np.arange(length, dtype=np.uint64)
    return np.argsort(_mix(counters ^ np.uint64(key)), kind="stable")


def _sorted_hashes(length: int, key: np.uint64) -> NDArray[np.uint64]:
    """The hashes of range(length) in the order of `_permutation`, sorted in place."""
    hashes = np.empty(length, np.uint64)
    for start in range(0, length, _CHUNK):
        stop = min(start + _CHUNK, length)
        hashes[start:stop] = _mix(np.arange(start, stop, dtype=np.uint64) ^ key)
    hashes.sort()
    return hashes


def _mix(word: _Word) -> _Word:
    """One step of splitmix64 (Steele, Lea, Flood 2014): a bijection that scatters 64-bit words."""
    word = (word + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def _unmix(words: NDArray[Any]) -> NDArray[Any]:
    """What `_mix` was given."""
    words = words ^ (words >> 31) ^ (words >> 62)
    words = words * np.uint64(pow(0x94D049BB133111EB, -1, 1 << 64))
    words = words ^ (words >> 27) ^ (words >> 54)
    words = words * np.uint64(pow(0xBF58476D1CE4E5B9, -1, 1 << 64))
    words = words ^ (words >> 30) ^ (words >> 60)
    return words - np.uint64(0x9E3779B97F4A7C15)
