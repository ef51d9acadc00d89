"""A cache of byte ranges on the local disk, shared by all processes of a node.

The directory is all of its state: an entry is a file that is renamed into place when it is whole
and verified, so a kill at any moment leaves at most a temporary file, which the next sweep removes.
See docs/decisions/0006-cache-of-blocks.md.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

_LOCK_FILE = "lock"  # its bytes are the locks, its first 8 hold the bytes that entries may take
_USAGE = struct.Struct("<q")
_TEMPORARY = ".tmp"
_DOWNLOAD_WAIT = 150.0  # seconds for another process's download: a little over a store's patience
_SWEEP_WAIT = 10.0
_KEPT = 0.9  # a sweep leaves that share of the limit, so the next one is not due at once
_PAUSE = 60.0  # seconds without writing after the disk refused
_DEFAULT_LIMIT = 50 * 10**9


class NodeCache:
    """At most `limit` bytes of `directory`; the entries used last stay. See `open_cache`."""

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory = directory
        self._limit = limit
        self._lock_file = _open_lock_file(directory)
        self._paused_until = 0.0
        self._warned = False
        with self._locked(0, _SWEEP_WAIT) as held:
            if held:
                self._sweep(limit)

    @property
    def room(self) -> int:
        """Bytes that entries can take without pushing each other out."""
        return int(self._limit * _KEPT)

    def get(self, key: str, fetch: Callable[[], bytes], verify: Callable[[bytes], bool]) -> bytes:
        """The bytes of `key`, from the cache or else from `fetch`, then kept if `verify` says so.

        `key` stands for the content. Of the processes that want it, one fetches; what is wrong with
        the directory or the disk costs only the cache.
        """
        data = self._read(key)
        if data is not None:
            return data
        with self._locked(_byte_of(key), _DOWNLOAD_WAIT, lambda: self._path(key).exists()):
            data = self._read(key)
            if data is None:
                data = fetch()
                if verify(data):
                    self._keep(key, data)
            return data

    def discard(self, key: str) -> None:
        """Forget an entry that turned out to be damaged."""
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            self._refused(error)

    def _path(self, key: str) -> Path:
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self.directory / name[:2] / name[2:]

    def _read(self, key: str) -> bytes | None:
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)  # used just now
        except OSError:  # not there, or just swept away
            return None
        return data or None

    def _keep(self, key: str, data: bytes) -> None:
        if len(data) > self.room or time.monotonic() < self._paused_until:
            return
        try:
            if self._reserve(len(data)):
                _write(self._path(key), data)
        except FileNotFoundError:
            pass  # somebody emptied the directory meanwhile
        except OSError as error:
            self._refused(error)

    def _refused(self, error: OSError) -> None:
        self._paused_until = time.monotonic() + _PAUSE
        if not self._warned:
            self._warned = True
            log.warning(
                "cache %s: %s; reading on without it, make room or set data.cache or ATROUS_CACHE",
                self.directory,
                error,
            )

    def _reserve(self, size: int) -> bool:
        """Count `size` more bytes, making room first; False where the lock is not to be had."""
        with self._locked(0, _SWEEP_WAIT) as held:
            if not held:
                return False
            raw = os.pread(self._lock_file, _USAGE.size, 0)
            used = _USAGE.unpack(raw)[0] if len(raw) == _USAGE.size else self._limit
            if used + size > self._limit:
                used = self._sweep(self.room - size)
            os.pwrite(self._lock_file, _USAGE.pack(used + size), 0)
            return True

    def _sweep(self, room: int) -> int:
        """Delete what dead writers left, and the longest unused entries beyond `room` bytes."""
        entries = []
        for path in self.directory.glob("??/*"):
            try:
                status = path.stat()
                if path.name.endswith(_TEMPORARY) and _is_abandoned(path):
                    path.unlink()
                else:
                    entries.append((status.st_mtime_ns, status.st_size, path))
            except FileNotFoundError:
                continue
        used = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if used <= room:
                break
            path.unlink(missing_ok=True)
            used -= size
        os.pwrite(self._lock_file, _USAGE.pack(used), 0)
        return used

    @contextmanager
    def _locked(
        self, byte: int, patience: float, done: Callable[[], bool] = lambda: False
    ) -> Iterator[bool]:
        """Hold the lock of a byte of the lock file against other processes; a death frees it.

        Gives False, without it, after `patience` seconds or when `done` while waiting.
        """
        deadline, wait, held = time.monotonic() + patience, 0.002, False
        while not (held := _try_lock(self._lock_file, byte)):
            if done() or time.monotonic() > deadline:
                break
            time.sleep(wait)
            wait = min(2 * wait, 0.05)
        try:
            yield held
        finally:
            if held:
                _unlock(self._lock_file, byte)


def open_cache(directory: Path | None = None, limit: int | None = None) -> NodeCache | None:
    """The cache in `directory`, the same object for all who ask; None, with a warning, if refused.

    Without `directory`: $ATROUS_CACHE, or a directory of this user below the system's temporary
    one. Without `limit`: 50 GB, or a quarter of what is free there where that is less.
    """
    place = directory or Path(os.environ.get("ATROUS_CACHE") or _default_directory())
    return _open(place.expanduser().absolute(), limit)


@cache
def _open(directory: Path, limit: int | None) -> NodeCache | None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory.stat().st_uid != os.getuid():
            raise PermissionError(f"{directory} belongs to another user")
        return NodeCache(directory, limit or min(_DEFAULT_LIMIT, _free(directory) // 4))
    except OSError as error:
        log.warning(
            "cache %s: %s; reading without it, set data.cache or ATROUS_CACHE", directory, error
        )
        return None


def _default_directory() -> str:
    return f"{tempfile.gettempdir()}/atrous-cache-{os.getuid()}"


def _free(directory: Path) -> int:
    """Bytes, without the cache: a limit that shrinks as it fills would empty it again."""
    raw = os.pread(_open_lock_file(directory), _USAGE.size, 0)
    used = _USAGE.unpack(raw)[0] if len(raw) == _USAGE.size else 0
    return shutil.disk_usage(directory).free + used


# Closing any descriptor of a file frees all locks the process holds on it (POSIX), so there is one
# for each directory, and it stays open.
@cache
def _open_lock_file(directory: Path) -> int:
    return os.open(directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


# Such locks are the process's: between its threads, and after a fork, this set decides.
_held: set[tuple[int, int]] = set()
_held_lock = threading.Lock()
os.register_at_fork(after_in_child=_held.clear)


def _try_lock(descriptor: int, byte: int) -> bool:
    with _held_lock:
        if (descriptor, byte) in _held:
            return False
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):
            return False  # held by another process
        _held.add((descriptor, byte))
        return True


def _unlock(descriptor: int, byte: int) -> None:
    with _held_lock:
        _held.discard((descriptor, byte))
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, byte)


def _byte_of(key: str) -> int:
    digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
    return 1 + int.from_bytes(digest, "big")  # 0 is the lock of the whole


def _write(path: Path, data: bytes) -> None:
    """Write an entry; its temporary file is locked as long as its writer lives."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}{_TEMPORARY}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _is_abandoned(temporary: Path) -> bool:
    descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
