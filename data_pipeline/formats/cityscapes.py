"""Cityscapes: leftImg8bit/<part>/<city>/*.png with labelIds under gtFine or gtCoarse.

Splits: train and val have fine masks, train_extra coarse ones. The coarse splits are the fine
pictures with their fine masks, plus train_extra with its coarse masks: DeepLab's train_coarse has
22,973 = 2,975 + 19,998 pictures, its trainval_coarse 500 more (datasets/data_generator.py).
"""

from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.formats.sample import (
    IGNORE_LABEL,
    Item,
    Sample,
    Split,
    make_key,
    read_mask,
    require_layout,
    require_split,
    segmentation_sample,
)

# labelId: name, in the order of the 19 trainIds (cityscapesScripts, helpers/labels.py)
_CLASSES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
    19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train",
    32: "motorcycle", 33: "bicycle",
}  # fmt: skip
CLASS_NAMES = tuple(_CLASSES.values())
_LAST_ID = 33
_LICENSE_PLATE = 255  # id -1 in 8 bits

_TRAIN_IDS = np.full(256, IGNORE_LABEL, np.uint8)
_TRAIN_IDS[list(_CLASSES)] = range(len(_CLASSES))

_TRAIN, _VAL, _EXTRA = ("train", "gtFine"), ("val", "gtFine"), ("train_extra", "gtCoarse")
_PARTS = {
    "train": (_TRAIN,),
    "val": (_VAL,),
    "trainval": (_TRAIN, _VAL),
    "train_extra": (_EXTRA,),
    "train_coarse": (_TRAIN, _EXTRA),
    "trainval_coarse": (_TRAIN, _VAL, _EXTRA),
}
_COUNTS = {
    "train": 2975, "val": 500, "trainval": 3475,
    "train_extra": 19998, "train_coarse": 22973, "trainval_coarse": 23473,
}  # fmt: skip


def splits(source: Path) -> tuple[str, ...]:
    """The splits whose pictures and masks are there."""
    require_layout(source, ["leftImg8bit"])
    return tuple(
        split
        for split, parts in _PARTS.items()
        if all(
            (source / "leftImg8bit" / part).is_dir() and (source / kind / part).is_dir()
            for part, kind in parts
        )
    )


def read_split(source: Path, split: str) -> Split:
    """List one split.

    Raises:
        DataError: the layout is another.
    """
    require_split(source, split, splits(source))
    items = []
    for part, kind in _PARTS[split]:
        for path in sorted((source / "leftImg8bit" / part).glob("*/*_leftImg8bit.png")):
            name = path.name.removesuffix("_leftImg8bit.png")
            mask = source / kind / part / path.parent.name / f"{name}_{kind}_labelIds.png"
            items.append(Item(key=make_key(name), files=(str(path), str(mask))))
    return Split(
        task="segmentation",
        class_names=CLASS_NAMES,
        ignore_label=IGNORE_LABEL,
        items=items,
        load=load,
        expected_count=_COUNTS[split],
    )


def load(item: Item) -> Sample:
    """Read one picture and its mask, as trainIds.

    Raises:
        DataError: one is missing or broken, the sizes differ, or the mask has ids outside -1..33.
    """
    image, path = item.files
    mask = read_mask(path)
    present = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
    unknown = [int(i) for i in present if i > _LAST_ID and i != _LICENSE_PLATE]
    if unknown:
        raise DataError(f"{path}: unknown labelIds {unknown}; known: -1..{_LAST_ID}")
    return segmentation_sample(item.key, image, _TRAIN_IDS[mask], len(CLASS_NAMES))
