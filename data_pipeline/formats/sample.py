"""What every raw data set is read into, and the checks that every picture and mask must pass."""

import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.errors import DataError

IGNORE_LABEL = 255
MAX_PIXELS = 178_956_970  # a picture that unpacks to more than half a gigabyte is taken for a bomb
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
    files: tuple[str, ...] = ()  # what the sample is made of; a change of one makes the sample new
    label: Any = None  # what the format's `load` needs besides the files
    image: bytes | None = None  # filled in by `Split.fetch`
    group: int = 0  # items of one group are read together


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample as it goes into a shard; `image` is the source's bytes, never re-encoded."""

    key: str
    image: bytes
    image_extension: str
    label: bytes
    label_extension: str
    width: int
    height: int
    labels: tuple[int, ...]  # class ids, ascending, ignore label left out


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
    sources: tuple[Path, ...] = ()
    expected_count: int | None = None
    warnings: tuple[str, ...] = ()


def make_key(name: str) -> str:
    """A key that WebDataset reads back whole: to it a dot ends the key, a slash a folder."""
    return re.sub(r"[./\\]", "_", name)


def require_split(source: Path, split: str, available: Sequence[str]) -> None:
    """Refuse a split that is not there.

    Raises:
        DataError: names the splits that are.
    """
    if split not in available:
        raise DataError(f"{source}: no split {split!r}; found: {', '.join(available) or 'none'}")


def require_layout(source: Path, expected: Sequence[str]) -> None:
    """Refuse a folder that lacks one of the `expected` files or folders.

    Raises:
        DataError: names what was expected, what is missing and what lies there instead.
    """
    missing = [name for name in expected if not (source / name).exists()]
    if missing:
        found = sorted(os.listdir(source))[:10] if source.is_dir() else ["no such folder"]
        raise DataError(
            f"{source}: expected {', '.join(expected)}; missing {', '.join(missing)}; "
            f"found: {', '.join(found) or 'nothing'}; name the folder that holds them"
        )


def is_inside(relative: str) -> bool:
    """Whether a path from a data file stays inside the folder it is relative to."""
    return not os.path.isabs(relative) and not os.path.normpath(relative).startswith("..")


def read_bytes(path: str) -> bytes:
    """The bytes of a file.

    Raises:
        DataError: it is missing or cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


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
                image.load()  # a truncated file opens well and fails only here
                return extension, width, height
            reason = f"{width}x{height} is over the limit of {MAX_PIXELS} pixels"
    except Exception as error:  # Pillow's parsers raise OSError, SyntaxError, struct.error and more
        reason = str(error)
    raise DataError(f"{where}: does not decode: {reason}")


def read_mask(path: str) -> NDArray[np.uint8]:
    """The ids in a mask PNG, (H, W): the palette indices themselves, never the palette's colours.

    Raises:
        DataError: missing, corrupt, or coloured instead of indexed.
    """
    data = read_bytes(path)
    check_image(data, path)
    with Image.open(io.BytesIO(data)) as image:
        if image.format != "PNG" or image.mode not in ("P", "L"):
            raise DataError(
                f"{path}: a {image.format} of mode {image.mode} holds no class ids; "
                "expected a palette or 8-bit greyscale PNG"
            )
        return np.asarray(image, dtype=np.uint8)


def segmentation_sample(key: str, path: str, mask: NDArray[np.uint8], num_classes: int) -> Sample:
    """The sample of the picture at `path` and its mask (H, W) of class ids, 255 ignored.

    Raises:
        DataError: the sizes differ, or an id is none of the classes.
    """
    image = read_bytes(path)
    extension, width, height = check_image(image, path)
    if mask.shape != (height, width):
        raise DataError(
            f"{path}: {width}x{height}, but its mask is {mask.shape[1]}x{mask.shape[0]}"
        )
    present = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
    labels = tuple(int(label) for label in present if label != IGNORE_LABEL)
    if labels and labels[-1] >= num_classes:
        unknown = [label for label in labels if label >= num_classes]
        raise DataError(
            f"{path}: its mask has unknown ids {unknown}; known: 0..{num_classes - 1}, 255"
        )
    encoded = cv2.imencode(".png", mask, [cv2.IMWRITE_PNG_COMPRESSION, 6])[1].tobytes()
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
