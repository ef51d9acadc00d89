"""One prepared split: from the number of a sample to its bytes, checked."""

import json
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from data_pipeline.config import Cache
from data_pipeline.errors import DataError
from data_pipeline.manifest import FILE_NAME, Manifest, RowReader, read_manifest
from data_pipeline.node_cache import NodeCache, open_cache
from data_pipeline.plan import SampleIndex
from data_pipeline.storage import LoadingCache, LocalStorage, Place, join, open_storage

_NUMBERS = (
    "offset",
    "size",
    "crc32",
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
    """A sample as stored: encoded image and label, and the image's size in pixels.

    `place` stands for the content of its image, wherever the shard lies.
    """

    key: str
    place: str
    image: bytes
    label: bytes
    width: int
    height: int


@dataclass(frozen=True)
class _Rows:
    """The rows of one shard; numbers in the order of _NUMBERS, keys as Arrow's compact strings."""

    shard: str  # its digest
    keys: pa.ChunkedArray
    numbers: NDArray[np.int64]  # (rows, 9)
    labels: pa.ChunkedArray | None = None  # encoded; None: in the shard

    def sample(self, row: int, span: bytes, start: int) -> RawSample:
        """Cut the sample of `row` out of `span`, bytes of the shard from `start` on."""
        image, image_size, label, label_size, width, height = self.numbers[row, 3:].tolist()
        return RawSample(
            key=self.keys[row].as_py(),
            place=f"{self.shard} {image} {image_size}",
            image=span[image - start : image - start + image_size],
            label=span[label - start : label - start + label_size]
            if self.labels is None
            else self.labels[row].as_py(),
            width=width,
            height=height,
        )

    def part(self, first: int, stop: int) -> "_Rows":
        """Copies of some rows, which do not keep all of them alive."""

        def copy(column: pa.ChunkedArray) -> pa.ChunkedArray:
            return pa.chunked_array([column.slice(first, stop - first).to_pylist()], column.type)

        labels = None if self.labels is None else copy(self.labels)
        return _Rows(self.shard, copy(self.keys), self.numbers[first:stop].copy(), labels)

    def is_whole(self, row: int, span: bytes, start: int) -> bool:
        """Whether the bytes of the sample of `row` in `span` have its checksum."""
        offset, size, crc32 = self.numbers[row, :3].tolist()
        part = memoryview(span)[offset - start : offset - start + size]
        return len(part) == size and zlib_ng.crc32(part) == crc32


@dataclass(frozen=True)
class Block:
    """Neighbouring samples of a shard, `first` and the next ones, as they were read."""

    dataset: "Dataset"
    shard: int
    first: int
    rows: _Rows
    span: bytes
    start: int  # offset of `span` in the shard

    def sample(self, row: int) -> RawSample:
        """The sample in `row` of the shard, read once more where its checksum differs.

        Raises:
            DataError: it still differs.
        """
        local = row - self.first
        if self.rows.is_whole(local, self.span, self.start):
            return self.rows.sample(local, self.span, self.start)
        offset, size = self.rows.numbers[local, :2].tolist()
        span = self.dataset.read_again(self.shard, self.start, len(self.span), offset, size)
        if not self.rows.is_whole(local, span, offset):
            manifest = self.dataset.manifest
            name = join(manifest.shard_storage.place, manifest.shards[self.shard].name)
            cure = (
                "copy the shard again or prepare the data set again"
                if manifest.shards_at is None
                else "it has changed since it was indexed: index it again (atrous data index)"
            )
            raise DataError(
                f"{name}: sample {self.rows.keys[local].as_py()!r}, bytes {offset} to "
                f"{offset + size}, has another checksum than the manifest says; {cure}"
            )
        return self.rows.sample(local, span, offset)


class Dataset:
    """A prepared split, open for reading; safe to share between threads. See `open_dataset`."""

    def __init__(self, manifest: Manifest, cache: NodeCache | None = None) -> None:
        if manifest.storage is None:
            raise ValueError("this manifest was not read from a file, so it has no samples to read")
        self.manifest = manifest
        for shard in manifest.shards:
            if PurePosixPath(shard.name).is_absolute() or ".." in PurePosixPath(shard.name).parts:
                raise DataError(f"{manifest.place}: shard {shard.name!r} lies outside the data set")
        self._storage = manifest.storage
        self._shards = manifest.shard_storage
        self._cache = cache
        self._reader = RowReader(manifest, self._read_manifest)
        longest = max((shard.num_samples for shard in manifest.shards), default=1)
        self._rows: LoadingCache[int, _Rows] = LoadingCache(
            max(1, _ROWS_CACHED // max(1, longest)), self._load_rows
        )

    @property
    def num_samples(self) -> int:
        """Samples in the split."""
        return self.manifest.num_samples

    @property
    def place(self) -> str:
        """The directory of the split, or s3://bucket/prefix."""
        return self._storage.place

    @property
    def remote(self) -> bool:
        """Whether reading takes network round trips, which are worth doing ahead of time."""
        return self._shards.remote

    @cached_property
    def shard_samples(self) -> tuple[int, ...]:
        """Samples of each shard: what the plan is made from."""
        return tuple(shard.num_samples for shard in self.manifest.shards)

    def locate(self, index: int) -> SampleIndex:
        """Where sample `index` of the split lies, counting through the shards in order."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples} in {self.manifest.place}")
        shard = int(np.searchsorted(self._shard_ends, index, side="right"))
        return SampleIndex(shard, index - int(self._shard_ends[shard]) + self.shard_samples[shard])

    def read(self, shard: int, row: int) -> RawSample:
        """Read one sample, image and label in one go.

        Raises:
            DataError: the shard is missing, shorter than the manifest says, or damaged there.
        """
        rows = self._rows.get(shard)
        span, start = self._read_span(shard, rows, row, row + 1)
        return Block(self, shard, 0, rows, span, start).sample(row)

    def read_block(self, shard: int, first: int, stop: int) -> Block:
        """Read the rows `first` to before `stop` of a shard in one go.

        Raises:
            DataError: the shard is missing or shorter than the manifest says.
        """
        rows = self._rows.get(shard)
        span, start = self._read_span(shard, rows, first, stop)
        return Block(self, shard, first, rows.part(first, stop), span, start)

    def read_again(self, shard: int, start: int, length: int, offset: int, size: int) -> bytes:
        """Read bytes of a shard from the storage, and forget the range that had them cached."""
        if self._cache is not None:
            self._cache.discard(self._cache_key(shard, start, length))
        return self._shards.read(self.manifest.shards[shard].name, offset, size)

    def largest_size(self) -> tuple[int, int]:
        """The greatest height and the greatest width of any image in pixels; (0, 0) if empty."""
        height = width = 0
        for shard in range(len(self.shard_samples)):
            table = self._reader.read(shard, ["height", "width"])
            height = max(height, int(table["height"].to_numpy().max()))
            width = max(width, int(table["width"].to_numpy().max()))
        return height, width

    def num_pixels(self) -> int:
        """Of all images together."""
        total = 0
        for shard in range(len(self.shard_samples)):
            table = self._reader.read(shard, ["height", "width"])
            total += int(table["height"].to_numpy().astype(np.int64) @ table["width"].to_numpy())
        return total

    @cached_property
    def _shard_ends(self) -> NDArray[np.int64]:
        return np.cumsum(np.asarray(self.shard_samples, np.int64))

    def _load_rows(self, shard: int) -> _Rows:
        manifest, labels = self.manifest, None
        in_rows = manifest.shards_at is not None and manifest.task != "segmentation"
        table = self._reader.read(shard, ["key", *_NUMBERS, *(["labels"] if in_rows else [])])
        numbers = np.stack([table[name].to_numpy().astype(np.int64) for name in _NUMBERS], axis=1)
        if in_rows:
            encode = _encode_class if manifest.task == "classification" else _encode_classes
            labels = pa.chunked_array([[encode(ids) for ids in table["labels"].to_pylist()]])
        return _Rows(manifest.shards[shard].sha256, table["key"], numbers, labels)

    def _read_manifest(self, offset: int, size: int, again: bool) -> bytes:
        read = partial(self._storage.read, FILE_NAME, offset, size)
        if self._cache is None:
            return read()
        key = f"{self.manifest.digest} {offset} {size}"
        if again:
            self._cache.discard(key)
        return self._cache.get(key, read, lambda _: True)

    def _read_span(self, shard: int, rows: _Rows, first: int, stop: int) -> tuple[bytes, int]:
        """The bytes of the rows `first` to before `stop`, and their offset in the shard."""
        start = int(rows.numbers[first, 0])
        size = int(rows.numbers[stop - 1, :2].sum()) - start
        read = partial(self._shards.read, self.manifest.shards[shard].name, start, size)
        if self._cache is None:
            return read(), start

        def verify(span: bytes) -> bool:
            return all(rows.is_whole(row, span, start) for row in range(first, stop))

        return self._cache.get(self._cache_key(shard, start, size), read, verify), start

    def _cache_key(self, shard: int, offset: int, size: int) -> str:
        # By content: data sets prepared twice share entries, one prepared anew has others.
        return f"{self.manifest.shards[shard].sha256} {offset} {size}"


def open_dataset(
    root: Place, name: str, split: str, cache: Cache | Literal[False] | None = False
) -> Dataset:
    """Open the prepared split at root/name/split, a local directory or s3://bucket/prefix.

    `cache` as in a job file; None: where reading takes network round trips.

    Raises:
        DataError: it is not there (the message lists what is), or not a data set of this version.
    """
    place = join(root, name, split)
    storage = open_storage(place)
    if storage.size(FILE_NAME) is None:
        # Listing a bucket may take minutes.
        if not storage.remote and any(name.endswith(".tar") for name in storage.names("")):
            raise DataError(
                f"{place}: shards without a manifest. Index them once, where they are: "
                f"`atrous data index {place} {join(root, name)} --split {split} --task ... "
                "--classes ...`; or copy the manifest that was written with them"
            )
        raise DataError(
            f"{place}: no prepared data set{_listing(root, f'{name}/{split}')}. Prepare it with "
            "`atrous data prepare` (of WebDataset shards: `atrous data index`) or correct dataset, "
            "split or data root"
        )
    manifest = read_manifest(place)
    if cache is False or (cache is None and not manifest.shard_storage.remote):
        return Dataset(manifest)
    return Dataset(manifest, node_cache(cache))


def node_cache(cache: Cache | None) -> NodeCache | None:
    """The node's cache as a job file describes it; None, with a warning, if it is refused."""
    directory = cache.directory if cache else None
    return open_cache(Path(directory) if directory else None, cache.size if cache else None)


def _encode_class(ids: list[int]) -> bytes:
    return str(ids[0]).encode("ascii")


def _encode_classes(ids: list[int]) -> bytes:
    return json.dumps(ids).encode("ascii")


def _listing(root: Place, wanted: str) -> str:
    storage = open_storage(root)
    if not isinstance(storage, LocalStorage):
        return ""  # listing a bucket may take minutes
    found = sorted(path.parent for path in storage.root.glob(f"*/*/{FILE_NAME}"))
    names = [f"{path.parent.name}/{path.name}" for path in found]
    near = get_close_matches(wanted, names, 1, cutoff=0.7)
    return (
        f"; did you mean {near[0]}?" if near else f"; {root} holds {', '.join(names) or 'nothing'}"
    )
