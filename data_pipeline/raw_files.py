"""Files of a raw data set, on a disk or in a bucket: listed by folder, read whole or in part.

Their places are paths or s3:// URIs. What is in a bucket is listed once, until `forget_listings`.
"""

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import IO, Any

from data_pipeline.errors import DataError
from data_pipeline.storage import Storage, is_local, open_storage

_WINDOW = 1 << 20  # bytes: takes a store as long to send as to begin


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object of a bucket, as it was listed; `size` is None where it is not there."""

    uri: str
    size: int | None = None
    etag: str | None = None

    def read(self) -> bytes:
        """The bytes; raises DataError where it is missing or cannot be read."""
        storage, name = _split(self.uri)
        return storage.read_whole(name)

    def __str__(self) -> str:
        return self.uri


@dataclass(frozen=True)
class Listing:
    """What lies in a folder, nothing if there is no such folder; files on a disk are their paths.

    Links are followed.
    """

    folders: frozenset[str] = frozenset()
    files: Mapping[str, str | StoredObject] = field(default_factory=dict)


def list_folder(place: str) -> Listing:
    """The files and folders in a folder of a disk or a bucket."""
    if not is_local(place):
        return _list_prefix(place)
    try:
        with os.scandir(place) as entries:
            found = list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return Listing()
    return Listing(
        frozenset(entry.name for entry in found if entry.is_dir()),
        {entry.name: entry.path for entry in found if entry.is_file()},
    )


def forget_listings() -> None:
    """Let go of what was listed in buckets."""
    _list_prefix.cache_clear()


def file_version(place: str) -> tuple[int, int | str] | None:
    """Size, and time or ETag of a file: what tells of a change; None where there is none."""
    if is_local(place):
        try:
            status = os.stat(place)
        except OSError:
            return None  # reading will say that it is missing
        return status.st_size, status.st_mtime_ns
    folder, _, name = place.rpartition("/")
    found = _list_prefix(folder).files.get(name)
    if not isinstance(found, StoredObject) or found.size is None:
        return None
    return found.size, found.etag or ""


def open_file(place: str) -> IO[bytes]:
    """A file to be read in any order; in a bucket by ranges of a megabyte.

    Raises:
        DataError: it is in a bucket and not there.
        OSError: it is on a disk and cannot be opened.
    """
    if is_local(place):
        return open(place, "rb")
    storage, name = _split(place)
    size = storage.size(name)
    if size is None:
        raise DataError(f"{place}: not there; copy the data set completely or correct the place")
    return io.BufferedReader(_Object(storage, name, size), _WINDOW)


def read_range(place: str, offset: int, size: int) -> bytes:
    """Exactly `size` bytes of a file from `offset`.

    Raises:
        DataError: the file ends before that, or the store cannot be read.
        OSError: it is on a disk and cannot be read.
    """
    if not is_local(place):
        storage, name = _split(place)
        return storage.read(name, offset, size)
    with open(place, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise DataError(f"{place}: ends before byte {offset + size}; download it again")
    return data


class _Object(io.RawIOBase):
    """An object of a bucket as a file that can be read; each read is a request."""

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        self._storage = storage
        self._name = name
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = (0, self._position, self._size)[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._position))
        buffer[:size] = self._storage.read(self._name, self._position, size)
        self._position += size
        return size


@cache
def _list_prefix(place: str) -> Listing:
    from data_pipeline.object_store import ObjectStore

    storage = open_storage(place)
    assert isinstance(storage, ObjectStore)
    folders, objects = storage.scan()
    base = storage.place
    return Listing(
        frozenset(folders),
        {name: StoredObject(f"{base}/{name}", size, etag) for name, size, etag in objects},
    )


def _split(uri: str) -> tuple[Storage, str]:
    folder, _, name = uri.rpartition("/")
    return open_storage(folder), name
