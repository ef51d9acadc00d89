"""Zip and tar archives as published, on a disk or in a bucket.

A member knows where its bytes lie: any process reads it with one seek, or one request to the store,
without the archive's index and without unpacking anything.
"""

import gzip
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.raw_files import (
    StoredObject,
    file_version,
    forget_listings,
    open_file,
    read_range,
)
from data_pipeline.storage import is_local

MAX_MEMBER = (
    1 << 31
)  # bytes; COCO's annotations have 0.5 GB, whatever is larger is taken for a bomb
_MAX_HELD = 1 << 30
_HELD = (".txt", ".mat")  # what is taken out of gzip archives: lists and labels
_ZIP_HEADER = 30
# The index behind a member has at least 68 bytes and its name; most extra fields are smaller.
_ZIP_EXTRA = 68
_CONNECTIONS = 16


@dataclass(frozen=True, slots=True)
class TarMember:
    """`size` bytes at `offset` of a tar file, perhaps of one inside another."""

    archive: str
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes; raises DataError where the archive ends too early."""
        _check_size(self, self.size)
        return read_range(self.archive, self.offset, self.size)

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


@dataclass(frozen=True, slots=True)
class ZipMember:
    """A member of a zip archive; `offset` is where its header starts, `packed` its packed size."""

    archive: str
    name: str
    offset: int
    size: int
    packed: int
    method: int
    crc: int

    def read(self) -> bytes:
        """The unpacked bytes; raises DataError unless they have the size and checksum promised."""
        _check_size(self, max(self.size, self.packed))
        # Header and bytes in one read, which does not reach beyond the index at the end.
        ahead = _ZIP_HEADER + 2 * len(self.name) + _ZIP_EXTRA + self.packed
        data = read_range(self.archive, self.offset, ahead)
        # The lengths of name and extra field, which may differ from those of the index.
        start = _ZIP_HEADER
        start += int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
        if start + self.packed > ahead:
            data = read_range(self.archive, self.offset, start + self.packed)
        data = data[start : start + self.packed]
        try:
            if self.method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.size + 1)
        except zlib.error as error:
            raise DataError(f"{self}: does not unpack ({error}); download it again") from None
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise DataError(f"{self}: not the bytes the archive promises; download it again")
        return data

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


@dataclass(frozen=True, slots=True)
class HeldMember:
    """A small member of a gzip archive, in which nothing can be found by seeking."""

    archive: str
    name: str
    data: bytes

    def read(self) -> bytes:
        """The bytes."""
        return self.data

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


Member = TarMember | ZipMember | HeldMember
File = str | StoredObject | Member


def read_bytes(file: File) -> bytes:
    """The bytes of a file of a raw data set.

    Raises:
        DataError: it is missing, cannot be read, or its archive is damaged.
    """
    try:
        return Path(file).read_bytes() if isinstance(file, str) else file.read()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None


def file_place(file: File) -> str:
    """Path or URI of a file, or of the archive that it is in."""
    if isinstance(file, str):
        return file
    return file.uri if isinstance(file, StoredObject) else file.archive


def file_stamp(file: File) -> list[str | int | None]:
    """Name, size and time (or ETag) of a file, or of its archive: what tells of a change."""
    place = file_place(file)
    name = os.path.basename(place)
    if isinstance(file, StoredObject):
        return [name, file.size, file.etag]
    if not isinstance(file, str):
        name = f"{name}/{file.name}"
    return [name, *(file_version(place) or (None, None))]


def is_inside(relative: str) -> bool:
    """Whether a path from a data file stays inside the folder it is relative to."""
    return not os.path.isabs(relative) and not os.path.normpath(relative).startswith("..")


def forget_archives() -> None:
    """Let go of indexes and listings read so far, some hundred megabytes for ImageNet's."""
    _read_index.cache_clear()
    forget_listings()


def read_index(path: str, folder: str) -> "Index":
    """What an archive holds, by folders of the root; its content belongs in `folder`.

    Raises:
        DataError: no archive, cut short, or with names or links that lead out of it.
    """
    return _read_index(path, folder, file_version(path))


def tar_members(path: str) -> list[TarMember]:
    """The regular files of a tar archive, in its order; folders and devices are left out.

    Raises:
        DataError: no tar archive, cut short, a name that leaves it, or a link.
    """
    return list(_tar_members(path, 0, ""))


