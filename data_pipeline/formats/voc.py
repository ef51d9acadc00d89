"""PASCAL VOC 2012 segmentation, with or without the extra masks of SBD.

Unpacked, or in the archives as published. `trainaug` is what its list says or, without one, all
pictures that SBD annotates and VOC's val has not, united with VOC's train: 10,582. Its masks come
from SegmentationClassAug, the widespread PNGs, where that is there, else from SBD itself
(benchmark.tgz, Hariharan et al. 2011), whose masks only stand in where VOC has none of its own.
"""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.archives import File, is_inside, read_bytes
from data_pipeline.errors import DataError
from data_pipeline.formats.sample import (
    IGNORE_LABEL,
    VOC_CLASSES,
    Item,
    Sample,
    Split,
    make_key,
    read_mask,
    require_layout,
    require_split,
    segmentation_sample,
)
from data_pipeline.source_tree import SourceTree
from data_pipeline.storage import Place

ARCHIVES = {
    "VOCtrainval_11-May-2012.tar": "VOCdevkit",
    "SegmentationClassAug.zip": "SegmentationClassAug",
    "benchmark.tgz": "benchmark_RELEASE",
}
_LISTS = "ImageSets/Segmentation"
_MASKS, _AUGMENTED = "SegmentationClass", "SegmentationClassAug"
_SBD = "benchmark_RELEASE/dataset"
_TRAINAUG = "trainaug"
_COUNTS = {"train": 1464, "val": 1449, _TRAINAUG: 10582, "trainval": 2913}


def splits(source: Place) -> tuple[str, ...]:
    """The lists in ImageSets/Segmentation, and trainaug where it can be made without one."""
    tree = SourceTree(source, ARCHIVES)
    return _splits(tree, _root(tree))


def read_split(source: Place, split: str) -> Split:
    """List one split; those named trainaug* take masks of SegmentationClassAug or SBD.

    Raises:
        DataError: the layout is another, or a line of the list is no picture's name.
    """
    tree = SourceTree(source, ARCHIVES)
    root = _root(tree)
    require_split(tree, split, _splits(tree, root))
    listed = tree.exists(f"{root}{_LISTS}/{split}.txt")
    names = _read_list(tree, f"{root}{_LISTS}/{split}.txt") if listed else _trainaug(tree, root)
    masks = tree.files(f"{root}{_MASKS}")
    extra: dict[str, File] = {}
    if split.startswith(_TRAINAUG):
        ready_made = _ready_made(tree, root)
        masks, extra = masks | ready_made, {} if ready_made else tree.files(f"{_SBD}/cls")
    items = []
    for name in names:
        mask = masks.get(f"{name}.png") or extra.get(f"{name}.mat")
        files = (
            tree.file(f"{root}JPEGImages/{name}.jpg"),
            mask or tree.file(f"{root}{_MASKS}/{name}.png"),
        )
        items.append(Item(key=make_key(name), files=files))
    return Split(
        task="segmentation",
        class_names=VOC_CLASSES,
        ignore_label=IGNORE_LABEL,
        items=items,
        load=load,
        sources=(tree.file(f"{root}{_LISTS}/{split}.txt"),) if listed else (),
        expected_count=_COUNTS.get(split),
    )


def load(item: Item) -> Sample:
    """Read one picture and its mask.

    Raises:
        DataError: one is missing or broken, the sizes differ, or the mask has unknown ids.
    """
    image, mask = item.files
    ids = read_sbd_mask(mask) if str(mask).endswith(".mat") else read_mask(mask)
    return segmentation_sample(item.key, image, ids, len(VOC_CLASSES))


def read_sbd_mask(file: File) -> NDArray[np.uint8]:
    """The class ids (H, W) in one of SBD's cls/*.mat.

    Raises:
        DataError: missing, or no such file.
    """
    from scipy.io import loadmat

    data = read_bytes(file)
    try:
        content = loadmat(io.BytesIO(data), squeeze_me=True, struct_as_record=False)
        mask = np.asarray(content["GTcls"].Segmentation)
        if mask.ndim != 2 or mask.dtype != np.uint8:
            raise ValueError(f"Segmentation is {mask.dtype} of {mask.ndim} dimensions")
    except Exception as error:  # scipy's reader raises whatever damaged bytes lead to
        raise DataError(f"{file}: not a mask of SBD ({error!r})") from None
    return np.ascontiguousarray(mask)


def _splits(tree: SourceTree, root: str) -> tuple[str, ...]:
    found = {Path(name).stem for name in tree.files(f"{root}{_LISTS}") if name.endswith(".txt")}
    # benchmark.tgz takes a while to open, so it is not asked for what its name says already.
    sbd = tree.holds("benchmark_RELEASE")
    if {"train", "val"} <= found and (sbd or _ready_made(tree, root)):
        found.add(_TRAINAUG)
    return tuple(sorted(found))


def _trainaug(tree: SourceTree, root: str) -> list[str]:
    """The names of trainaug where no list has them."""
    annotated = {name.removesuffix(".png") for name in _ready_made(tree, root)}
    if not annotated:
        require_layout(tree, [f"{_SBD}/cls", f"{_SBD}/train.txt", f"{_SBD}/val.txt"])
        annotated.update(*(_read_list(tree, f"{_SBD}/{part}.txt") for part in ("train", "val")))
    annotated.difference_update(_read_list(tree, f"{root}{_LISTS}/val.txt"))
    annotated.update(_read_list(tree, f"{root}{_LISTS}/train.txt"))
    return sorted(annotated)


def _ready_made(tree: SourceTree, root: str) -> dict[str, File]:
    """The PNGs of SegmentationClassAug, which is put beside SegmentationClass or in the source."""
    return tree.files(f"{root}{_AUGMENTED}") or tree.files(_AUGMENTED)


def _read_list(tree: SourceTree, name: str) -> list[str]:
    file = tree.file(name)
    names = read_bytes(file).decode("utf-8", "replace").split()
    for entry in names:
        if not is_inside(entry) or "/" in entry:
            raise DataError(f"{file}: {entry!r} is not the name of a picture")
    return names


def _root(tree: SourceTree) -> str:
    """The folder that holds JPEGImages, empty or with a slash at its end: one of the usual ones."""
    candidates = ("", "VOCdevkit/VOC2012/", "VOC2012/")
    root = next((path for path in candidates if tree.exists(f"{path}JPEGImages")), "")
    require_layout(tree, [f"{root}{name}" for name in ("JPEGImages", _MASKS, _LISTS)])
    return root
