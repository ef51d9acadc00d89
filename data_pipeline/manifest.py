"""The manifest: a Parquet file beside the shards that says where every sample lies.

One row group per shard, so a reader takes in what it needs of a data set of any size: the shard
list (from the footer) when it opens, the rows of a shard when it first reads from it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError

FILE_NAME = "manifest.parquet"
FORMAT_VERSION = 1
_KEY = b"atrous"

# Offsets are bytes from the start of the shard. A sample's span (offset, size) starts at its first
# tar header and holds every member of it, so neighbouring samples are one contiguous range.
# `labels` are the class ids in the sample, ascending, without the ignore label.
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
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
    """One tar file of a data set; `name` is relative to the manifest."""

    name: str
    size: int
    sha256: str
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared split consists of; `path`, where it was read, is no part of its identity."""

    dataset: str
    split: str
    task: str  # classification | multilabel | segmentation
    class_names: tuple[str, ...]
    ignore_label: int | None
    shards: tuple[Shard, ...]
    source: dict[str, Any] = field(default_factory=dict)  # raw path, layout, skipped inputs
    path: Path | None = None

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
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def read_rows(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The sample rows of one shard, in tar order."""
        if self.path is None:
            raise ValueError("this manifest was not read from a file, so it has no rows")
        with pq.ParquetFile(self.path) as parquet:
            return parquet.read_row_group(shard, columns=columns)


def write_manifest(directory: Path, manifest: Manifest, rows: Iterable[pa.Table]) -> Path:
    """Write `manifest` with one table of rows per shard: temporary file, fsync, rename.

    Raises:
        ValueError: a table's length differs from its shard's `num_samples`.
    """
    header = {"version": FORMAT_VERSION, "digest": manifest.digest} | {
        name: value for name, value in asdict(manifest).items() if name != "path"
    }
    schema = SCHEMA.with_metadata({_KEY: json.dumps(header).encode()})
    path = directory / FILE_NAME
    temporary = path.with_name(f"{FILE_NAME}.{os.getpid()}.tmp")
    with pa.OSFile(str(temporary), "wb") as sink:
        with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
            for shard, table in zip(manifest.shards, rows, strict=True):
                if len(table) != shard.num_samples:
                    raise ValueError(
                        f"{shard.name}: {len(table)} rows for {shard.num_samples} samples"
                    )
                writer.write_table(
                    table.cast(SCHEMA).replace_schema_metadata(schema.metadata), len(table)
                )
        sink.flush()
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path


def read_manifest(directory: Path) -> Manifest:
    """Open the manifest in `directory`; the rows stay on disk.

    Raises:
        DataError: no manifest there, not one of ours, or of a newer format.
    """
    path = directory / FILE_NAME
    try:
        metadata = pq.read_metadata(path)
    except FileNotFoundError:
        raise DataError(
            f"{path}: not found; prepare the data set with `atrous data prepare`"
        ) from None
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path}: not a Parquet file ({error}); prepare the data set again"
        ) from None
    raw = (metadata.metadata or {}).get(_KEY)
    if raw is None:
        raise DataError(f"{path}: a Parquet file, but not a manifest of Atrous")
    header = json.loads(raw)
    if header.pop("version") > FORMAT_VERSION:
        raise DataError(f"{path}: written by a newer Atrous; update this one")
    digest = header.pop("digest")
    header["shards"] = tuple(Shard(**shard) for shard in header["shards"])
    header["class_names"] = tuple(header["class_names"])
    manifest = Manifest(path=path, **header)
    counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if digest != manifest.digest or counts != [shard.num_samples for shard in manifest.shards]:
        raise DataError(f"{path}: header and rows disagree; prepare the data set again")
    return manifest