@dataclass
class Index:
    """What an archive holds, by folder."""

    _members: dict[str, dict[str, Member]] = field(default_factory=dict)
    _folders: dict[str, set[str]] = field(default_factory=dict)
    _nested: dict[str, TarMember] = field(default_factory=dict)

    def add(self, name: str, member: Member) -> None:
        """Add a member; a tar is a folder, opened when it is asked for."""
        if isinstance(member, TarMember) and name.endswith(".tar"):
            name = name.removesuffix(".tar")
            self._nested[name] = member
            self._add_folder(name)
            return
        folder, _, base = name.rpartition("/")
        self._members.setdefault(folder, {})[base] = member
        self._add_folder(folder)

    def files(self, folder: str) -> Mapping[str, Member]:
        """The files in a folder by their names."""
        self._open_nested(folder)
        return self._members.get(folder, {})

    def folders(self, folder: str) -> set[str]:
        """The folders in a folder."""
        self._open_nested(folder)
        return self._folders.get(folder, set())

    def _add_folder(self, name: str) -> None:
        while name:
            parent, _, base = name.rpartition("/")
            self._folders.setdefault(parent, set()).add(base)
            name = parent

    def _open_nested(self, folder: str) -> None:
        if folder not in self._nested:
            return
        todo = {folder: self._nested[folder]}
        if not is_local(todo[folder].archive):
            todo = dict(self._nested)  # one by one a thousand would take hours
        with ThreadPoolExecutor(_CONNECTIONS) as threads:
            for name, members in zip(
                todo, threads.map(_nested_members, todo.values()), strict=True
            ):
                prefix = f"{todo[name].name}/"
                for member in members:
                    self.add(f"{name}/{member.name.removeprefix(prefix)}", member)
                del self._nested[name]  # only now: what fails is not to look empty the next time


def _nested_members(outer: TarMember) -> list[TarMember]:
    return list(_tar_members(outer.archive, outer.offset, f"{outer.name}/"))


@lru_cache(maxsize=16)
def _read_index(path: str, folder: str, version: object) -> Index:
    index = Index()
    if path.endswith(".zip"):
        members: Iterator[Member] = _zip_members(path)
    elif path.endswith((".tgz", ".gz")):
        members = _held_members(path)
    else:
        members = _tar_members(path, 0, "")
    for member in members:
        name = member.name
        index.add(name if name.startswith(f"{folder}/") else f"{folder}/{name}", member)
    return index


def _tar_members(path: str, start: int, prefix: str) -> Iterator[TarMember]:
    """The members of the tar that begins at byte `start` of a file."""
    try:
        with open_file(path) as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    if _is_file(info, path):
                        if info.offset_data + info.size > length:
                            raise tarfile.ReadError("unexpected end of data")
                        name = f"{prefix}{_checked_name(info.name, path)}"
                        yield TarMember(path, name, info.offset_data, info.size)
                # To tarfile a damaged header is the end of the archive.
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"no end mark at byte {tar.offset}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a whole tar archive ({error}); download it again") from None


def _held_members(path: str) -> Iterator[HeldMember]:
    held = 0
    try:
        with (
            open_file(path) as packed,
            gzip.open(packed) as file,
            tarfile.open(fileobj=file, mode="r|") as tar,
        ):
            for info in tar:
                if info.name.endswith(_HELD) and _is_file(info, path):
                    held += info.size
                    if held > _MAX_HELD:
                        raise DataError(f"{path}: holds more than {_MAX_HELD} bytes of labels")
                    data = tar.extractfile(info)
                    assert data is not None
                    yield HeldMember(path, _checked_name(info.name, path), data.read())
            while file.read(1 << 20):
                pass  # to its end, where the checksum is
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: not a whole tar.gz archive ({error}); download it again"
        ) from None


def _is_file(info: tarfile.TarInfo, path: str) -> bool:
    """Whether a member has bytes of its own; folders and devices have not.

    Raises:
        DataError: it is a link.
    """
    if info.issym() or info.islnk():
        raise DataError(
            f"{path}: its member {info.name!r} is a link; links are never followed, pack the file "
            "itself (tar --dereference --hard-dereference)"
        )
    return info.isreg() and not info.issparse()


def _zip_members(path: str) -> Iterator[ZipMember]:
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                name = _checked_name(info.filename, path)
                if info.flag_bits & 1 or info.compress_type not in (
                    zipfile.ZIP_STORED,
                    zipfile.ZIP_DEFLATED,
                ):
                    raise DataError(
                        f"{path}/{name}: encrypted or packed in an unusual way; unpack it"
                    )
                yield ZipMember(
                    path,
                    name,
                    info.header_offset,
                    info.file_size,
                    info.compress_size,
                    info.compress_type,
                    info.CRC,
                )
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a whole zip archive ({error}); download it again") from None


def _checked_name(name: str, archive: str) -> str:
    if not is_inside(name):
        raise DataError(f"{archive}: its member {name!r} would lie outside of it; do not trust it")
    return os.path.normpath(name)


def _check_size(member: TarMember | ZipMember, size: int) -> None:
    if size > MAX_MEMBER:
        raise DataError(f"{member}: {size} bytes; the limit is {MAX_MEMBER}")
