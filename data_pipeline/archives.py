"""A raw data set as published: folders, zip and tar archives, seen as one tree of files.

A file is either a path on disk or a member of an archive, which knows where its bytes lie: any
process reads it with one seek, without the archive's index and without unpacking anything.
"""

import gzip
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO

from data_pipeline.errors import DataError

MAX_MEMBER = (
    1 << 31
)  # bytes; COCO's annotations have 0.5 GB, whatever is larger is taken for a bomb
_MAX_HELD = 1 << 30
_HELD = (".txt", ".mat")  # what is taken out of gzip archives: lists and labels
_ZIP_HEADER = 30


@dataclass(frozen=True, slots=True)
class TarMember:
    """`size` bytes at `offset` of a tar file, perhaps of one inside another."""

    archive: str
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes; raises DataError where the archive ends too early."""
        with open(self.archive, "rb") as file:
            return _read_exactly(file, self.offset, self.size, self.archive)

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
        if self.size > MAX_MEMBER:
            raise DataError(f"{self}: {self.size} bytes; the limit is {MAX_MEMBER}")
        with open(self.archive, "rb") as file:
            header = _read_exactly(file, self.offset, _ZIP_HEADER, self.archive)
            # The lengths of name and extra field, which may differ from those of the index.
            skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            data = _read_exactly(file, self.offset + _ZIP_HEADER + skip, self.packed, self.archive)
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
File = str | Member


def read_bytes(file: File) -> bytes:
    """The bytes of a file of a raw data set.

    Raises:
        DataError: it is missing, cannot be read, or its archive is damaged.
    """
    try:
        return Path(file).read_bytes() if isinstance(file, str) else file.read()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None


def file_stamp(file: File) -> list[str | int | None]:
    """Name, size and time of a file, or of the archive that it is in: what tells of a change."""
    path = Path(file if isinstance(file, str) else file.archive)
    name = path.name if isinstance(file, str) else f"{path.name}/{file.name}"
    try:
        status = path.stat()
    except OSError:
        return [name, None, None]  # reading will say that it is missing
    return [name, status.st_size, status.st_mtime_ns]


def is_inside(relative: str) -> bool:
    """Whether a path from a data file stays inside the folder it is relative to."""
    return not os.path.isabs(relative) and not os.path.normpath(relative).startswith("..")


class SourceTree:
    """A raw data set's files by name, "folder/file", on disk or in archives that lie in the root.

    `archives` maps the names of the archives that may be there to the folder (of the root) that
    their content belongs in; names that start with that folder already stay as they are. A tar
    inside a tar is a folder. What is on disk comes before what is in an archive, and an archive is
    opened when something of its folder is asked for.
    """

    def __init__(self, root: Path, archives: Mapping[str, str] | None = None) -> None:
        self.root = root
        self.archives = archives or {}
        self._present = [
            (str(root.resolve() / name), folder)
            for name, folder in self.archives.items()
            if (root / name).is_file()
        ]

    def folders(self, name: str = "") -> tuple[str, ...]:
        """The folders in a folder, sorted; none if it is not there."""
        found = {entry.name for entry in self._scan(name) if entry.is_dir()}
        if name == "":
            found.update(folder for _, folder in self._present)
        for index in self._indexes(name):
            found.update(index.folders(name))
        return tuple(sorted(found))

    def files(self, name: str = "") -> dict[str, File]:
        """The files in a folder by their names, sorted; none if it is not there."""
        found: dict[str, File] = {}
        for index in self._indexes(name):
            found.update(index.files(name))
        found.update({entry.name: entry.path for entry in self._scan(name) if entry.is_file()})
        return dict(sorted(found.items()))

    def walk(self, name: str) -> Iterator[tuple[str, File]]:
        """All files below a folder, with their names from there on, sorted."""
        yield from self.files(name).items()
        for folder in self.folders(name):
            for rest, file in self.walk(f"{name}/{folder}"):
                yield f"{folder}/{rest}", file

    def file(self, name: str) -> File:
        """The file of that name; the path on disk that it would have, if it is not there."""
        path = self.root / name
        if self._present and not path.exists():
            folder, _, base = name.rpartition("/")
            for index in self._indexes(folder):
                if member := index.files(folder).get(base):
                    return member
        return str(path)

    def exists(self, name: str) -> bool:
        """Whether there is a file or a folder of that name."""
        if (self.root / name).exists() or not isinstance(self.file(name), str):
            return True
        return any(index.folders(name) or index.files(name) for index in self._indexes(name))

    def holds(self, folder: str) -> bool:
        """Whether a folder of the root is there, or an archive for it, which is not opened."""
        return (self.root / folder).is_dir() or any(name == folder for _, name in self._present)

    def read(self, name: str) -> bytes:
        """The bytes of the file of that name; raises DataError if it is not there."""
        return read_bytes(self.file(name))

    def _scan(self, name: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.root / name) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _indexes(self, name: str) -> "Iterator[_Index]":
        """The indexes of the archives that can hold something in the folder `name`."""
        for path, folder in self._present:
            if f"{name}/".startswith(f"{folder}/"):
                status = os.stat(path)
                yield _read_index(path, folder, (status.st_size, status.st_mtime_ns))


def forget_archives() -> None:
    """Let go of the indexes read so far, some hundred megabytes for ImageNet's."""
    _read_index.cache_clear()


