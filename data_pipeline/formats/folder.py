"""Pictures and masks of one's own: images/, masks/ and classes.yaml.

    images/a.jpg            masks/a.png             with train.txt, val.txt: names, one a line
    images/train/a.jpg      masks/train/a.png       or with a folder of each split

Names of lists begin with train, val or test. Without either, all pictures are `train`. Masks are
PNGs of class ids (grey or palette), or coloured ones whose colours the `palette` of classes.yaml
has. A split `test` may do without masks.

    names: [background, road, car]        # or {1: road, 2: car}, where ids do not count from 0
    ignore_label: 255                     # id of pixels that do not count
    palette: {background: [0, 0, 0], road: [128, 64, 128], car: [0, 0, 142], ignore: [0, 0, 1]}
"""

import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_pipeline.archives import File, is_inside, read_bytes
from data_pipeline.errors import DataError
from data_pipeline.formats.sample import (
    IGNORE_LABEL,
    Item,
    Sample,
    Split,
    check_image,
    make_key,
    read_mask,
    require_layout,
    require_split,
    segmentation_sample,
    unlabelled_sample,
)
from data_pipeline.raw_files import StoredObject
from data_pipeline.source_tree import SourceTree
from data_pipeline.storage import Place

_CLASSES = "classes.yaml"
_LIST = re.compile(r"(train|val|test)\w*\.txt")
_EXTENSIONS = (".jpg", ".jpeg", ".png")
_TRAIN, _TEST = "train", "test"
_IGNORE = "ignore"

_Byte = Annotated[int, Field(ge=0, le=255)]


