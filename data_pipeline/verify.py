"""Compares shards with their manifest: sizes, sha256, crc32 and tar headers of samples."""

import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError, StorageUnavailable
from data_pipeline.in_order import InOrder
from data_pipeline.manifest import Manifest, RowReader

_CHUNK = 16 << 20  # bytes read at once, or one sample where that is larger
_COLUMNS = (
    "key", "offset", "size", "crc32",
    "image_offset", "image_size", "label_offset", "label_size",
)  # fmt: skip

_Row = dict[str, Any]


@dataclass(kw_only=True)
class ShardReport:
    """What is wrong with a shard as a whole, and with which of its samples."""

    name: str
    num_samples: int
    size: int
    damages: list[str] = field(default_factory=list)
    samples: dict[str, str] = field(default_factory=dict)  # key -> what is wrong

    @property
    def intact(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damages and not self.samples


def verify(dataset: Dataset, threads: int = 4) -> Iterator[ShardReport]:
    """Check every shard of a split, in order, reading all of it once.

    Raises:
        StorageUnavailable: the store cannot be reached, which says nothing about the data.
    """
    manifest = dataset.manifest
    rows = RowReader(manifest)
    checks: list[Callable[[], ShardReport]] = [
        partial(_check_shard, manifest, rows, number) for number in range(len(manifest.shards))
    ]
    for _, (report,) in InOrder(((None, [check]) for check in checks), threads, ahead=threads):
        yield report


def _check_shard(manifest: Manifest, rows: RowReader, number: int) -> ShardReport:
    shard, storage = manifest.shards[number], manifest.shard_storage
    report = ShardReport(name=shard.name, num_samples=shard.num_samples, size=shard.size)
    try:
        size = storage.size(shard.name)
        if size is None:
            report.damages.append("missing")
            return report
        if size != shard.size:
            report.damages.append(f"{size} bytes; the manifest says {shard.size}")
        table = rows.read(number, _COLUMNS).to_pylist()
        digest = hashlib.sha256()
        for start, stop, part in _chunks(table, min(size, shard.size)):
            data = storage.read(shard.name, start, stop - start) if stop > start else b""
            digest.update(data)
            _check_samples(report, part, memoryview(data), start)
    except StorageUnavailable:
        raise
    except DataError as error:
        report.damages.append(str(error))
        return report
    if digest.hexdigest() != shard.sha256:
        report.damages.append(_explain(report, digest.hexdigest(), shard.sha256))
    return report


def _explain(report: ShardReport, found: str, expected: str) -> str:
    text = f"sha256 {found[:12]}; the manifest says {expected[:12]}"
    if not report.samples:
        return f"{text}; all samples are intact, the damage lies outside of them"
    if len(report.samples) == report.num_samples > 1:
        return f"{text}; no sample is as it was: probably of another preparation"
    return text


def _chunks(rows: Sequence[_Row], size: int) -> Iterator[tuple[int, int, list[_Row]]]:
    """Spans that cover a file of `size` bytes in order, each with the samples that it holds.

    A sample that the file is too short for comes with the last span that has a part of it.
    """
    start, part = 0, list[_Row]()
    for row in rows:
        if row["offset"] >= start + _CHUNK and part:
            stop = min(row["offset"], size)
            yield start, stop, part
            start, part = stop, []
        part.append(row)
    yield start, size, part


def _check_samples(report: ShardReport, rows: Sequence[_Row], data: memoryview, start: int) -> None:
    for row in rows:
        first = row["offset"] - start
        span = data[first : first + row["size"]]
        if len(span) < row["size"]:
            missing = row["size"] - len(span)
            report.samples[row["key"]] = f"{missing} of {row['size']} bytes are missing"
        elif zlib.crc32(span) != row["crc32"]:
            report.samples[row["key"]] = f"crc32 differs (bytes {row['offset']} on)"
        elif wrong := _check_headers(row, span):
            report.samples[row["key"]] = wrong


def _check_headers(row: _Row, span: memoryview) -> str | None:
    """What is wrong with the tar headers in front of image and label."""
    for part in ("image", "label"):
        offset, size = row[f"{part}_offset"] - row["offset"], row[f"{part}_size"]
        if not size:  # a sample without a label
            continue
        try:
            header = bytes(span[offset - tarfile.BLOCKSIZE : offset])
            found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
        except tarfile.HeaderError as error:
            return f"no tar header before the {part} at byte {row[f'{part}_offset']} ({error})"
        if found != size:
            return f"the tar header gives the {part} {found} bytes, the manifest {size}"
    return None
