"""Writes shards: plain WebDataset tar files, the same bytes for the same samples."""

import hashlib
import tarfile
import zlib
from collections.abc import Iterable
from typing import IO, Any

import pyarrow as pa

from data_pipeline.formats.sample import Sample
from data_pipeline.manifest import SCHEMA, Shard
from data_pipeline.storage import Storage


def write_shard(storage: Storage, name: str, samples: Iterable[Sample]) -> tuple[Shard, pa.Table]:
    """Write `samples` to the tar file `name`, whole or not at all; its manifest rows with it."""
    with storage.writing(name) as file:
        tar = _Tar(file)
        rows = [_add_sample(tar, sample) for sample in samples]
        tar.end()
    shard = Shard(
        name=name, size=tar.position, sha256=tar.sha256.hexdigest(), num_samples=len(rows)
    )
    return shard, pa.Table.from_pylist(rows, schema=SCHEMA)


class _Tar:
    """A tar file of regular members whose headers say nothing of when, where and by whom."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.position = 0
        self.sha256 = hashlib.sha256()
        self.crc32 = 0  # since it was last set to 0

    def add(self, name: str, payload: bytes) -> int:
        """Append one member and return the offset of its payload."""
        info = tarfile.TarInfo(name)  # mode 0644; mtime, uid, gid 0; no names
        info.size = len(payload)
        # PAX is plain ustar for short ASCII names and adds a header for others.
        self._write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
        offset = self.position
        self._write(payload)
        self._pad(tarfile.BLOCKSIZE)
        return offset

    def end(self) -> None:
        """Write the two empty blocks that end a tar file."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._pad(tarfile.RECORDSIZE)

    def _pad(self, unit: int) -> None:
        self._write(bytes(-self.position % unit))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        self.position += len(data)


def _add_sample(tar: _Tar, sample: Sample) -> dict[str, Any]:
    start, tar.crc32 = tar.position, 0
    image_offset = tar.add(f"{sample.key}.{sample.image_extension}", sample.image)
    label_offset = tar.position  # where it has none; label_size is 0 then
    if sample.label_extension:
        label_offset = tar.add(f"{sample.key}.{sample.label_extension}", sample.label)
    return {
        "key": sample.key,
        "offset": start,
        "size": tar.position - start,
        "crc32": tar.crc32,
        "image_offset": image_offset,
        "image_size": len(sample.image),
        "label_offset": label_offset,
        "label_size": len(sample.label),
        "width": sample.width,
        "height": sample.height,
        "labels": list(sample.labels),
    }