class _ClassFile(BaseModel):
    """What classes.yaml may say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    names: tuple[str, ...] | dict[_Byte, str]
    ignore_label: _Byte = IGNORE_LABEL
    palette: dict[str, tuple[_Byte, _Byte, _Byte]] = {}

    @property
    def by_id(self) -> dict[int, str]:
        """The name of each id in a mask."""
        return self.names if isinstance(self.names, dict) else dict(enumerate(self.names))

    @model_validator(mode="after")
    def _consistent(self) -> "_ClassFile":
        names = list(self.by_id.values())
        if not 1 <= len(names) <= IGNORE_LABEL:
            raise ValueError(f"names: {len(names)} classes; a mask holds 1 to {IGNORE_LABEL}")
        if len(set(names)) != len(names) or _IGNORE in names:
            raise ValueError(f"names: each class once, and none of them {_IGNORE!r}")
        if self.ignore_label in self.by_id:
            raise ValueError(
                f"ignore_label: {self.ignore_label} is the id of {self.by_id[self.ignore_label]}; "
                "leave it out of names, which may be a mapping of ids to names"
            )
        if strangers := sorted(self.palette.keys() - {*names, _IGNORE}):
            raise ValueError(f"palette: {strangers[0]} is none of the names, nor {_IGNORE!r}")
        if len(set(self.palette.values())) != len(self.palette):
            raise ValueError("palette: two classes have one colour")
        return self


@dataclass(frozen=True, kw_only=True)
class Classes:
    """How the masks of a folder are read: ids and colours to class ids from 0, 255 for ignored."""

    names: tuple[str, ...]
    ids: Mapping[int, int]
    colours: Mapping[int, int]  # keys are 0xRRGGBB

    def read(self, file: File) -> NDArray[np.uint8]:
        """The class ids (H, W) in a mask.

        Raises:
            DataError: missing, broken, or with an id or a colour that classes.yaml lacks.
        """
        data = read_bytes(file)
        check_image(data, str(file))
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in ("RGB", "RGBA") or image.format != "PNG":
                return self._translate(read_mask(file), self.ids, "id {}", file)
            if not self.colours:
                raise DataError(
                    f"{file}: a mask of colours; give {_CLASSES} a palette, or write masks of ids"
                )
            pixels = np.asarray(image.convert("RGB"), dtype=np.uint32)
        packed = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
        return self._translate(packed, self.colours, "colour #{:06x}", file)

    def _translate(
        self, values: NDArray[Any], to: Mapping[int, int], kind: str, file: File
    ) -> NDArray[np.uint8]:
        found = np.unique(values)
        unknown = [kind.format(int(value)) for value in found if int(value) not in to]
        if unknown:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise DataError(f"{file}: {', '.join(unknown[:5])}{more}: not in {_CLASSES}")
        table = np.array([to[int(value)] for value in found], np.uint8)
        return table[np.searchsorted(found, values)]


def splits(source: Place) -> tuple[str, ...]:
    """The lists in `source`, else the folders in images, else train."""
    tree = SourceTree(source)
    require_layout(tree, ["images", _CLASSES])
    lists = sorted(Path(name).stem for name in tree.files() if _LIST.fullmatch(name))
    if lists:
        return tuple(lists)
    folders = tree.folders("images")
    if folders and any(_is_image(name) for name in tree.files("images")):
        raise DataError(
            f"{tree.place('images')}: pictures beside the folders {', '.join(folders[:5])}; "
            "put all into folders named after splits, or write lists train.txt and val.txt"
        )
    return folders or (_TRAIN,)


def read_split(source: Place, split: str) -> Split:
    """List one split.

    Raises:
        DataError: the layout is another, classes.yaml is wrong, or a listed picture is not there.
    """
    tree = SourceTree(source)
    require_split(tree, split, splits(source))
    classes = read_classes(tree)
    pictures = _pictures(tree, split)
    has_labels = split != _TEST or any(tree.exists(mask) for _, _, mask in pictures)
    if has_labels:
        require_layout(tree, ["masks"])
    items = [
        Item(key=make_key(stem), files=(image, tree.file(mask)) if has_labels else (image,))
        for stem, image, mask in pictures
    ]
    return Split(
        task="segmentation",
        class_names=classes.names,
        ignore_label=IGNORE_LABEL,
        items=items,
        load=partial(load, classes),
        sources=(tree.file(_CLASSES),),
        has_labels=has_labels,
    )


def load(classes: Classes, item: Item) -> Sample:
    """Read one picture and its mask, if it is to have one.

    Raises:
        DataError: one is missing or broken, the sizes differ, or the mask has unknown ids.
    """
    if len(item.files) == 1:
        return unlabelled_sample(item.key, item.files[0])
    image, mask = item.files
    if _is_missing(mask):
        raise DataError(f"{image}: has no mask; expected {mask}")
    return segmentation_sample(item.key, image, classes.read(mask), len(classes.names))


def read_classes(tree: SourceTree) -> Classes:
    """What classes.yaml says.

    Raises:
        DataError: it is no YAML, or says something that cannot be.
    """
    path = tree.place(_CLASSES)
    try:
        content = _ClassFile.model_validate(yaml.safe_load(tree.read(_CLASSES)))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {place + ': ' if place else ''}{first['msg']}") from None
    names = tuple(content.by_id[key] for key in sorted(content.by_id))
    targets = {name: number for number, name in enumerate(names)} | {_IGNORE: IGNORE_LABEL}
    ids = {key: targets[name] for key, name in content.by_id.items()}
    return Classes(
        names=names,
        ids=ids | {content.ignore_label: IGNORE_LABEL},
        colours={
            red << 16 | green << 8 | blue: targets[name]
            for name, (red, green, blue) in content.palette.items()
        },
    )


def _pictures(tree: SourceTree, split: str) -> list[tuple[str, File, str]]:
    """Name, picture and the mask's place of each picture of a split."""
    folder = split if not tree.exists(f"{split}.txt") and tree.folders("images") else ""
    prefix = f"/{folder}" if folder else ""
    found = {}
    for name, file in tree.walk(f"images{prefix}"):
        if _is_image(name):
            stem = os.path.splitext(name)[0]
            found[name] = (stem, file, f"masks{prefix}/{stem}.png")
    if not tree.exists(f"{split}.txt"):
        return list(found.values())
    by_stem = {entry[0]: entry for entry in found.values()}
    chosen = []
    for line in tree.read(f"{split}.txt").decode("utf-8", "replace").splitlines():
        if name := line.strip():
            entry = found.get(name) or by_stem.get(name) if is_inside(name) else None
            if entry is None:
                raise DataError(f"{tree.place(split)}.txt: no picture {name!r} in images")
            chosen.append(entry)
    return chosen


def _is_missing(file: File) -> bool:
    if isinstance(file, StoredObject):
        return file.size is None
    return isinstance(file, str) and not os.path.exists(file)


def _is_image(name: str) -> bool:
    return name.lower().endswith(_EXTENSIONS)
