"""Finds the samples of a WebDataset shard that anybody wrote, reading it once, front to back.

Samples are what WebDataset takes for them: neighbouring members of one name up to the first dot of
its last part; the rest of the name, in lower case, is the extension. Hidden files are passed over.
"""

import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from data_pipeline.archives import MAX_MEMBER, is_inside
from data_pipeline.decode import decode_mask, require_upright
from data_pipeline.errors import DataError
from data_pipeline.formats.labelled_shards import parse_labels, to_class_ids
from data_pipeline.formats.sample import MAX_PIXELS
from data_pipeline.manifest import SCHEMA, Shard
from data_pipeline.storage import Storage, join

_CHUNK = 8 << 20  # bytes of one read
_META = re.compile(r"__[^/]*__(/|$)")  # WebDataset's own, which it skips
_GZIP = b"\x1f\x8b"
_PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")  # as the decoder


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a sample consists of, and what its label means.

    Of `image` and `label` the first extension that is there counts; "json:field" is a field of a
    JSON object.
    """

    task: str
    image: tuple[str, ...]
    label: tuple[str, ...]
    class_names: tuple[str, ...]
    ignore_label: int | None  # segmentation alone has one

    @cached_property
    def wanted(self) -> frozenset[str]:
        """The extensions of the members that are read."""
        return frozenset(name.partition(":")[0] for name in (*self.image, *self.label))

    @cached_property
    def class_ids(self) -> Mapping[str, int]:
        """The number of each class."""
        return {name: number for number, name in enumerate(self.class_names)}


@dataclass(kw_only=True)
class IndexedShard:
    """A shard, the manifest's rows of its samples, and what is broken: {"key", "reason"} each."""

    shard: Shard
    rows: pa.Table
    skipped: list[dict[str, str]] = field(default_factory=list)


def index_shard(storage: Storage, name: str, size: int, contents: Contents) -> IndexedShard:
    """Find the samples of a shard of `size` bytes.

    Pictures are not decoded, only their headers read; masks are, and labels. One that is broken is
    left out and told; of a shard that is cut short or damaged, what lies behind the damage.

    Raises:
        DataError: it is compressed, a name in it leads out of it, or it cannot be read.
    """
    file = _ReadOnce(storage, name, size)
    if file.span(0, min(2, size)) == _GZIP:
        raise DataError(
            f"{join(storage.place, name)}: is compressed, so its samples cannot be read one by "
            "one; unpack it"
        )
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    try:
        for sample in _samples(file, join(storage.place, name), contents.wanted):
            try:
                rows.append(_row(file, sample, contents))  # the next header is read: so is this
            except DataError as error:
                skipped.append({"key": sample.key, "reason": f"{name}: {error}"})
    except (tarfile.TarError, EOFError) as error:
        reason = f"not a whole tar archive ({error}); copy it again"
        skipped.append({"key": name, "reason": f"{join(storage.place, name)}: {reason}"})
    file.finish()
    shard = Shard(name=name, size=size, sha256=file.sha256.hexdigest(), num_samples=len(rows))
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    return IndexedShard(shard=shard, rows=table, skipped=skipped)


class _ReadOnce(io.RawIOBase):
    """A shard whose bytes are read once, in order, and at hand from `keep` on."""

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        self.sha256 = hashlib.sha256()
        self.size = size
        self.keep = 0
        self._storage, self._name = storage, name
        self._bytes, self._start, self._position = bytearray(), 0, 0

    def span(self, offset: int, size: int) -> bytes:
        """Bytes of the shard."""
        if offset < self._start:  # no honest tar does
            raise tarfile.ReadError(f"a header leads back to byte {offset}")
        self._reach(offset + size)
        first = offset - self._start
        return bytes(memoryview(self._bytes)[first : first + size])

    def finish(self) -> None:
        """Read what is left, for the digest."""
        self.keep = self.size
        self._reach(self.size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = (0, self._position, self.size)[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self.size - self._position))
        if size:
            buffer[:size] = self.span(self._position, size)
            self._position += size
        return size

    def _reach(self, stop: int) -> None:
        while (end := self._start + len(self._bytes)) < stop:
            data = self._storage.read(self._name, end, min(_CHUNK, self.size - end))
            self.sha256.update(data)
            dropped = min(self.keep, end + len(data)) - self._start
            self._bytes += data
            if dropped > 0:
                del self._bytes[:dropped]
                self._start += dropped


@dataclass(kw_only=True)
class _Sample:
    """Members of one name, by their extensions."""

    key: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    twice: str | None = None  # an extension that is there twice


def _samples(file: _ReadOnce, place: str, wanted: frozenset[str]) -> Iterator[_Sample]:
    """The samples of a shard; `file` has their bytes until the next one is asked for."""
    current: _Sample | None = None
    for info in _members(file, place):
        key, extension = _split_name(info.name)
        if current is None or current.key != key:
            if current is not None:
                yield current
            current = _Sample(key=key)
        if not current.members.keys() & wanted:
            # tarfile looks at the last byte of each member.
            file.keep = info.offset if extension in wanted else _end(info) - 1
        if extension in current.members:
            current.twice = extension
        current.members[extension] = info
        if info.offset_data + info.size - file.keep > MAX_MEMBER:
            raise tarfile.ReadError(f"sample {key!r} has more than {MAX_MEMBER} bytes")
    if current is not None:
        yield current