def tar_members(path: str) -> list[TarMember]:
    """The regular files of a tar archive, in its order; folders and devices are left out.

    Raises:
        DataError: no tar archive, cut short, a name that leaves it, or a link.
    """
    return list(_tar_members(path, 0, ""))


@dataclass
class _Index:
    """What an archive holds, by folder."""

    _members: dict[str, dict[str, Member]] = field(default_factory=dict)
    _folders: dict[str, set[str]] = field(default_factory=dict)
    _nested: dict[str, TarMember] = field(default_factory=dict)

    def add(self, name: str, member: Member) -> None:
        if isinstance(member, TarMember) and name.endswith(".tar"):
            name = name.removesuffix(".tar")
            self._nested[name] = member
            self._add_folder(name)
            return
        folder, _, base = name.rpartition("/")
        self._members.setdefault(folder, {})[base] = member
        self._add_folder(folder)

    def files(self, folder: str) -> Mapping[str, Member]:
        self._open_nested(folder)
        return self._members.get(folder, {})

    def folders(self, folder: str) -> set[str]:
        self._open_nested(folder)
        return self._folders.get(folder, set())

    def _add_folder(self, name: str) -> None:
        while name:
            parent, _, base = name.rpartition("/")
            self._folders.setdefault(parent, set()).add(base)
            name = parent

    def _open_nested(self, folder: str) -> None:
        if (outer := self._nested.get(folder)) is not None:
            for member in _tar_members(outer.archive, outer.offset, f"{outer.name}/"):
                self.add(f"{folder}/{member.name.removeprefix(f'{outer.name}/')}", member)
            del self._nested[folder]  # only now: what fails is not to look empty the next time


@lru_cache(maxsize=16)
def _read_index(path: str, folder: str, stamp: tuple[int, int]) -> _Index:
    index = _Index()
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
    length = os.stat(path).st_size
    try:
        with open(path, "rb") as file:
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
        with gzip.open(path) as file, tarfile.open(fileobj=file, mode="r|") as tar:
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
        with zipfile.ZipFile(path) as archive:
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


def _read_exactly(file: IO[bytes], offset: int, size: int, archive: str) -> bytes:
    if size > MAX_MEMBER:
        raise DataError(f"{archive}: a member of {size} bytes; the limit is {MAX_MEMBER}")
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise DataError(f"{archive}: ends before byte {offset + size}; download it again")
    return data
