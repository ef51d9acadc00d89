"""ImageNet and anything laid out like it: SOURCE/<split>/<class folder>/<picture>."""

import os
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.formats.sample import (
    Item,
    Sample,
    Split,
    check_image,
    make_key,
    read_bytes,
    require_layout,
    require_split,
)

_EXTENSIONS = (".jpeg", ".jpg", ".png")


def splits(source: Path) -> tuple[str, ...]:
    """The folders of `source` that hold class folders."""
    require_layout(source, ["train"])
    return tuple(sorted(folder.name for folder in source.iterdir() if _class_folders(folder)))


def read_split(source: Path, split: str) -> Split:
    """List one split; class ids count the sorted class folders of `train`, whatever the split.

    Raises:
        DataError: the layout is another, or a class folder is unknown to `train`.
    """
    require_split(source, split, splits(source))
    class_names = _class_folders(source / "train")
    unknown = sorted(set(_class_folders(source / split)) - set(class_names))
    if unknown:
        raise DataError(
            f"{source / split}: class folders that train lacks: {', '.join(unknown[:10])}"
        )
    items: list[Item] = []
    strangers: list[str] = []
    for label, name in enumerate(class_names):
        folder = source / split / name
        for entry in sorted(os.listdir(folder)) if folder.is_dir() else ():
            stem, extension = os.path.splitext(entry)
            if extension.lower() not in _EXTENSIONS:
                strangers.append(f"{name}/{entry}")
                continue
            # ImageNet's training pictures carry their class in the name already.
            key = make_key(stem if stem.startswith(f"{name}_") else f"{name}_{stem}")
            items.append(Item(key=key, files=(str(folder / entry),), label=label))
    return Split(
        task="classification",
        class_names=class_names,
        ignore_label=None,
        items=items,
        load=load,
        warnings=_warn_strangers(source / split, strangers),
    )


def load(item: Item) -> Sample:
    """Read and check one picture.

    Raises:
        DataError: the picture is missing or broken.
    """
    path = item.files[0]
    image = read_bytes(path)
    extension, width, height = check_image(image, path)
    return Sample(
        key=item.key,
        image=image,
        image_extension=extension,
        label=str(item.label).encode("ascii"),
        label_extension="cls",
        width=width,
        height=height,
        labels=(item.label,),
    )


def _class_folders(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        return ()
    with os.scandir(folder) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.is_dir()))


def _warn_strangers(folder: Path, strangers: list[str]) -> tuple[str, ...]:
    if not strangers:
        return ()
    return (
        f"{folder}: {len(strangers)} files are no pictures and were left out, first {strangers[0]}",
    )
