"""Indexes WebDataset shards that others wrote: a manifest is made, the shards stay where they are.

Each shard is read once. What was found in it is kept beside the manifest in `.parts`, under a name
that stands for the shard as it is (size, and time or ETag) and for what is looked for: an index
that was interrupted goes on, and one whose shards have changed reads these alone.
"""

import hashlib
import io
import json
import logging
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from data_pipeline.config import ShardContents
from data_pipeline.errors import DataError
from data_pipeline.foreign_shards import Contents, IndexedShard, index_shard
from data_pipeline.in_order import InOrder
from data_pipeline.manifest import FILE_NAME, Manifest, Shard, read_manifest, write_manifest
from data_pipeline.parts import PARTS
from data_pipeline.shard_places import ShardSet, Stamp, find_shards
from data_pipeline.storage import Place, Storage, is_local, join, open_storage

Progress = Callable[[str, int, int], None]

FORMAT = "shards"
_VERSION = 1  # raise it when the same shards give other rows
_KEY = b"atrous.index"
_PART = ".parquet"
_THREADS = 16
_IGNORE_LABEL = 255
_LABELS = {
    "classification": ("cls",),
    "multilabel": ("json", "cls"),
    "segmentation": ("seg.png", "mask.png", "png"),
}
_SKIPS_LISTED = 1000
_SKIPS_SHOWN = 10

log = logging.getLogger(__name__)


def index_shards(
    shards: Sequence[Place],
    destination: Place,
    split: str,
    contents: ShardContents,
    *,
    on_broken: str = "fail",
    threads: int = _THREADS,
    progress: Progress | None = None,
) -> Manifest:
    """Write the manifest of `shards` to destination/split, or find it there as it should be.

    Args:
        shards: files, also with {000..012} or *, or folders, on a disk or in a bucket.
        destination: the data set's directory or s3://bucket/prefix; its name is the data set's.
        split: the name of this part of it.
        contents: what the samples consist of.
        on_broken: "fail", or "skip" to leave broken samples out and count them.
        threads: shards read at the same time.
        progress: called with (split, shards done, shards in all).

    Raises:
        DataError: shards are missing or no tars, samples are broken (and `on_broken` is "fail"), a
            prepared data set is in the way, or a file cannot be read or written.
    """
    if is_local(destination):
        destination = Path(destination).absolute()
    try:
        index = _Index(
            found=find_shards(shards),
            destination=join(destination),
            split=split,
            contents=_resolve(contents),
            on_broken=on_broken,
        )
        return index.build(threads, progress)
    except OSError as error:
        raise DataError(
            f"{error.filename or destination}: {error.strerror or error}; mend that and start "
            "again: shards that are done are not read again"
        ) from error


@dataclass(frozen=True, kw_only=True)
class _Index:
    """The index of one split."""

    found: ShardSet
    destination: str
    split: str
    contents: Contents
    on_broken: str

    @property
    def place(self) -> str:
        return join(self.destination, self.split)

    @cached_property
    def storage(self) -> Storage:
        return open_storage(self.place)

    def build(self, threads: int, progress: Progress | None) -> Manifest:
        """Read what is new or has changed, then publish the whole."""
        parts = {name: self._part_name(name, stamp) for name, stamp in self.found.stamps.items()}
        plan = _digest([list(parts.items()), self.on_broken])
        manifest = self._published()
        if manifest is None or manifest.source["plan"] != plan or manifest.shards_at != self._at:
            indexed = list(self._read(parts, manifest is not None, threads, progress))
            self._publish(indexed, parts, plan)
            manifest = read_manifest(self.place)
            self._clean(set(parts.values()))
        if progress:
            progress(self.split, manifest.num_samples, manifest.num_samples)
        return manifest

    @property
    def _at(self) -> str:
        """Where the shards are: relative to the manifest, if both are below one data root."""
        root, base = self.destination.rpartition("/")[0], self.found.place
        return posixpath.relpath(base, self.place) if f"{base}/".startswith(f"{root}/") else base

    def _part_name(self, name: str, stamp: Stamp) -> str:
        return f"{PARTS}/{_digest([_VERSION, asdict(self.contents), name, stamp])[:32]}{_PART}"

    def _published(self) -> Manifest | None:
        """The index that is there."""
        if self.storage.size(FILE_NAME) is None:
            return None
        manifest = read_manifest(self.place)
        if manifest.shards_at is None:
            raise DataError(
                f"{self.place}: holds a prepared data set ({manifest.source.get('path')}); "
                "name another destination or split for the index"
            )
        return manifest

    def _read(
        self, parts: Mapping[str, str], again: bool, threads: int, progress: Progress | None
    ) -> Iterator[IndexedShard]:
        """What is in each shard, in their order; without rows, which are in the parts."""
        listed = set(self.storage.names(f"{PARTS}/"))
        new = [name for name, part in parts.items() if part not in listed]
        if again and new:
            log.warning(
                "%s: %d of %d shards are new or have changed since they were indexed (%s); they "
                "are indexed again, and what trains on them starts anew",
                *(self.place, len(new), len(parts), ", ".join(new[:3])),
            )
        shards = open_storage(self.found.place)
        calls: Iterable[Callable[[], IndexedShard]] = (
            partial(self._read_one, shards, name, part, part in listed)
            for name, part in parts.items()
        )
        groups = InOrder(((None, [call]) for call in calls), threads, 2 * threads)
        for number, (_, (indexed,)) in enumerate(groups, 1):
            if progress:
                progress(self.split, number, len(parts))
            yield indexed

    def _read_one(self, shards: Storage, name: str, part: str, listed: bool) -> IndexedShard:
        done = _read_part(self.storage, part) if listed else None
        if done is None:
            done = index_shard(shards, name, self.found.stamps[name][0], self.contents)
            header = {"shard": asdict(done.shard), "skipped": done.skipped}
            table = done.rows.replace_schema_metadata({_KEY: json.dumps(header).encode()})
            with self.storage.writing(part) as file:
                pq.write_table(table, file)
        return IndexedShard(shard=done.shard, rows=None, skipped=done.skipped)

    def _publish(
        self, indexed: Sequence[IndexedShard], parts: Mapping[str, str], plan: str
    ) -> None:
        broken = [entry for one in indexed for entry in one.skipped]
        shards = tuple(one.shard for one in indexed if one.shard.num_samples)
        if broken and (self.on_broken == "fail" or not shards):
            raise DataError(_broken(self.split, broken))
        if not shards:
            raise DataError(f"{self.found.place}: no samples in {len(indexed)} shards")
        contents = self.contents
        manifest = Manifest(
            dataset=self.destination.rpartition("/")[2],
            split=self.split,
            task=contents.task,
            class_names=contents.class_names,
            ignore_label=contents.ignore_label,
            shards=shards,
            shards_at=self._at,
            source={
                "format": FORMAT,
                "path": self.found.place,
                "contents": {"image": contents.image, "label": contents.label},
                "plan": plan,
                "skipped": len(broken),
                "skipped_items": broken[:_SKIPS_LISTED],
                "warnings": [],
            },
        )
        calls = (partial(_read_part, self.storage, parts[shard.name]) for shard in shards)
        tables = InOrder(((None, [call]) for call in calls), _THREADS, 2 * _THREADS)
        write_manifest(self.place, manifest, (_rows(part) for _, (part,) in tables))

    def _clean(self, wanted: set[str]) -> None:
        """Drop what was found in shards as they were before; not what another run is writing."""
        for name in self.storage.names(f"{PARTS}/"):
            if name.endswith(_PART) and name not in wanted:
                self.storage.delete(name)


