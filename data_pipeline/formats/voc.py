"""PASCAL VOC 2012 segmentation, with or without the extra masks of SBD (SegmentationClassAug)."""

from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.formats.sample import (
    IGNORE_LABEL,
    VOC_CLASSES,
    Item,
    Sample,
    Split,
    is_inside,
    make_key,
    read_mask,
    require_layout,
    require_split,
    segmentation_sample,
)

_LISTS = Path("ImageSets/Segmentation")
_MASKS, _AUGMENTED = "SegmentationClass", "SegmentationClassAug"
_COUNTS = {"train": 1464, "val": 1449, "trainaug": 10582, "trainval": 2913}


def splits(source: Path) -> tuple[str, ...]:
    """The lists in ImageSets/Segmentation."""
    return tuple(sorted(path.stem for path in (_root(source) / _LISTS).glob("*.txt")))


def read_split(source: Path, split: str) -> Split:
    """List one split; splits named trainaug* take SegmentationClassAug where it has the mask.

    Raises:
        DataError: the layout is another, or a line of the list is no picture's name.
    """
    require_split(source, split, splits(source))
    root = _root(source)
    path = root / _LISTS / f"{split}.txt"
    augmented = split.startswith("trainaug") and (root / _AUGMENTED).is_dir()
    items = []
    for name in path.read_text("utf-8").split():
        if not is_inside(name) or "/" in name:
            raise DataError(f"{path}: {name!r} is not the name of a picture")
        mask = root / _AUGMENTED / f"{name}.png"
        if not augmented or not mask.exists():
            mask = root / _MASKS / f"{name}.png"
        files = (str(root / "JPEGImages" / f"{name}.jpg"), str(mask))
        items.append(Item(key=make_key(name), files=files))
    return Split(
        task="segmentation",
        class_names=VOC_CLASSES,
        ignore_label=IGNORE_LABEL,
        items=items,
        load=load,
        sources=(path,),
        expected_count=_COUNTS.get(split),
    )


def load(item: Item) -> Sample:
    """Read one picture and its mask.

    Raises:
        DataError: one is missing or broken, the sizes differ, or the mask has unknown ids.
    """
    image, mask = item.files
    return segmentation_sample(item.key, image, read_mask(mask), len(VOC_CLASSES))


def _root(source: Path) -> Path:
    """The folder that holds JPEGImages: `source` or one of the usual folders in it."""
    candidates = (source, source / "VOCdevkit" / "VOC2012", source / "VOC2012")
    root = next((path for path in candidates if (path / "JPEGImages").is_dir()), source)
    require_layout(root, ["JPEGImages", _MASKS, str(_LISTS)])
    return root
