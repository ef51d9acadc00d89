"""Multi-label pictures in WebDataset shards: <split>/*.tar or <split>-000000.tar and so on.

A sample has a picture (jpg, jpeg or png) and labels: `json`, a list of class names or ids, perhaps
under "labels"; or `cls`, names or ids separated by commas.
"""

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data_pipeline.archives import TarMember, file_place, read_bytes, tar_members
from data_pipeline.errors import DataError
from data_pipeline.formats.sample import Item, Sample, make_key, multilabel_sample
from data_pipeline.source_tree import SourceTree

_IMAGES = ("jpg", "jpeg", "png")
_LABELS = ("json", "cls")
_SEPARATORS = re.compile(r"[,\n]")
_CONNECTIONS = 16
_NUMBERED = re.compile(r"(.+?)[-_.]\d+\.tar")


def find_shards(tree: SourceTree) -> dict[str, list[str]]:
    """The shards in the root and its folders, by the names of their splits."""
    found: dict[str, list[str]] = {}
    for folder in tree.folders():
        for name, file in tree.files(folder).items():
            if name.endswith(".tar"):
                found.setdefault(folder, []).append(file_place(file))
    for name, file in tree.files().items():
        if match := _NUMBERED.fullmatch(name):
            found.setdefault(match[1], []).append(file_place(file))
    return found


def list_items(shards: Sequence[str]) -> list[Item]:
    """The samples of the shards: members of one name up to its first dot, as WebDataset has it.

    Raises:
        DataError: a shard is no tar archive, or cut short.
    """
    with ThreadPoolExecutor(_CONNECTIONS) as threads:  # a bucket's are listed by many requests
        return [item for items in threads.map(_list_shard, shards) for item in items]


def _list_shard(shard: str) -> list[Item]:
    samples: dict[str, dict[str, TarMember]] = {}
    twice: dict[str, str] = {}
    for member in tar_members(shard):
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        name = f"{folder}/{stem}" if folder else stem
        members, kind = samples.setdefault(name, {}), extension.lower()
        if kind in members:
            twice[name] = kind
        members[kind] = member
    return [_item(shard, name, members, twice.get(name)) for name, members in samples.items()]


def _item(shard: str, name: str, members: Mapping[str, TarMember], twice: str | None) -> Item:
    """A sample; its label says what is wrong with its members, None: nothing."""
    image = next((members[kind] for kind in _IMAGES if kind in members), None)
    label = next((members[kind] for kind in _LABELS if kind in members), None)
    files = tuple(member for member in (image, label) if member is not None)
    problem = None
    if twice is not None:
        problem = f"{shard}: {name} has two members .{twice}; one of the two would be lost"
    elif len(files) != 2:
        problem = (
            f"{shard}: {name} has {', '.join(members)} only; a sample needs one of "
            f"{', '.join(_IMAGES)} and of {', '.join(_LABELS)}"
        )
    return Item(key=make_key(name), files=files, label=problem)


def load(class_ids: Mapping[str, int], item: Item) -> Sample:
    """Read one sample.

    Raises:
        DataError: picture or labels are missing or broken, or a label is unknown.
    """
    if item.label is not None:
        raise DataError(item.label)
    image, label = item.files
    labels = parse_labels(read_bytes(label), str(label))
    return multilabel_sample(item, read_bytes(image), labels, class_ids, str(image))


def parse_labels(data: bytes, where: str, field: str = "") -> list[str | int]:
    """The labels in a member called `where`: class names or ids.

    Of .json the text is one of them, a list of them, or an object with them under `field`
    (without a field: under labels or label). Of all else it is names or ids between commas.

    Raises:
        DataError: it is none of that.
    """
    try:
        text = data.decode("utf-8")
        if not where.lower().endswith(".json"):
            parts = [part.strip() for part in _SEPARATORS.split(text)]
            return [int(part) if part.isdigit() else part for part in parts if part]
        content: Any = json.loads(text)
        if isinstance(content, dict):
            content = content[field or ("label" if "labels" not in content else "labels")]
        labels = content if isinstance(content, list) else [content]
        if not all(type(entry) in (str, int) for entry in labels):
            raise ValueError("no list of names or ids")
    except (KeyError, ValueError) as error:
        raise DataError(f"{where}: labels cannot be read ({error!r})") from None
    return labels


def to_class_ids(
    labels: Sequence[str | int], class_ids: Mapping[str, int], where: str
) -> list[int]:
    """The ids of labels, ascending, each once.

    Raises:
        DataError: one is none of the classes.
    """
    ids = {label: class_ids.get(label, -1) if isinstance(label, str) else label for label in labels}
    unknown = [str(label) for label, number in ids.items() if not 0 <= number < len(class_ids)]
    if unknown:
        raise DataError(
            f"{where}: unknown labels {', '.join(unknown[:10])}; there are {len(class_ids)} classes"
        )
    return sorted(set(ids.values()))