def _split_name(name: str) -> tuple[str, str]:
    """Key and extension, both empty for files that are hidden or have no extension."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (f"{folder}{slash}{stem}", extension.lower()) if stem and dot else ("", "")


def _members(file: _ReadOnce, place: str) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar that belong to a sample: not WebDataset's own, not hidden."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # all headers would stay in memory
            if not is_inside(info.name):
                raise DataError(
                    f"{place}: its member {info.name!r} would lie outside of it; do not trust it"
                )
            if info.size < 0 or info.offset_data + info.size > file.size:
                raise tarfile.ReadError("unexpected end of data")
            is_file = info.isreg() and not info.issparse()
            if is_file and _split_name(info.name)[0] and not _META.match(info.name):
                yield info
        # To tarfile a damaged header is the end of the archive.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end mark at byte {tar.offset}")


def _row(file: _ReadOnce, sample: _Sample, contents: Contents) -> dict[str, Any]:
    """The manifest's row of a sample; of a class label, which is in the row itself, no bytes."""
    if sample.twice:
        raise DataError(f"{sample.key}: two members .{sample.twice}; keys name one sample each")
    _, image = _pick(sample, contents.image, "picture")
    extension, label = _pick(sample, contents.label, "label", image)
    used = [image, label] if contents.task == "segmentation" else [image]
    start = min(info.offset for info in used)
    stop = max(_end(info) for info in used)
    data = file.span(start, min(stop, file.size) - start)
    first = image.offset_data - start
    width, height = _image_size(data[first : first + image.size], sample.key)
    payload = file.span(label.offset_data, label.size)
    row = {
        "key": sample.key,
        "offset": start,
        "size": len(data),
        "crc32": zlib.crc32(data),
        "image_offset": image.offset_data,
        "image_size": image.size,
        "label_offset": image.offset_data,
        "label_size": 0,
        "width": width,
        "height": height,
    }
    if contents.task == "segmentation":
        row |= {"label_offset": label.offset_data, "label_size": label.size}
        return row | {"labels": _ids_in_mask(payload, sample.key, (height, width), contents)}
    return row | {"labels": _class_ids(payload, sample.key, extension, contents)}


def _pick(
    sample: _Sample, extensions: tuple[str, ...], what: str, taken: tarfile.TarInfo | None = None
) -> tuple[str, tarfile.TarInfo]:
    """The first of the extensions that is there, with its member, which is not the `taken` one."""
    for extension in extensions:
        info = sample.members.get(extension.partition(":")[0])
        if info is not None and info is not taken:
            return extension, info
    raise DataError(
        f"{sample.key}: no {what} ({', '.join(extensions)}); it has "
        f"{', '.join(sorted(sample.members))}, and its members must lie together"
    )


def _end(info: tarfile.TarInfo) -> int:
    return info.offset_data + info.size + -info.size % tarfile.BLOCKSIZE


def _image_size(data: bytes, key: str) -> tuple[int, int]:
    """Width and height in an image's header."""
    try:
        with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            width, height = image.size
            require_upright(image)
    except UnidentifiedImageError:
        reason = f"it begins with {data[:16]!r}" if data else "it is empty"
        raise DataError(f"{key}: no image: {reason}") from None
    except Exception as error:  # Pillow's parsers raise OSError, SyntaxError, struct.error and more
        raise DataError(f"{key}: no image: {error}") from None
    if width * height > MAX_PIXELS:
        raise DataError(f"{key}: {width}x{height} is over the limit of {MAX_PIXELS} pixels")
    return width, height


def _ids_in_mask(data: bytes, key: str, size: tuple[int, int], contents: Contents) -> list[int]:
    mask = decode_mask(data, key)
    if mask.shape != size:
        raise DataError(
            f"{key}: {size[1]}x{size[0]}, but its mask is {mask.shape[1]}x{mask.shape[0]}"
        )
    ids = np.flatnonzero(np.bincount(mask.ravel(), minlength=256)).tolist()
    ids = [number for number in ids if number != contents.ignore_label]
    unknown = [number for number in ids if number >= len(contents.class_names)]
    if unknown:
        raise DataError(
            f"{key}: its mask has the unknown ids {unknown[:9]}; known: "
            f"0..{len(contents.class_names) - 1} and {contents.ignore_label} (ignored); masks are "
            "read as they are: name more classes, or write the shards anew"
        )
    return ids


def _class_ids(data: bytes, key: str, label: str, contents: Contents) -> list[int]:
    extension, _, named = label.partition(":")
    where = f"{key}.{extension}"
    ids = to_class_ids(parse_labels(data, where, named), contents.class_ids, where)
    if contents.task == "classification" and len(ids) != 1:
        raise DataError(f"{where}: {len(ids)} labels; classification takes exactly one")
    return ids
