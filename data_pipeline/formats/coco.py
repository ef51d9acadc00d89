"""COCO 2017 as a segmentation of the 20 VOC classes: annotations/instances_*2017.json and pictures.

Unpacked, or in the archives as published: train2017.zip, val2017.zip, annotations_trainval2017.zip.
The mask of a picture is painted in this order: crowd regions of VOC classes as ignored, then the
instances from the largest to the smallest, so a small object in front of a large one is seen. Other
classes are background, as in DeepLabv3.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from data_pipeline.archives import is_inside, read_bytes
from data_pipeline.errors import DataError
from data_pipeline.formats.sample import (
    IGNORE_LABEL,
    VOC_CLASSES,
    Item,
    Sample,
    Split,
    make_key,
    require_layout,
    require_split,
    segmentation_sample,
)
from data_pipeline.source_tree import SourceTree
from data_pipeline.storage import Place

_YEAR = "2017"
ARCHIVES = {
    "train2017.zip": "train2017",
    "val2017.zip": "val2017",
    "annotations_trainval2017.zip": "annotations",
}
_RENAMED = {
    "airplane": "aeroplane",
    "motorcycle": "motorbike",
    "couch": "sofa",
    "potted plant": "pottedplant",
    "dining table": "diningtable",
    "tv": "tvmonitor",
}

# (class id, annotation id, crowd, area, segmentation): what a worker needs of an annotation
Annotation = tuple[int, int, bool, float, Any]


def splits(source: Place) -> tuple[str, ...]:
    """Those of train and val that have annotations."""
    return _splits(SourceTree(source, ARCHIVES))


def _splits(tree: SourceTree) -> tuple[str, ...]:
    require_layout(tree, ["annotations"])
    return tuple(name for name in ("train", "val") if tree.exists(_annotation_file(name)))


def read_split(source: Place, split: str, *, min_area: float = 1000) -> Split:
    """List the pictures with an instance of a VOC class of more than `min_area` pixels.

    Crowds do not count; 1000 pixels is the choice of DeepLabv3. `split` is
    train or val; train2017 and val2017 mean the same.

    Raises:
        DataError: the layout is another, or the annotation file is none of COCO's.
    """
    name = split.removesuffix(_YEAR)
    tree = SourceTree(source, ARCHIVES)
    require_split(tree, name, _splits(tree))
    require_layout(tree, [f"{name}{_YEAR}"])
    path = tree.file(_annotation_file(name))
    try:
        content = json.loads(read_bytes(path))
        annotations = _by_image(content)
        items = [
            _item(tree, f"{name}{_YEAR}", image, annotations[image["id"]])
            for image in sorted(content["images"], key=lambda image: image["id"])
            if any(_counts(annotation, min_area) for annotation in annotations.get(image["id"], ()))
        ]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not COCO's instance annotations ({error!r})") from None
    return Split(
        task="segmentation",
        class_names=VOC_CLASSES,
        ignore_label=IGNORE_LABEL,
        items=items,
        load=load,
        sources=(path,),
    )


def load(item: Item) -> Sample:
    """Read one picture and paint its mask.

    Raises:
        DataError: the picture or one of its regions is broken, or their sizes differ.
    """
    height, width, annotations = item.label
    mask = np.zeros((height, width), np.uint8)
    for class_id, annotation_id, crowd, _, segmentation in sorted(annotations, key=_painting_order):
        where = f"{item.files[0]}: annotation {annotation_id}"
        mask[region(segmentation, height, width, where)] = IGNORE_LABEL if crowd else class_id
    return segmentation_sample(item.key, item.files[0], mask, len(VOC_CLASSES))


def region(segmentation: Any, height: int, width: int, where: str) -> NDArray[np.bool_]:
    """The pixels (H, W) of polygons, or of a run-length code, compressed or not.

    Raises:
        DataError: the code does not fit the picture, or a polygon has less than three corners.
    """
    try:
        if isinstance(segmentation, dict):
            code = _checked_code(segmentation, height, width)
        else:
            if not segmentation or min(len(polygon) for polygon in segmentation) < 6:
                raise ValueError(
                    "a polygon needs three corners"
                )  # four numbers would pass as a box
            code = rle.merge(rle.frPyObjects(segmentation, height, width))
        return np.asarray(rle.decode(code), dtype=np.bool_)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: broken region: {error}") from None


def _checked_code(segmentation: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    size, counts = segmentation["size"], segmentation["counts"]
    if list(size) != [height, width]:
        raise ValueError(f"size {size} for a picture of {[height, width]}")
    if not isinstance(counts, list):
        return {"size": size, "counts": counts.encode() if isinstance(counts, str) else counts}
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise ValueError(f"runs of {sum(counts)} pixels for a picture of {height * width}")
    code: dict[str, Any] = rle.frPyObjects(segmentation, height, width)
    return code


def _by_image(content: dict[str, Any]) -> dict[int, list[Annotation]]:
    """The annotations of VOC classes; categories are matched by name, as ids differ by release."""
    names = {
        entry["id"]: _RENAMED.get(entry["name"], entry["name"]) for entry in content["categories"]
    }
    class_ids = {key: VOC_CLASSES.index(name) for key, name in names.items() if name in VOC_CLASSES}
    found: dict[int, list[Annotation]] = {}
    for entry in content["annotations"]:
        class_id = class_ids.get(entry["category_id"])
        if class_id is not None:
            crowd = bool(entry.get("iscrowd", 0))
            row = (
                class_id,
                entry["id"],
                crowd,
                float(entry["area"]),
                _compact(entry["segmentation"]),
            )
            found.setdefault(entry["image_id"], []).append(row)
    return found


def _compact(segmentation: Any) -> Any:
    """Polygons as arrays: a quarter of the memory of lists of floats; COCO has millions."""
    if isinstance(segmentation, list):
        return [np.asarray(polygon, dtype=np.float64) for polygon in segmentation]
    return segmentation


def _item(
    tree: SourceTree, folder: str, image: dict[str, Any], annotations: list[Annotation]
) -> Item:
    name = image["file_name"]
    if not is_inside(name):
        raise DataError(
            f"{tree.place(folder)}: file_name {name!r} leaves the folder of the pictures"
        )
    label = (int(image["height"]), int(image["width"]), tuple(annotations))
    key = make_key(str(Path(name).with_suffix("")))
    return Item(key=key, files=(tree.file(f"{folder}/{name}"),), label=label)


def _counts(annotation: Annotation, min_area: float) -> bool:
    _, _, crowd, area, _ = annotation
    return not crowd and area > min_area


def _painting_order(annotation: Annotation) -> tuple[bool, float, int]:
    _, annotation_id, crowd, area, _ = annotation
    return not crowd, -area, annotation_id


def _annotation_file(split: str) -> str:
    return f"annotations/instances_{split}{_YEAR}.json"
