"""Noisy multi-label pictures like JFT's, of any number of classes.

A split is SOURCE/<split>.parquet, or a list <split>.tsv or .csv (see `label_lists`), or WebDataset
shards (see `labelled_shards`). classes.txt has the names of the classes, in the order of their ids.

Columns of a Parquet file: `labels` (list of class names) and either `image` (the encoded picture)
or `path` (relative to SOURCE). Row groups of some hundred rows suit `image` best: a row group is
read by every shard that holds one of its rows.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.archives import File, is_inside, read_bytes
from data_pipeline.errors import DataError
from data_pipeline.formats import label_lists, labelled_shards
from data_pipeline.formats.sample import (
    Item,
    Sample,
    Split,
    multilabel_sample,
    require_split,
)
from data_pipeline.raw_files import open_file
from data_pipeline.source_tree import SourceTree
from data_pipeline.storage import Place, is_local

_LARGE_GROUP = 8192  # rows; reading these over and over for every shard would dominate
_PARQUET, _CLASSES = ".parquet", "classes.txt"
_BATCH = 64  # rows of pictures in memory at a time


def splits(source: Place) -> tuple[str, ...]:
    """The Parquet files, lists and sets of shards in `source`."""
    return _splits(SourceTree(source))


def _splits(tree: SourceTree) -> tuple[str, ...]:
    found = [name.removesuffix(_PARQUET) for name in tree.files() if name.endswith(_PARQUET)]
    found += [*label_lists.find_lists(tree), *labelled_shards.find_shards(tree)]
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise DataError(f"{tree.root}: {twice[0]} is there in two forms; leave one of them")
    return tuple(sorted(found))


def read_split(source: Place, split: str) -> Split:
    """List one split; without classes.txt the classes are the sorted labels of train.

    Raises:
        DataError: a column is missing, or there is nothing to take class names from.
    """
    tree = SourceTree(source)
    require_split(tree, split, _splits(tree))
    class_names, origin = _class_names(tree)
    if tree.has_file(f"{split}{_PARQUET}"):
        return _read_parquet(tree, split, class_names, origin)
    class_ids = {name: number for number, name in enumerate(class_names)}
    sources = [origin]
    if listed := label_lists.find_lists(tree).get(split):
        sources.append(listed)
        items = label_lists.list_items(tree, listed)
        load_item = partial(label_lists.load, class_ids)
    else:
        items = labelled_shards.list_items(labelled_shards.find_shards(tree)[split])
        load_item = partial(labelled_shards.load, class_ids)
    return Split(
        task="multilabel",
        class_names=class_names,
        ignore_label=None,
        items=items,
        load=load_item,
        sources=tuple(sources),
    )


def _read_parquet(
    tree: SourceTree, split: str, class_names: tuple[str, ...], origin: File
) -> Split:
    file = tree.file(f"{split}{_PARQUET}")
    path = str(file)
    items: list[Item] = []
    warnings: tuple[str, ...] = ()
    with _open(path) as parquet:
        embedded = "image" in parquet.schema_arrow.names
        for group in range(parquet.num_row_groups):
            items += _list_group(parquet, group, tree, len(items))
        rows = max(
            (parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)),
            default=0,
        )
        if embedded and rows > _LARGE_GROUP:
            warnings = (
                f"{path}: row groups of {rows} rows read slowly; write it with row_group_size=512",
            )
    return Split(
        task="multilabel",
        class_names=class_names,
        ignore_label=None,
        items=items,
        load=partial(load, {name: i for i, name in enumerate(class_names)}, os.path.basename(path)),
        fetch=partial(fetch, path) if embedded else None,
        sources=(file, origin),
        warnings=warnings,
    )


def fetch(path: str, items: Sequence[Item]) -> list[Item]:
    """Put the pictures of `items` into them, reading each of their row groups once.

    Raises:
        DataError: the Parquet file cannot be read.
    """
    wanted = {(item.group, item.label[0]) for item in items}
    found: dict[tuple[int, int], bytes | None] = {}
    with _open(path) as parquet:
        for group in sorted({item.group for item in items}):
            start = 0
            try:
                for batch in parquet.iter_batches(_BATCH, row_groups=[group], columns=["image"]):
                    for row in range(start, start + len(batch)):
                        if (group, row) in wanted:
                            found[group, row] = batch.column(0)[row - start].as_py()
                    start += len(batch)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{path}: row group {group} cannot be read: {error}") from None
    return [replace(item, image=found[item.group, item.label[0]]) for item in items]


def load(class_ids: dict[str, int], file_name: str, item: Item) -> Sample:
    """Check one row.

    Raises:
        DataError: the picture is missing, broken or outside SOURCE, or a label is unknown.
    """
    position, names = item.label
    where = f"{file_name} row {int(item.key)}"
    if names is None:
        raise DataError(f"{where}: labels is null; an empty list means no label")
    return multilabel_sample(item, _image(item, where, position), names, class_ids, where)


def _image(item: Item, where: str, position: int | str | None) -> bytes:
    if item.image is not None:
        return item.image
    if not isinstance(position, str):
        raise DataError(f"{where}: neither an image nor a path")
    if not is_inside(position):
        raise DataError(f"{where}: path {position!r} leaves the source folder")
    return read_bytes(item.files[0])


def _list_group(parquet: pq.ParquetFile, group: int, tree: SourceTree, first: int) -> list[Item]:
    embedded = "image" in parquet.schema_arrow.names
    table = parquet.read_row_group(group, columns=["labels"] if embedded else ["labels", "path"])
    paths = [None] * len(table) if embedded else table["path"].to_pylist()
    items = []
    for row, (names, path) in enumerate(zip(table["labels"].to_pylist(), paths, strict=True)):
        items.append(
            Item(
                key=f"{first + row:09d}",
                files=(tree.file(path),) if path is not None and is_inside(path) else (),
                label=(row if embedded else path, names),
                # Pictures inside the file are read by row group; paths can be read in any order.
                group=group if embedded else 0,
            )
        )
    return items


def _class_names(tree: SourceTree) -> tuple[tuple[str, ...], File]:
    """The class names, and the file that they come from."""
    if tree.has_file(_CLASSES):
        listed = tree.file(_CLASSES)
        lines = read_bytes(listed).decode("utf-8").splitlines()
        names = tuple(line.strip() for line in lines if line.strip())
        if len(set(names)) != len(names):
            raise DataError(f"{listed}: a class is listed twice; class ids are the line numbers")
        return names, listed
    if not tree.has_file(f"train{_PARQUET}"):
        if (found := label_lists.find_lists(tree).get("train")) is not None:
            return label_lists.class_names(found), found
        raise DataError(
            f"{tree.root}: neither classes.txt nor train.parquet or train.tsv to take the class "
            "names from; write classes.txt, a name in each line"
        )
    train = tree.file(f"train{_PARQUET}")
    seen: set[str] = set()
    with _open(str(train)) as parquet:
        for group in range(parquet.num_row_groups):
            column = parquet.read_row_group(group, columns=["labels"])["labels"]
            seen.update(name for names in column.to_pylist() if names for name in names)
    return tuple(sorted(seen)), train


def _open(path: str) -> pq.ParquetFile:
    source: Any = path if is_local(path) else open_file(path)
    try:
        parquet = pq.ParquetFile(
            source, buffer_size=1 << 20
        )  # otherwise a column chunk is read whole
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file ({error})") from None
    schema = parquet.schema_arrow
    problem = _schema_problem(schema)
    if problem:
        parquet.close()
        raise DataError(f"{path}: {problem}; found columns: {', '.join(map(str, schema))}")
    return parquet


def _schema_problem(schema: pa.Schema) -> str | None:
    def is_text(kind: pa.DataType) -> bool:
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    types = {name: schema.field(name).type for name in schema.names}
    labels, image, path = (types.get(name) for name in ("labels", "image", "path"))
    if not isinstance(labels, pa.ListType | pa.LargeListType) or not is_text(labels.value_type):
        return "column labels must be list<string>"
    if image is not None:
        is_binary = pa.types.is_binary(image) or pa.types.is_large_binary(image)
        return None if is_binary else "column image must be binary"
    if path is None or not is_text(path):
        return "expected a column image (binary) or path (string)"
    return None
