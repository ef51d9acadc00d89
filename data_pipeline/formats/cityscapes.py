"""Cityscapes: leftImg8bit/<part>/<city>/*.png with labelIds under gtFine or gtCoarse.

Unpacked, or in the archives as published. Splits: train and val have fine masks, train_extra coarse
ones, test none (those published for it are empty). The coarse splits are the fine
pictures with their fine masks, plus train_extra with its coarse masks: DeepLab's train_coarse has
22,973 = 2,975 + 19,998 pictures, its trainval_coarse 500 more (datasets/data_generator.py).
"""

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
    unlabelled_sample,
)
from data_pipeline.source_tree import SourceTree
from data_pipeline.storage import Place

# labelId: name, in the order of the 19 trainIds (cityscapesScripts, helpers/labels.py)
_CLASSES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
    19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train",
    32: "motorcycle", 33: "bicycle",
}  # fmt: skip
CLASS_NAMES = tuple(_CLASSES.values())
_SUFFIX = "_leftImg8bit.png"
_LAST_ID = 33
_LICENSE_PLATE = 255  # id -1 in 8 bits

_TRAIN_IDS = np.full(256, IGNORE_LABEL, np.uint8)
_TRAIN_IDS[list(_CLASSES)] = range(len(_CLASSES))

ARCHIVES = {
    "leftImg8bit_trainvaltest.zip": "leftImg8bit",
    "leftImg8bit_trainextra.zip": "leftImg8bit",
    "gtFine_trainvaltest.zip": "gtFine",
    "gtCoarse.zip": "gtCoarse",
}
_TRAIN, _VAL, _EXTRA = ("train", "gtFine"), ("val", "gtFine"), ("train_extra", "gtCoarse")
_PARTS = {
    "train": (_TRAIN,),
    "val": (_VAL,),
    "trainval": (_TRAIN, _VAL),
    "train_extra": (_EXTRA,),
    "train_coarse": (_TRAIN, _EXTRA),
    "trainval_coarse": (_TRAIN, _VAL, _EXTRA),
    "test": (("test", ""),),
}
_COUNTS = {
    "train": 2975, "val": 500, "trainval": 3475,
    "train_extra": 19998, "train_coarse": 22973, "trainval_coarse": 23473, "test": 1525,
}  # fmt: skip


def splits(source: Place) -> tuple[str, ...]:
    """The splits whose pictures and masks are there."""
    return _splits(SourceTree(source, ARCHIVES))


def _splits(tree: SourceTree) -> tuple[str, ...]:
    require_layout(tree, ["leftImg8bit"])
    return tuple(
        split
        for split, parts in _PARTS.items()
        if all(
            tree.folders(f"leftImg8bit/{part}") and (not kind or tree.folders(f"{kind}/{part}"))
            for part, kind in parts
        )
    )


def read_split(source: Place, split: str) -> Split:
    """List one split.

    Raises:
        DataError: the layout is another.
    """
    tree = SourceTree(source, ARCHIVES)
    require_split(tree, split, _splits(tree))
    items = []
    for part, kind in _PARTS[split]:
        for city in tree.folders(f"leftImg8bit/{part}"):
            for base, image in tree.files(f"leftImg8bit/{part}/{city}").items():
                if not base.endswith(_SUFFIX):
                    continue
                name = base.removesuffix(_SUFFIX)
                mask = f"{kind}/{part}/{city}/{name}_{kind}_labelIds.png"
                files = (image, tree.file(mask)) if kind else (image,)
                items.append(Item(key=make_key(name), files=files))
    return Split(
        task="segmentation",
        class_names=CLASS_NAMES,
        ignore_label=IGNORE_LABEL,
        items=items,
        load=load if split != "test" else load_image,
        expected_count=_COUNTS[split],
        has_labels=split != "test",
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


def load_image(item: Item) -> Sample:
    """Read one picture that has no mask.

    Raises:
        DataError: it is missing or broken.
    """
    return unlabelled_sample(item.key, item.files[0])
