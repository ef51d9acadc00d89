"""Places that hold data sets: a local directory, or a prefix of a bucket (`object_store`).

Nothing relies on listing: what a data set consists of is said by its manifest.
"""

import os
import re
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Generic, Protocol, TypeVar

from data_pipeline.errors import DataError

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

# Path() folds "s3://bucket" into "s3:/bucket".
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/+")
_OPEN_FILES = 256

Place = str | Path  # a local directory, or s3://bucket/prefix


class Storage(Protocol):
    """The files under one place, by names relative to it; safe to share between threads."""

    @property
    def place(self) -> str:
        """The directory, or s3://bucket/prefix."""

    @property
    def remote(self) -> bool:
        """Whether a read takes a network round trip."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of a file from `offset`.

        Raises:
            DataError: the file is missing, ends before that, or cannot be read.
        """

    def read_whole(self, name: str) -> bytes:
        """All of a file.

        Raises:
            DataError: the file is missing or cannot be read.
        """

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""

    def writing(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A file to write, which appears whole, and for good, when the block ends without error."""

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""

    def names(self, prefix: str) -> list[str]:
        """Names of the files here that begin with `prefix`; only ever used to clean up."""


class LoadingCache(Generic[_Key, _Value]):
    """The `capacity` most recently used values of `load`.

    A value is loaded by one thread while others that want it wait, and lives on for the threads
    that hold it when it drops out. A failed load is not kept.
    """

    def __init__(self, capacity: int, load: Callable[[_Key], _Value]) -> None:
        self._capacity = capacity
        self._load = load
        self._entries: OrderedDict[_Key, Future[_Value]] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: _Key) -> bool:
        return key in self._entries

    def get(self, key: _Key) -> _Value:
        """The value of `key`, loaded now if it is not there."""
        with self._lock:
            entry = self._entries.get(key)
            if mine := entry is None:
                entry = self._entries[key] = Future()
            self._entries.move_to_end(key)
            while len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        if mine:
            try:
                entry.set_result(self._load(key))
            except BaseException as error:
                with self._lock:
                    if self._entries.get(key) is entry:
                        del self._entries[key]
                entry.set_exception(error)
        return entry.result()


class _File:
    """An open local file, closed when its last user lets go: no thread reads a reused number."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`; fewer only at the end of the file."""
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size and (
            more := os.pread(self._descriptor, size - len(data), offset + len(data))
        ):
            data += more  # the kernel may return less than asked, above 2 GiB always
        return data

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):  # absent when the open failed
            os.close(self._descriptor)


class LocalStorage:
    """The files under a local directory, or one mounted there."""

    remote = False

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files: LoadingCache[str, _File] = LoadingCache(_OPEN_FILES, self._open)

    @property
    def place(self) -> str:
        """The directory."""
        return str(self.root)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See `Storage`."""
        data = self._files.get(name).read(offset, size)
        if len(data) != size:
            raise DataError(
                f"{self.root / name}: {len(data)} of the {size} bytes from {offset} on are there; "
                "it is shorter than the manifest says, copy the data set completely"
            )
        return data

    def read_whole(self, name: str) -> bytes:
        """See `Storage`."""
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            raise DataError(f"{self.root / name}: not found") from None

    def size(self, name: str) -> int | None:
        """See `Storage`."""
        try:
            return (self.root / name).stat().st_size
        except FileNotFoundError:
            return None

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """See `Storage`: temporary name, fsync, rename, fsync of the directory."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Of a name that no other machine on a shared disk takes, either.
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_directory(path.parent)

    def delete(self, name: str) -> None:
        """See `Storage`; a directory below the place goes with its last file."""
        path = self.root / name
        path.unlink(missing_ok=True)
        if path.parent != self.root:
            with suppress(OSError):
                path.parent.rmdir()

    def names(self, prefix: str) -> list[str]:
        """See `Storage`."""
        paths = (path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file())
        return sorted(name for path in paths if (name := path.as_posix()).startswith(prefix))

    def _open(self, name: str) -> _File:
        try:
            return _File(self.root / name)
        except FileNotFoundError:
            raise DataError(
                f"{self.root / name}: named in the manifest but not there; "
                "copy the data set completely"
            ) from None


def open_storage(place: Place) -> Storage:
    """The files under a local directory or s3://bucket/prefix.

    Raises:
        DataError: another scheme, or no bucket's name.
    """
    scheme = _SCHEME.match(str(place))
    if scheme is None:
        return LocalStorage(Path(place))
    if scheme[1] != "s3":
        raise DataError(
            f"{place}: data sets lie in local directories or under s3://bucket/prefix, "
            f"not {scheme[1]}:; copy or mount it"
        )
    from data_pipeline.object_store import ObjectStore

    return ObjectStore(str(place)[scheme.end() :])


def is_local(place: Place) -> bool:
    """Whether a place is a path on this machine."""
    return _SCHEME.match(str(place)) is None


def join(place: Place, *names: str) -> str:
    """The place `names` below `place`."""
    scheme = _SCHEME.match(str(place))
    if scheme is None:
        return str(Path(place, *names))
    return "/".join([f"{scheme[1]}://{str(place)[scheme.end() :].rstrip('/')}", *names])


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
