"""Prepares a raw data set: destination/<split>/shard-000000.tar ... and, last of all, the manifest.

The destination is a local directory or a prefix of a bucket.

Killed at any moment, it goes on where it was: every finished shard has its rows beside it in
`.parts`, under a digest of the shard's own inputs, and is written again only when one has changed.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from data_pipeline.archives import file_stamp, forget_archives
from data_pipeline.errors import DataError
from data_pipeline.formats import cityscapes, coco, folder, imagenet, multilabel, voc
from data_pipeline.formats.sample import Item, Split
from data_pipeline.manifest import FILE_NAME, Manifest, read_manifest, write_manifest
from data_pipeline.parts import PARTS, Part, Run, ShardTask, in_processes, read_rows, run_tasks
from data_pipeline.source_tree import SourceTree
from data_pipeline.storage import Place, Storage, is_local, join, open_storage

FORMATS: Mapping[str, ModuleType] = {
    "cityscapes": cityscapes,
    "coco": coco,
    "folder": folder,
    "imagenet": imagenet,
    "multilabel": multilabel,
    "voc": voc,
}
_VERSION = 3  # raise it when the same inputs give other shards
_SKIPS_LISTED = 1000
_SKIPS_SHOWN = 10
_CONNECTIONS = 16

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What determines the shards, besides the source.

    `limit` takes that many samples of the shuffled split, `options` are the format's own
    (coco: `min_area`), `on_broken` is "fail" or "skip".
    """

    dataset: str | None = None  # None: the name of the destination
    samples_per_shard: int = 512
    seed: int = 0
    limit: int | None = None
    on_broken: str = "fail"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.on_broken not in ("fail", "skip"):
            raise DataError(f"on_broken: {self.on_broken!r}; choose fail or skip")
        if self.samples_per_shard < 1 or (self.limit is not None and self.limit < 1):
            raise DataError(
                f"samples_per_shard {self.samples_per_shard}, limit {self.limit}: "
                "must be at least 1"
            )


def prepare(
    format: str,
    source: Place,
    destination: Place,
    settings: Settings | None = None,
    *,
    splits: Sequence[str] | None = None,
    workers: int | Run | None = None,
    progress: Progress | None = None,
) -> dict[str, Manifest]:
    """Prepare `splits` (None: all there are) of a raw data set of one of `FORMATS`.

    Args:
        format: the layout of `source`.
        source: directory or s3://bucket/prefix of the raw data set, unpacked or in its archives;
            only read.
        destination: directory or s3://bucket/prefix, gets one folder per split; one finished from
            the same inputs is left as it is.
        settings: what the shards shall be.
        splits: which splits to prepare, in this order.
        workers: processes, None: one per core; or what runs the tasks instead, on a cluster, say.
        progress: called with (split, samples done, samples in all) as shards are finished.

    Returns:
        The manifest of each split; its `source` has the warnings and the inputs left out.

    Raises:
        DataError: the layout is another, inputs are broken (and `on_broken` is "fail"), a split is
            empty, or the destination holds it prepared from other inputs. It is not published then.
    """
    settings = settings or Settings()
    module = _format(format, settings.options)
    source = str(Path(source).absolute()) if is_local(source) else join(source)
    run = workers if callable(workers) else in_processes(workers or len(os.sched_getaffinity(0)))
    try:
        _check_source(source, format)
        chosen = tuple(splits) if splits is not None else module.splits(source)
        if not chosen:
            raise DataError(f"{source}: no split in the layout of {format}")
        results = {}
        target = str(Path(destination).resolve() if is_local(destination) else join(destination))
        for name in chosen:
            split = module.read_split(source, name, **settings.options)
            job = _Job(format, source, target, settings, name, split)
            results[name] = job.run(run, progress)
    finally:
        forget_archives()
    return results