def _rows(part: IndexedShard | None) -> pa.Table:
    assert part is not None  # it was read, or written, just now
    return part.rows


def _read_part(storage: Storage, name: str) -> IndexedShard | None:
    """What was found in a shard; None where the file is cut short."""
    try:
        table = pq.ParquetFile(io.BytesIO(storage.read_whole(name))).read()
    except pa.ArrowInvalid:
        return None
    header = json.loads(table.schema.metadata[_KEY])
    return IndexedShard(
        shard=Shard(**header["shard"]),
        rows=table.replace_schema_metadata(None),
        skipped=header["skipped"],
    )


def _broken(split: str, broken: Sequence[Mapping[str, str]]) -> str:
    listed = "\n".join(f"  {entry['reason']}" for entry in broken[:_SKIPS_SHOWN])
    more = len(broken) - _SKIPS_SHOWN
    return (
        f"{split}: {len(broken)} broken samples or shards; mend them, or leave them out "
        f"(--skip-broken, on_broken: skip)\n{listed}"
        + (f"\n  ... and {more} more" if more > 0 else "")
    )


def _resolve(wanted: ShardContents) -> Contents:
    """What is looked for, with the names of the classes."""
    names, ignored = _classes(wanted.classes)
    if len(set(names)) != len(names) or not names:
        raise DataError(f"classes: {wanted.classes}: {len(names)} names, {len(set(names))} of them "
                        "different; name each class once")  # fmt: skip
    if wanted.task == "segmentation" and not len(names) <= ignored:
        raise DataError(f"classes: {len(names)} names, and ignore_label {ignored} among their ids")
    return Contents(
        task=wanted.task,
        image=wanted.image,
        label=wanted.label or _LABELS[wanted.task],
        class_names=names,
        ignore_label=ignored if wanted.task == "segmentation" else None,
    )


def _classes(wanted: str | int | tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    """The names of the classes, and the id of ignored pixels."""
    if isinstance(wanted, int):
        return tuple(str(number) for number in range(wanted)), _IGNORE_LABEL
    if isinstance(wanted, tuple):
        return wanted, _IGNORE_LABEL
    wanted = str(Path(wanted).absolute()) if is_local(wanted) else wanted
    folder, _, name = wanted.rpartition("/")
    text = open_storage(folder or "/").read_whole(name).decode("utf-8", "replace")
    if name.endswith(".txt"):
        return tuple(line.strip() for line in text.splitlines() if line.strip()), _IGNORE_LABEL
    try:
        content: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{wanted}: not YAML: {error}") from None
    content = content if isinstance(content, dict) else {"names": content}
    names, ignored = content.get("names"), content.get("ignore_label", _IGNORE_LABEL)
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(
            f"{wanted}: names: write a list of names, or a mapping of the ids 0, 1, 2, ... to "
            "names; the ids in shards cannot be changed"
        )
    if content.keys() - {"names", "ignore_label"} or type(ignored) is not int:
        raise DataError(f"{wanted}: may have names and ignore_label (a number), nothing else")
    return tuple(names), ignored


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
