"""Paths in a bucket: what of `pathlib.Path` the orchestrator uses, on objects."""

import fnmatch
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PosixPath
from typing import Any, NoReturn

from data_pipeline.errors import DataError, StorageUnavailable
from data_pipeline.object_store import Changed, ObjectStore

_SCHEME = "s3://"
_KEPT_OBJECTS, _KEPT_BYTES = 64, 16 << 20  # of small objects that were read before
_COPY_LIVES = 86400.0  # seconds since its last use


class StorageAway(OSError, StorageUnavailable):
    """A store does not answer, or refuses: what a disk that is away is to those who use one."""


class BucketPath(PosixPath):
    """An object, or the prefix of some; a prefix is there as long as an object below it is.

    A Path, so that whoever reads and writes in a run directory needs no second way to do it. What
    is not defined here fails (`__fspath__`): nothing lands on a disk by mistake. A store that
    does not answer is waited for, as a mounted file system is, and then an OSError.
    """

    patience = 300.0  # seconds

    def __str__(self) -> str:
        text = super().__str__()
        return f"s3:/{text}" if self.is_absolute() else text

    def __fspath__(self) -> NoReturn:
        raise TypeError(f"{self} is no file of this machine")

    def absolute(self) -> "BucketPath":
        """Itself."""
        return self

    def expanduser(self) -> "BucketPath":
        """Itself."""
        return self

    def exists(self, **_: Any) -> bool:
        """Whether there is an object of this name, or one below."""
        return self.is_file() or self.is_dir()

    def is_file(self, **_: Any) -> bool:
        """Whether there is an object of this name."""
        return self.size() is not None

    def is_dir(self, **_: Any) -> bool:
        """Whether there are objects below."""
        return bool(self._children())

    def size(self) -> int | None:
        """Bytes of the object; None where there is none."""
        with self._errors():
            return self._store.size(self._key)

    def read_bytes(self) -> bytes:
        """All of the object; asked for again, it is transferred only if it has changed."""
        return self.read_version()[0]

    def read_text(self, *_: Any, **__: Any) -> str:
        """All of the object, as UTF-8."""
        return self.read_bytes().decode()

    def read_version(self) -> tuple[bytes, str]:
        """All of the object, and its ETag."""
        known = _versions.get(str(self))
        with self._errors():
            data, tag = self._store.get(self._key, known[1] if known else "")
        if known is not None and tag == known[1]:
            return known
        if data is None:
            raise FileNotFoundError(2, os.strerror(2), str(self))
        _versions.keep(str(self), (data, tag))
        return data, tag

    def write_bytes(self, data: Any) -> int:
        """Write the object; whole or not at all."""
        with self._errors():
            self._store.put(self._key, bytes(data))
        return len(data)

    def write_text(self, data: str, *_: Any, **__: Any) -> int:
        """Write the object, as UTF-8."""
        return self.write_bytes(data.encode())

    def write_if(self, data: bytes, tag: str | None) -> str | None:
        """Write the object if its ETag still is `tag`, or, with None, if there is none.

        Returns its new ETag, also where the answer to this very write was lost; None: it has
        changed, and was not written.
        """
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        try:
            with self._errors():
                new = self._store.put(self._key, data, **condition)
        except Changed:
            found, new_tag = self.version()
            return new_tag if found == data else None
        _versions.keep(str(self), (data, new))
        return new

    def append(self, lines: Iterable[bytes]) -> int:
        """Write the object again with more lines, but for those it has; its size by then.

        Several processes may do so at once. Lines are unlike each other (they tell their time): one
        that is there already was written, and the answer got lost.
        """
        while True:
            old, tag = self.version()
            whole = old + b"".join(line for line in lines if line not in old)
            if whole == old or self.write_if(whole, tag):
                return len(whole)

    def upload(self, file: Path, ready: Callable[[], None]) -> None:
        """Make the object of a local file; what is there already is replaced if `ready`."""
        while True:
            try:
                with self._errors(), file.open("rb") as content:
                    self._store.upload(self._key, content, IfNoneMatch="*")
                return
            except Changed:  # its answer was lost, or a writer that was left behind still writes
                ready()
                self.unlink(missing_ok=True)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object, if it is there."""
        with self._errors():
            self._store.delete(self._key)

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Nothing: prefixes need no making."""

    def iterdir(self) -> Generator["BucketPath", None, None]:
        """What lies directly below."""
        yield from self._children()

    def glob(self, pattern: str) -> Generator["BucketPath", None, None]:
        """What below fits a pattern without `**`."""
        first, _, rest = pattern.partition("/")
        for child in self._children():
            if fnmatch.fnmatchcase(child.name, first):
                yield from child.glob(rest) if rest else [child]

    def below(self) -> list[tuple["BucketPath", int]]:
        """All objects below, and their bytes."""
        with self._errors():
            names = self._store.sizes(f"{self._key}/" if self._key else "")
        return [(self._bucket / name, size) for name, size in names]

    def copy_to(self, target: "BucketPath") -> None:
        """Copy the object within its bucket, without a way through this machine."""
        with self._errors():
            self._store.copy(self._key, target._key)

    def abort_uploads(self) -> None:
        """Forget what killed writers began to upload below."""
        with self._errors():
            self._store.abort_uploads(f"{self._key}/")

    def download(self, digest: str) -> Path:
        """A copy of the object on this machine, whose sha256 is `digest`.

        Raises:
            ValueError: the object's is another.
        """
        copy = _copies() / digest
        if copy.exists() and _sha256(copy) == digest:
            os.utime(copy)
            return copy
        with tempfile.TemporaryDirectory(dir=copy.parent) as folder:
            file = self.save_to(Path(folder) / "new")
            if _sha256(file) != digest:
                raise ValueError("sha256 differs")
            os.replace(file, copy)
        return copy

    def save_to(self, file: Path) -> Path:
        """Write the object to a file of this machine, and return that."""
        if (size := self.size()) is None:
            raise FileNotFoundError(2, os.strerror(2), str(self))
        with self._errors(), file.open("wb") as content:
            self._store.download(self._key, size, content)
        return file

    def version(self) -> tuple[bytes, str | None]:
        """As `read_version`; nothing, and None, where there is no object."""
        try:
            return self.read_version()
        except FileNotFoundError:
            return b"", None

    @property
    def _bucket(self) -> "BucketPath":
        return type(self)(*self.parts[:2])

    @property
    def _key(self) -> str:
        return "/".join(self.parts[2:])

    @property
    def _store(self) -> ObjectStore:
        timeout = min(20.0, max(2.0, self.patience / 2))
        return ObjectStore(self.parts[1], patience=self.patience, timeout=timeout)

    def _children(self) -> list["BucketPath"]:
        here = ObjectStore("/".join(self.parts[1:]), patience=self.patience)
        with self._errors():
            folders, objects = here.scan()
        return [self / name for name in [*folders, *(name for name, _, _ in objects)]]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Changed:
            raise
        except DataError as error:
            raise StorageAway(str(error)) from error


