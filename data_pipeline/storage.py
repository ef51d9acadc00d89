"""Byte ranges of files: the little that reading a data set needs from its storage."""

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Generic, TypeVar

from data_pipeline.errors import DataError

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

_SCHEME = re.compile(
    r"^([A-Za-z][A-Za-z0-9+.-]+):/"
)  # Path() folds "s3://bucket" into "s3:/bucket"
_OPEN_FILES = 256


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


class Storage:
    """Reads byte ranges of the files under one directory; safe to share between threads."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: LoadingCache[str, _File] = LoadingCache(_OPEN_FILES, self._open)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of the file `name` (relative to the root) from `offset`.

        Raises:
            DataError: the file is missing or ends before that.
        """
        data = self._files.get(name).read(offset, size)
        if len(data) != size:
            raise DataError(
                f"{self._root / name}: {len(data)} of the {size} bytes from {offset} on are there; "
                "it is shorter than the manifest says, copy the data set completely"
            )
        return data

    def _open(self, name: str) -> _File:
        try:
            return _File(self._root / name)
        except FileNotFoundError:
            raise DataError(
                f"{self._root / name}: named in the manifest but not there; "
                "copy the data set completely"
            ) from None


def local_path(place: str | Path) -> Path:
    """`place` as a path on this machine.

    Raises:
        DataError: `place` is a URI with a scheme, such as s3://.
    """
    if scheme := _SCHEME.match(str(place)):
        raise DataError(
            f"{place}: only local paths are supported so far, not {scheme[1]}:; "
            "copy or mount the data set and name its directory"
        )
    return Path(place)