def shuffled(items: Sequence[Item], seed: int, pool: int) -> list[Item]:
    """`items` in an order that depends on the seed and their keys alone.

    Groups are shuffled whole, then items within runs of groups of at least `pool` items, so that a
    shard draws on few groups; items that are all of one group are shuffled freely.
    """

    def draw(name: str) -> bytes:
        return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()

    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    result: list[Item] = []
    pending: list[Item] = []
    for group in sorted(groups, key=lambda number: draw(f"group {number}")):
        pending += groups[group]
        if len(pending) >= pool:
            result += sorted(pending, key=lambda item: draw(item.key))
            pending = []
    return result + sorted(pending, key=lambda item: draw(item.key))


@dataclass(frozen=True)
class _Job:
    """The preparation of one split."""

    format: str
    source: str
    destination: str
    settings: Settings
    name: str
    split: Split

    @property
    def place(self) -> str:
        return join(self.destination, self.name)

    @cached_property
    def storage(self) -> Storage:
        return open_storage(self.place)

    def run(self, run: Run, progress: Progress | None) -> Manifest:
        """Prepare the split, or find it prepared."""
        items = self._items()
        tasks = self._tasks(items)
        plan = _digest([self.dataset, self.name, [task.digest for task in tasks]])
        if (finished := self._finished(plan)) is None:
            parts = self._run_tasks(tasks, run, progress)
            self._publish(parts, plan, len(items))
            finished = read_manifest(self.place)
        elif progress:
            progress(self.name, len(items), len(items))
        self._clean(finished)
        if self.settings.on_broken == "fail":
            _refuse_broken(finished.source["skipped_items"], finished.source["skipped"], self.name)
        return finished

    @property
    def dataset(self) -> str:
        return self.settings.dataset or self.destination.rstrip("/").rpartition("/")[2]

    def _items(self) -> list[Item]:
        if not self.split.items:
            raise DataError(f"{self.source}: split {self.name!r} is empty")
        seen: dict[str, Item] = {}
        for item in self.split.items:
            if item.key in seen:
                names = [str((*entry.files, entry.key)[0]) for entry in (seen[item.key], item)]
                raise DataError(
                    f"{names[0]} and {names[1]}: both have the key {item.key!r}; rename one"
                )
            seen[item.key] = item
        pool = 4 * self.settings.samples_per_shard
        return shuffled(self.split.items, self.settings.seed, pool)[: self.settings.limit]

    def _tasks(self, items: Sequence[Item]) -> list[ShardTask]:
        split, size = self.split, self.settings.samples_per_shard
        common = _digest(
            [
                _VERSION,
                self.format,
                [split.task, split.class_names, split.ignore_label],
                dict(self.settings.options),
                [file_stamp(file) for file in split.sources],
            ]
        )
        return [
            ShardTask(
                place=self.place,
                name=f"shard-{start // size:06d}.tar",
                digest=_digest([common, [_listing(item) for item in items[start : start + size]]]),
                items=items[start : start + size],
                load=split.load,
                fetch=split.fetch,
                sources=split.sources,
                # What failed may have been the disk or the network: try again.
                reuse_broken=self.settings.on_broken == "skip",
            )
            for start in range(0, len(items), size)
        ]

    def _finished(self, plan: str) -> Manifest | None:
        """The manifest in the directory, if it has the same inputs and its shards are there."""
        if self.storage.size(FILE_NAME) is None:
            return None
        try:
            manifest = read_manifest(self.place)
        except DataError as error:
            raise DataError(f"{error} (delete {self.place} first)") from None
        if manifest.source.get("plan") != plan:
            raise DataError(
                f"{self.place}: prepared before from other inputs or settings "
                f"({manifest.source.get('path')}); delete it or choose another destination"
            )
        with ThreadPoolExecutor(_CONNECTIONS) as threads:
            sizes = threads.map(self.storage.size, [shard.name for shard in manifest.shards])
            if list(sizes) == [shard.size for shard in manifest.shards]:
                return manifest
        self.storage.delete(FILE_NAME)  # incomplete: no reader may trust it
        return None

    def _run_tasks(
        self, tasks: Sequence[ShardTask], run: Run, progress: Progress | None
    ) -> list[Part]:
        total, done = sum(len(task.items) for task in tasks), 0
        parts = []
        for part in run_tasks(tasks, run):
            parts.append(part)
            done += part.shard.num_samples + len(part.skipped)
            if progress:
                progress(self.name, done, total)
        if self.settings.on_broken == "fail":
            broken = [entry for part in sorted(parts, key=_by_name) for entry in part.skipped]
            _refuse_broken(broken, len(broken), self.name)
        return sorted(parts, key=_by_name)

    def _publish(self, parts: Sequence[Part], plan: str, num_items: int) -> None:
        kept = [part for part in parts if part.shard.num_samples]
        skipped = [entry for part in parts for entry in part.skipped]
        if not kept:
            raise DataError(
                f"{self.source}: all {num_items} inputs of {self.name!r} are broken; "
                f"first: {skipped[0]['reason']}"
            )
        split = self.split
        manifest = Manifest(
            dataset=self.dataset,
            split=self.name,
            task=split.task,
            class_names=split.class_names,
            ignore_label=split.ignore_label,
            has_labels=split.has_labels,
            shards=tuple(part.shard for part in kept),
            source={
                "format": self.format,
                "path": self.source,
                "options": asdict(self.settings),
                "plan": plan,
                "items": num_items,
                "skipped": len(skipped),
                "skipped_items": skipped[:_SKIPS_LISTED],
                "warnings": [*split.warnings, *self._count_warning()],
            },
        )
        assert manifest.num_samples == num_items - len(skipped)
        write_manifest(self.place, manifest, (read_rows(self.storage, part.shard) for part in kept))

    def _count_warning(self) -> Iterator[str]:
        expected, found = self.split.expected_count, len(self.split.items)
        if expected is not None and found != expected:
            yield f"{self.name}: {found} inputs; the official split has {expected}"

    def _clean(self, manifest: Manifest) -> None:
        """Remove what the published split does not need: parts, leftovers of killed runs."""
        wanted = {shard.name for shard in manifest.shards}
        prefixes = ("shard-", ".shard-", f"{PARTS}/")
        found = [name for prefix in prefixes for name in self.storage.names(prefix)]
        with ThreadPoolExecutor(_CONNECTIONS) as threads:
            list(threads.map(self.storage.delete, [name for name in found if name not in wanted]))