class HastyBucketPath(BucketPath):
    """For whoever would rather try again later than wait."""

    patience = 5.0


def storage_path(place: str | Path) -> Path:
    """The path of a place that a user names: s3://bucket/prefix, else one of this machine."""
    text = str(place)
    if not text.startswith(_SCHEME):
        return Path(text).expanduser().absolute()
    return BucketPath(f"/{text.removeprefix(_SCHEME).strip('/')}")


def on_disk(storage: Path) -> Path:
    """Where what only a disk can hold lies: in the storage itself, or in ~/atrous."""
    if not isinstance(storage, BucketPath):
        return storage
    directory = Path("~/atrous").expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def hasty(path: Path) -> Path:
    """The same place, for whoever would rather try again later than wait for the store."""
    return HastyBucketPath(*path.parts) if isinstance(path, BucketPath) else path


class _Versions:
    """The small objects that were read last, with their ETags."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, tuple[bytes, str]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> tuple[bytes, str] | None:
        with self._lock:
            return self._entries.get(name)

    def keep(self, name: str, version: tuple[bytes, str]) -> None:
        with self._lock:
            self._entries[name] = version
            self._entries.move_to_end(name)
            total = sum(len(data) for data, _ in self._entries.values())
            while len(self._entries) > _KEPT_OBJECTS or total > _KEPT_BYTES:
                total -= len(self._entries.popitem(last=False)[1][0])


_versions = _Versions()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copies() -> Path:
    """Where this node keeps copies of objects, by their sha256; those of yesterday are removed."""
    default = f"{tempfile.gettempdir()}/atrous-cache-{os.getuid()}"
    root = Path(os.environ.get("ATROUS_CACHE") or default).expanduser()
    for directory in (root, root / "objects"):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory.stat().st_uid != os.getuid():
            raise PermissionError(f"{directory} belongs to another user; set ATROUS_CACHE")
    for copy in directory.iterdir():
        with suppress(FileNotFoundError):  # another process removed it
            if copy.stat().st_mtime < time.time() - _COPY_LIVES:
                copy.unlink() if copy.is_file() else shutil.rmtree(copy)
    return directory
