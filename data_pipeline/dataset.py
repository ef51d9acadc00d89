"""One prepared split: from the number of a sample to its bytes."""

import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.manifest import FILE_NAME, Manifest, read_manifest
from data_pipeline.plan import SampleIndex
from data_pipeline.storage import LoadingCache, Storage, local_path

_NUMBERS = (
    "offset",
    "size",
    "image_offset",
    "image_size",
    "label_offset",
    "label_size",
    "width",
    "height",
)
_ROWS_CACHED = 2_000_000  # about 150 MB of row tables; all of ImageNet


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """A sample as stored: encoded image and label, and the image's size in pixels."""

    key: str
    image: bytes
    label: bytes
    width: int
    height: int


@dataclass(frozen=True)
class _Rows:
    """The rows of one shard; numbers in the order of _NUMBERS, keys as Arrow's compact strings."""

    keys: pa.ChunkedArray
    numbers: NDArray[np.int64]  # (rows, 8)

    def sample(self, row: int, span: bytes, start: int) -> RawSample:
        """Cut the sample of `row` out of `span`, bytes of the shard from `start` on."""
        _, _, image, image_size, label, label_size, width, height = self.numbers[row].tolist()
        return RawSample(
            key=self.keys[row].as_py(),
            image=span[image - start : image - start + image_size],
            label=span[label - start : label - start + label_size],
            width=width,
            height=height,
        )


class Dataset:
    """A prepared split, open for reading; safe to share between threads. See `open_dataset`."""

    def __init__(self, manifest: Manifest) -> None:
        if manifest.path is None:
            raise ValueError("this manifest was not read from a file, so it has no samples to read")
        self.manifest = manifest
        for shard in manifest.shards:
            if PurePosixPath(shard.name).is_absolute() or ".." in PurePosixPath(shard.name).parts:
                raise DataError(f"{manifest.path}: shard {shard.name!r} lies outside the data set")
        self._storage = Storage(manifest.path.parent)
        self._lock = threading.Lock()
        longest = max((shard.num_samples for shard in manifest.shards), default=1)
        self._rows: LoadingCache[int, _Rows] = LoadingCache(
            max(1, _ROWS_CACHED // max(1, longest)), self._load_rows
        )

    @property
    def num_samples(self) -> int:
        """Samples in the split."""
        return self.manifest.num_samples

    @cached_property
    def shard_samples(self) -> tuple[int, ...]:
        """Samples of each shard: what the plan is made from."""
        return tuple(shard.num_samples for shard in self.manifest.shards)

    def locate(self, index: int) -> SampleIndex:
        """Where sample `index` of the split lies, counting through the shards in order."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples} in {self.manifest.path}")
        shard = int(np.searchsorted(self._shard_ends, index, side="right"))
        return SampleIndex(shard, index - int(self._shard_ends[shard]) + self.shard_samples[shard])

    def read(self, shard: int, row: int) -> RawSample:
        """Read one sample, image and label in one go.

        Raises:
            DataError: the shard is missing or shorter than the manifest says.
        """
        rows = self._rows.get(shard)
        offset, size = rows.numbers[row, :2].tolist()
        span = self._storage.read(self.manifest.shards[shard].name, offset, size)
        return rows.sample(row, span, offset)

    def largest_size(self) -> tuple[int, int]:
        """The greatest height and the greatest width of any image in pixels; (0, 0) if empty."""
        height = width = 0
        for shard in range(len(self.shard_samples)):
            table = self._read_row_group(shard, ["height", "width"])
            height = max(height, int(table["height"].to_numpy().max()))
            width = max(width, int(table["width"].to_numpy().max()))
        return height, width

    @cached_property
    def _shard_ends(self) -> NDArray[np.int64]:
        return np.cumsum(np.asarray(self.shard_samples, np.int64))

    @cached_property
    def _parquet(self) -> Any:
        # Kept open: with thousands of row groups the footer alone takes long to parse.
        return pq.ParquetFile(self.manifest.path)

    def _read_row_group(self, shard: int, columns: list[str]) -> pa.Table:
        with self._lock:  # a ParquetFile is no promise of thread safety
            return self._parquet.read_row_group(shard, columns=columns, use_threads=False)

    def _load_rows(self, shard: int) -> _Rows:
        table = self._read_row_group(shard, ["key", *_NUMBERS])
        numbers = np.stack([table[name].to_numpy().astype(np.int64) for name in _NUMBERS], axis=1)
        return _Rows(table["key"], numbers)

    def _load_block(self, shard: int, first: int, stop: int) -> "_Block":
        rows = self._rows.get(shard)
        # Copies, so that a block does not keep the rows of its whole shard alive.
        numbers = rows.numbers[first:stop].copy()
        keys = pa.chunked_array([rows.keys.slice(first, stop - first).to_pylist()])
        start, end = int(numbers[0, 0]), int(numbers[-1, :2].sum())
        span = self._storage.read(self.manifest.shards[shard].name, start, end - start)
        return _Block(first, _Rows(keys, numbers), span, start)


@dataclass(frozen=True)
class _Block:
    """The bytes of neighbouring samples and their rows."""

    first: int
    rows: _Rows
    span: bytes
    start: int


class BlockReader:
    """Reads samples through whole blocks: one read of the storage serves a block's samples.

    `num_blocks` blocks are kept; with one for each slot of the rank and a few to spare, no block
    that a slot is still reading drops out.
    """

    def __init__(self, dataset: Dataset, block_size: int, num_blocks: int) -> None:
        self._dataset = dataset
        self._block_size = block_size
        self._blocks: LoadingCache[SampleIndex, _Block] = LoadingCache(num_blocks, self._load)

    def read(self, shard: int, row: int) -> RawSample:
        """Read one sample.

        Raises:
            DataError: the shard is missing or shorter than the manifest says.
        """
        block = self._blocks.get(SampleIndex(shard, row - row % self._block_size))
        return block.rows.sample(row - block.first, block.span, block.start)

    def _load(self, index: SampleIndex) -> _Block:
        stop = min(index.row + self._block_size, self._dataset.shard_samples[index.shard])
        return self._dataset._load_block(index.shard, index.row, stop)


def open_dataset(root: Path, name: str, split: str) -> Dataset:
    """Open the prepared split at root/name/split.

    Raises:
        DataError: it is not there (the message lists what is), or not a data set of this version.
    """
    directory = local_path(root) / name / split
    if not (directory / FILE_NAME).is_file():
        found = sorted(path.parent for path in local_path(root).glob(f"*/*/{FILE_NAME}"))
        names = ", ".join(f"{path.parent.name}/{path.name}" for path in found) or "nothing"
        raise DataError(
            f"{directory}: no prepared data set; {root} holds {names}. "
            "Prepare it with `atrous data prepare` or correct dataset, split or data root"
        )
    return Dataset(read_manifest(directory))
