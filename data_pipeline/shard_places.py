"""Finds WebDataset shards by what their users write: files, {000..012}, *, folders; disk or s3://.

Never `pipe:` and its like: what WebDataset hands to a shell is no place.
"""

import fnmatch
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from data_pipeline.errors import DataError
from data_pipeline.raw_files import file_version, forget_listings, list_folder
from data_pipeline.storage import Place, is_local, join, open_storage

_MAX_SHARDS = 200_000
_SHARD = ".tar"
_PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_COMMAND = re.compile(r"^[a-z]+:(?!/)")  # pipe:curl ..., but no s3://

Stamp = tuple[int, int | str]  # size, and time or ETag: what tells of a change


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """The shards of a split below one place, in their order."""

    place: str
    stamps: Mapping[str, Stamp]  # by name, relative to `place`


def find_shards(places: Sequence[Place]) -> ShardSet:
    """The shards at `places`, in that order; those of a folder, or of a pattern with *, sorted.

    Raises:
        DataError: there are none, one is missing, named twice or packed, or a place is a command.
    """
    forget_listings()
    try:
        found = list(islice((shard for place in places for shard in _expand(place)), _MAX_SHARDS))
        _check(found, " ".join(map(str, places)))
        stamps = {shard: _stamp(shard) for shard in found}
    finally:
        forget_listings()
    base = _common_folder(found)
    return ShardSet(
        place=base, stamps={shard[len(base) + 1 :]: stamp for shard, stamp in stamps.items()}
    )


def _check(found: Sequence[str], shown: str) -> None:
    if not found or len(found) == _MAX_SHARDS:
        problem = f"{_MAX_SHARDS} shards or more" if found else "no shards"
        raise DataError(
            f"{shown}: {problem}; name .tar files, also with {{000..012}} or *, or the folder or "
            "s3://bucket/prefix that holds them"
        )
    if len(set(found)) < len(found):
        twice = next(shard for shard in found if found.count(shard) > 1)
        raise DataError(f"{shown}: {twice} is named twice; name each shard once")


def _expand(place: Place) -> Iterator[str]:
    text = str(place)
    if _COMMAND.match(text):
        raise DataError(
            f"{text}: commands are never run; name local paths or s3://bucket/prefix, "
            "or copy or mount the shards"
        )
    try:
        places = list(islice(braceexpand(text), _MAX_SHARDS))
    except ValueError:
        raise DataError(f"{text}: its braces do not match; write {{000..012}}") from None
    for each in places:
        yield from _list(str(Path(each).absolute()) if is_local(each) else join(each))


def _list(place: str) -> Iterator[str]:
    """The shards that a place without braces stands for."""
    folder, _, name = place.rpartition("/")
    if name.endswith(_PACKED):
        raise _refusal(place)
    if name.endswith(_SHARD) and "*" not in name:
        yield place
        return
    folder, pattern = (folder, name) if "*" in name else (place, f"*{_SHARD}")
    if not is_local(place):
        open_storage(folder)  # says what is wrong with the name
    files = sorted(list_folder(folder).files)
    matching = [file for file in files if fnmatch.fnmatchcase(file, pattern)]
    packed = [file for file in files if file.endswith(_PACKED)]
    if not matching and packed:
        raise _refusal(join(folder, packed[0]))
    yield from (join(folder, file) for file in matching)


def _refusal(place: str) -> DataError:
    return DataError(
        f"{place}: samples of a compressed archive cannot be read one by one; unpack it to a .tar "
        "(gunzip, zstd -d): JPEGs and PNGs take no more room"
    )


def _stamp(shard: str) -> Stamp:
    stamp = file_version(shard)
    if stamp is None or (is_local(shard) and not os.path.isfile(shard)):
        raise DataError(f"{shard}: no such shard; copy it completely or correct the place")
    return stamp


def _common_folder(shards: Sequence[str]) -> str:
    if len({is_local(shard) for shard in shards}) == 1:
        folder = join(os.path.commonpath([shard.rpartition("/")[0] for shard in shards]))
        if is_local(shards[0]) or all(shard.startswith(f"{folder}/") for shard in shards):
            return folder.rstrip("/")
    raise DataError(
        f"{shards[0]} and {shards[-1]}: the shards of a split lie on one disk or in one bucket; "
        "make them splits of their own"
    )
