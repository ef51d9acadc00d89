"""Multi-label pictures in a folder with a list of each split: <split>.tsv or <split>.csv.

A line has the picture's path (relative to the folder of the list) and its labels: names of classes,
separated by commas, or in further columns. A first line that begins with `path` is a heading.
"""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_pipeline.archives import File, is_inside, read_bytes
from data_pipeline.errors import DataError, StorageUnavailable
from data_pipeline.formats.sample import Item, Sample, make_key, multilabel_sample
from data_pipeline.raw_files import open_file
from data_pipeline.source_tree import SourceTree


def find_lists(tree: SourceTree) -> dict[str, File]:
    """The lists in a source by the names of their splits.

    Raises:
        DataError: one split has two lists.
    """
    found: dict[str, File] = {}
    for name, file in tree.files().items():
        stem = Path(name).stem
        if name.endswith((".tsv", ".csv")):
            if stem in found:
                raise DataError(f"{tree.root}: {stem} is there in two forms; leave one of them")
            found[stem] = file
    return found


def class_names(file: File) -> tuple[str, ...]:
    """The sorted labels of a list."""
    return tuple(sorted({name for _, _, names in _read(file) for name in names}))


def list_items(tree: SourceTree, file: File) -> list[Item]:
    """The pictures of a list.

    Raises:
        DataError: a path leaves the source.
    """
    items = []
    for number, name, labels in _read(file):
        if not is_inside(name):
            raise DataError(f"{file} line {number}: path {name!r} leaves the source folder")
        key = make_key(str(Path(name).with_suffix("")))
        items.append(Item(key=key, files=(tree.file(name),), label=(number, labels)))
    return items


def load(class_ids: Mapping[str, int], item: Item) -> Sample:
    """Read one picture.

    Raises:
        DataError: the picture is missing or broken, or a label is unknown.
    """
    number, labels = item.label
    where = f"{item.files[0]} (line {number} of the list)"
    return multilabel_sample(item, read_bytes(item.files[0]), labels, class_ids, where)


def _read(list_file: File) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Line number, path and labels of each line."""
    place = str(list_file)
    tabs = place.endswith(".tsv")
    try:
        with io.TextIOWrapper(open_file(place), encoding="utf-8", newline="") as file:
            lines = csv.reader(
                file,
                delimiter="\t" if tabs else ",",
                quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
                strict=True,
            )
            for row in lines:
                if not row or (lines.line_num == 1 and row[0].strip().lower() == "path"):
                    continue
                labels = (part.strip() for field in row[1:] for part in field.split(","))
                yield lines.line_num, row[0].strip(), tuple(label for label in labels if label)
    except StorageUnavailable:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{place}: not a list of paths and labels ({error})") from None
