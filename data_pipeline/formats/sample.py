"""What every raw data set is read into, and the checks that every picture and mask must pass."""

import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.archives import File, read_bytes
from data_pipeline.decode import decode_image
from data_pipeline.errors import DataError
from data_pipeline.source_tree import SourceTree

IGNORE_LABEL = 255
MAX_PIXELS = 178_956_970  # a picture that unpacks to more than half a gigabyte is taken for a bomb
# Filters are for gradients: without one, masks are a fifth smaller and are decoded in less time.
_PNG_OF_IDS = [
    cv2.IMWRITE_PNG_COMPRESSION, 7, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE
]  # fmt: skip
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png"}

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One sample that still lies in its source: cheap to list, cheap to send to another process."""

    key: str
    files: tuple[File, ...] = ()  # what the sample is made of; a change of one makes the sample new
    label: Any = None  # what the format's `load` needs besides the files
    image: bytes | None = None  # filled in by `Split.fetch`
    group: int = 0  # items of one group are read together


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample as it goes into a shard; `image` is the source's bytes, never re-encoded.

    A sample without label has an empty one, and no extension for it.
    """

    key: str
    image: bytes
    image_extension: str
    width: int
    height: int
    label: bytes = b""
    label_extension: str = ""
    labels: tuple[int, ...] = ()  # class ids, ascending, ignore label left out


@dataclass(frozen=True, kw_only=True)
class Split:
    """What a format found: the items of one split and how to load them in another process.

    `fetch`, where there is one, brings the bytes of many items into them at once, before `load`.
    `sources` are files that all items depend on, `expected_count` is the official number of items.
    """

    task: str
    class_names: tuple[str, ...]
    ignore_label: int | None
    items: Sequence[Item]
    load: Callable[[Item], Sample]
    fetch: Callable[[Sequence[Item]], Sequence[Item]] | None = None
    sources: tuple[File, ...] = ()
    has_labels: bool = True
    expected_count: int | None = None
    warnings: tuple[str, ...] = ()


def make_key(name: str) -> str:
    """A key that WebDataset reads back whole: to it a dot ends the key, a slash a folder."""
    return re.sub(r"[./\\]", "_", name)


def require_split(tree: SourceTree, split: str, available: Sequence[str]) -> None:
    """Refuse a split that is not there.

    Raises:
        DataError: names the splits that are.
    """
    if split not in available:
        raise DataError(f"{tree.root}: no split {split!r}; found: {', '.join(available) or 'none'}")


def require_layout(tree: SourceTree, expected: Sequence[str]) -> None:
    """Refuse a source that lacks one of the `expected` files or folders.

    Raises:
        DataError: names what was expected, what is missing and what lies there instead.
    """
    missing = [name for name in expected if not tree.exists(name)]
    if missing:
        found = tree.names()[:10] or ["nothing, or no such folder"]
        packed = f" (or the archives {', '.join(tree.archives)})" if tree.archives else ""
        raise DataError(
            f"{tree.root}: expected {', '.join(expected)}{packed}; missing {', '.join(missing)}; "
            f"found: {', '.join(found)}; name the folder that holds them"
        )


def check_image(data: bytes, where: str) -> tuple[str, int, int]:
    """Decode a picture to the end and return (extension by content, width, height).

    Raises:
        DataError: neither JPEG nor PNG, truncated, corrupt or larger than `MAX_PIXELS`.
    """
    extension = next((name for magic, name in _MAGIC.items() if data.startswith(magic)), None)
    if extension is None:
        raise DataError(f"{where}: neither a JPEG nor a PNG (starts with {data[:4]!r})")
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            width, height = image.size
            if width * height <= MAX_PIXELS:
                decode_image(data, where)  # as training will: Pillow overlooks much damage
                return extension, width, height
            reason = f"{width}x{height} is over the limit of {MAX_PIXELS} pixels"
    except DataError as error:
        reason = str(error.__cause__ or error)
    except Exception as error:  # Pillow's parsers raise OSError, SyntaxError, struct.error and more
        reason = str(error)
    raise DataError(f"{where}: does not decode: {reason}")


def read_mask(file: File) -> NDArray[np.uint8]:
    """The ids in a mask PNG, (H, W): the palette indices themselves, never the palette's colours.

    Raises:
        DataError: missing, corrupt, or coloured instead of indexed.
    """
    data = read_bytes(file)
    check_image(data, str(file))
    with Image.open(io.BytesIO(data)) as image:
        if image.format != "PNG" or image.mode not in ("P", "L"):
            raise DataError(
                f"{file}: a {image.format} of mode {image.mode} holds no class ids; "
                "expected a palette or 8-bit greyscale PNG"
            )
        return np.asarray(image, dtype=np.uint8)


def multilabel_sample(
    item: Item, image: bytes, labels: Iterable[str | int], class_ids: Mapping[str, int], where: str
) -> Sample:
    """The sample of an encoded picture and its labels: names of classes, or class ids.

    Raises:
        DataError: the picture is broken, or a label is none of the classes.
    """
    found = set(labels)
    unknown = [
        str(label)
        for label in found
        if (label not in class_ids if isinstance(label, str) else not 0 <= label < len(class_ids))
    ]
    if unknown:
        raise DataError(f"{where}: unknown labels {', '.join(sorted(unknown)[:10])}")
    extension, width, height = check_image(image, where)
    ids = sorted({class_ids[label] if isinstance(label, str) else label for label in found})
    return Sample(
        key=item.key,
        image=image,
        image_extension=extension,
        label=json.dumps(ids).encode("ascii"),
        label_extension="json",
        width=width,
        height=height,
        labels=tuple(ids),
    )


def unlabelled_sample(key: str, file: File) -> Sample:
    """The sample of a picture without a mask.

    Raises:
        DataError: the picture is missing or broken.
    """
    image = read_bytes(file)
    extension, width, height = check_image(image, str(file))
    return Sample(key=key, image=image, image_extension=extension, width=width, height=height)


def segmentation_sample(key: str, file: File, mask: NDArray[np.uint8], num_classes: int) -> Sample:
    """The sample of the picture in `file` and its mask (H, W) of class ids, 255 ignored.

    Raises:
        DataError: the sizes differ, or an id is none of the classes.
    """
    image = read_bytes(file)
    extension, width, height = check_image(image, str(file))
    if mask.shape != (height, width):
        raise DataError(
            f"{file}: {width}x{height}, but its mask is {mask.shape[1]}x{mask.shape[0]}"
        )
    present = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
    labels = tuple(int(label) for label in present if label != IGNORE_LABEL)
    if labels and labels[-1] >= num_classes:
        unknown = [label for label in labels if label >= num_classes]
        raise DataError(
            f"{file}: its mask has unknown ids {unknown}; known: 0..{num_classes - 1}, 255"
        )
    encoded = cv2.imencode(".png", mask, _PNG_OF_IDS)[1].tobytes()
    return Sample(
        key=key,
        image=image,
        image_extension=extension,
        label=encoded,
        label_extension="seg.png",
        width=width,
        height=height,
        labels=labels,
    )
