"""The manifest: a Parquet file beside the shards that says where every sample lies.

One row group per shard, so a reader takes in what it needs of a data set of any size: the shard
list (from the footer) when it opens, the rows of a shard when it first reads from it. Above 4,096
shards a row group holds several neighbouring ones: every reader has to parse the whole footer.
"""

import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.storage import LocalStorage, Place, Storage, is_local, join, open_storage

FILE_NAME = "manifest.parquet"
FORMAT_VERSION = 2
_KEY = b"atrous"
_MAX_ROW_GROUPS = 4096  # parsed they take 40 MB; 20,000 take 200 MB, in every worker
_TAIL = 1 << 20  # holds most footers: one read

# Every reader parses the whole footer: statistics, dictionaries and a copy of the schema, which
# nobody asks for, would make that of 20,000 shards 2.5 times as long.
_WRITING: dict[str, Any] = {
    "compression": "zstd",
    "write_page_checksum": True,
    "use_dictionary": False,
    "write_statistics": False,
    "store_schema": False,
}

# Offsets are bytes from the start of the shard. A sample's span (offset, size) starts at its first
# tar header and holds every member of it, so neighbouring samples are one contiguous range.
# `crc32` is zlib's checksum of the span: a block is verified sample by sample, whatever its size.
# `labels` are the class ids in the sample, ascending, without the ignore label.
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("crc32", pa.uint32()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("label_offset", pa.int64()),
        ("label_size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("labels", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file of a data set; `name` is relative to the place of the shards."""

    name: str
    size: int
    sha256: str
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared or indexed split consists of.

    Where it was read from, `storage`, and where its shards lie are no part of its identity. They
    lie beside it; those of an index, which others wrote, at `shards_at`: a place, or one relative
    to the manifest. There the class ids of a sample are in its row (`labels`), not in the shard.
    """

    dataset: str
    split: str
    task: str  # classification | multilabel | segmentation
    class_names: tuple[str, ...]
    ignore_label: int | None
    shards: tuple[Shard, ...]
    has_labels: bool = True  # False: pictures only, such as a test split whose labels are secret
    source: dict[str, Any] = field(default_factory=dict)  # raw path, layout, skipped inputs
    shards_at: str | None = field(default=None, compare=False)
    storage: Storage | None = field(default=None, compare=False, repr=False)
    footer: Any = field(default=None, compare=False, repr=False)  # Parquet's, with it

    @property
    def place(self) -> str | None:
        """Path or URI of the file it was read from."""
        return join(self.storage.place, FILE_NAME) if self.storage else None

    @property
    def path(self) -> Path | None:
        """The file it was read from, if that is on this machine."""
        return self.storage.root / FILE_NAME if isinstance(self.storage, LocalStorage) else None

    @cached_property
    def shard_storage(self) -> Storage:
        """Where the shards are."""
        if self.storage is None:
            raise ValueError("this manifest was not read from a file, so it has no shards")
        if self.shards_at is None:
            return self.storage
        place = self.shards_at
        if is_local(place) and not os.path.isabs(place):
            place = join(os.path.normpath(f"{self.storage.place}/{place}"))
        return open_storage(place)

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """sha256 of the content: shard digests, classes, task; equal for equal samples."""
        content = {
            "task": self.task,
            "class_names": self.class_names,
            "ignore_label": self.ignore_label,
            "shards": [(shard.sha256, shard.num_samples) for shard in self.shards],
        }
        if self.shards_at is not None:  # the same shards can be read in several ways
            content["contents"] = self.source["contents"]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def read_rows(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The sample rows of one shard, in tar order."""
        return self._rows.read(shard, columns)

    @cached_property
    def _rows(self) -> "RowReader":
        return RowReader(self)


class RowReader:
    """Reads the rows of a manifest shard by shard, each in one read; safe to share between threads.

    `read_bytes` is given offset and size of what is wanted, and whether an earlier answer was
    damaged (None: the manifest's own storage).
    """

    def __init__(
        self, manifest: Manifest, read_bytes: Callable[[int, int, bool], bytes] | None = None
    ) -> None:
        if manifest.storage is None:
            raise ValueError("this manifest was not read from a file, so it has no rows")
        storage = manifest.storage
        self._place = manifest.place
        self._read_bytes = read_bytes or (
            lambda start, size, again: storage.read(FILE_NAME, start, size)
        )
        self._window = _Window(1 << 62)  # its length does not matter
        self._metadata = manifest.footer
        self._counts = [shard.num_samples for shard in manifest.shards]
        self._together = _shards_per_group(len(manifest.shards))
        # Made once: with thousands of row groups its schema and footer take long to work through.
        self._parquet = pq.ParquetFile(
            self._window, metadata=self._metadata, page_checksum_verification=True
        )
        self._lock = threading.Lock()  # a ParquetFile is no promise of thread safety

    def read(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of one shard.

        Raises:
            DataError: they are damaged.
        """
        try:
            return self._read(shard, columns, again=False)
        except (OSError, pa.ArrowException):  # OSError: Arrow's word for a checksum that differs
            pass
        try:
            return self._read(shard, columns, again=True)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{self._place}: the rows of shard {shard} are damaged ({error}); "
                "copy it again or prepare the data set again"
            ) from None

    def _read(self, shard: int, columns: Sequence[str] | None, *, again: bool) -> pa.Table:
        number, within = divmod(shard, self._together)
        start, size = self._span(number)
        data = self._read_bytes(start, size, again)
        with self._lock:
            self._window.show(start, data)
            table = self._parquet.read_row_group(number, columns=columns, use_threads=False)
        if self._together == 1:
            return table
        first = sum(self._counts[shard - within : shard])
        return table.take(pa.array(range(first, first + self._counts[shard])))  # a copy

    def _span(self, number: int) -> tuple[int, int]:
        group = self._metadata.row_group(number)
        start, stop = 1 << 62, 0
        for column in map(group.column, range(group.num_columns)):
            first = min(column.dictionary_page_offset or 1 << 62, column.data_page_offset)
            start, stop = min(start, first), max(stop, first + column.total_compressed_size)
        return start, stop - start


class _Window(io.RawIOBase):
    """A file of `size` bytes of which one range at a time is there."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.show(0, b"")

    def show(self, start: int, data: bytes) -> None:
        """From now on the file holds `data` from `start` on."""
        self._start, self._data, self._position = start, data, start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._position, self._size)[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        first = self._position - self._start
        data = self._data[first:] if size < 0 else self._data[first : first + size]
        self._position += len(data)
        return data


def write_manifest(place: Place, manifest: Manifest, rows: Iterable[pa.Table]) -> None:
    """Write `manifest` with one table of rows per shard; it appears whole or not at all.

    Raises:
        ValueError: a table's length differs from its shard's `num_samples`.
    """
    content = asdict(replace(manifest, storage=None, footer=None))
    del content["storage"], content["footer"]
    if manifest.shards_at is None:
        del content["shards_at"]
    header = {"version": FORMAT_VERSION, "digest": manifest.digest} | content
    with (
        open_storage(place).writing(FILE_NAME) as file,
        pq.ParquetWriter(file, SCHEMA, **_WRITING) as writer,
    ):
        together, tables = _shards_per_group(len(manifest.shards)), []
        for number, (shard, table) in enumerate(zip(manifest.shards, rows, strict=True), 1):
            if len(table) != shard.num_samples:
                raise ValueError(f"{shard.name}: {len(table)} rows for {shard.num_samples} samples")
            tables.append(table.cast(SCHEMA))
            if number % together == 0 or number == len(manifest.shards):
                group = pa.concat_tables(tables)
                writer.write_table(group, len(group))
                tables = []
        writer.add_key_value_metadata({_KEY: json.dumps(header).encode()})


def read_manifest(place: Place) -> Manifest:
    """Open the manifest at `place`, a directory or s3://bucket/prefix; the rows stay there.

    Raises:
        DataError: no manifest there, not one of ours, or of another format version.
    """
    storage = open_storage(place)
    shown = join(place, FILE_NAME)
    metadata = _read_metadata(storage)
    raw = (metadata.metadata or {}).get(_KEY)
    if raw is None:
        raise DataError(f"{shown}: a Parquet file, but not a manifest of Atrous")
    header = json.loads(raw)
    version = header.pop("version")
    if version > FORMAT_VERSION:
        raise DataError(f"{shown}: written by a newer Atrous; update this one")
    if version < FORMAT_VERSION:
        raise DataError(f"{shown}: has no checksums of samples; prepare the data set again")
    digest = header.pop("digest")
    header["shards"] = tuple(Shard(**shard) for shard in header["shards"])
    header["class_names"] = tuple(header["class_names"])
    manifest = Manifest(storage=storage, footer=metadata, **header)
    found = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    counts = [shard.num_samples for shard in manifest.shards]
    together = _shards_per_group(len(counts))
    expected = [sum(counts[i : i + together]) for i in range(0, len(counts), together)]
    if digest != manifest.digest or found != expected:
        raise DataError(f"{shown}: header and rows disagree; prepare the data set again")
    return manifest


def _shards_per_group(num_shards: int) -> int:
    """One up to _MAX_ROW_GROUPS shards; which row group is whose is then said by their number."""
    return max(1, -(-num_shards // _MAX_ROW_GROUPS))


def _read_metadata(storage: Storage) -> Any:
    """The footer of a manifest, without its rows."""
    shown = join(storage.place, FILE_NAME)
    size = storage.size(FILE_NAME)
    if size is None:
        raise DataError(f"{shown}: not found; prepare the data set with `atrous data prepare`")
    tail = storage.read(FILE_NAME, max(0, size - _TAIL), min(size, _TAIL))
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < length <= size:
        tail = storage.read(FILE_NAME, size - length, length)
    window = _Window(size)
    window.show(size - len(tail), tail)
    try:
        return pq.read_metadata(window)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{shown}: not a Parquet file ({error}); prepare the data set again"
        ) from None