def _format(name: str, options: Mapping[str, Any]) -> ModuleType:
    module = FORMATS.get(name)
    if module is None:
        near = get_close_matches(name, FORMATS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise DataError(f"format {name!r}: {hint}choose one of {', '.join(FORMATS)}")
    known = list(inspect.signature(module.read_split).parameters)[2:]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise DataError(
            f"format {name} has no option {', '.join(unknown)}; "
            f"it has: {', '.join(known) or 'none'}"
        )
    return module


def _check_source(source: str, format: str) -> None:
    expected = f"expected a data set in the layout of {format}"
    if is_local(source):
        path = Path(source)
        if not path.is_dir():
            problem = "is a file; name its folder" if path.exists() else "no such folder"
            raise DataError(f"{source}: {problem}; {expected}")
    elif not SourceTree(source).names():
        raise DataError(f"{source}: no object has a name that goes on from it with /; {expected}")


def _refuse_broken(broken: Sequence[Mapping[str, str]], count: int, split: str) -> None:
    if count:
        listed = "\n".join(
            f"  {entry['key']}: {entry['reason']}" for entry in broken[:_SKIPS_SHOWN]
        )
        more = f"\n  ... and {count - _SKIPS_SHOWN} more" if count > _SKIPS_SHOWN else ""
        raise DataError(
            f"{split}: {count} broken inputs; mend them, or leave them out "
            "(--skip-broken, on_broken: skip)\n"
            f"{listed}{more}"
        )


def _by_name(part: Part) -> str:
    return part.shard.name


def _listing(item: Item) -> list[Any]:
    return [item.key, [file_stamp(file) for file in item.files]]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
