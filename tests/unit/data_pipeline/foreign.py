"""Shards as others write them, and their index."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import webdataset as wds
from PIL import Image

from data_pipeline.config import ShardContents
from data_pipeline.manifest import Manifest
from data_pipeline.shard_index import index_shards
from data_pipeline.storage import open_storage

TASKS = ("classification", "multilabel", "segmentation")
CLASSES = ("ant", "bee", "cow", "dog", "emu")
COUNTS = (5, 1, 9)


def picture(index: int, height: int = 24, width: int = 33) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(index))
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def jpeg(index: int, **size: int) -> bytes:
    return simplejpeg.encode_jpeg(picture(index, **size))


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def tiff(orientation: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(0)).save(stream, "TIFF", tiffinfo={274: orientation})
    return stream.getvalue()


def mask(index: int, classes: int = 5) -> np.ndarray:
    pixels = picture(index)[..., 0] % classes
    pixels[0] = 255
    return pixels


def sample(task: str, index: int) -> dict[str, Any]:
    """A sample as its owner would hand it to WebDataset, with members that nobody asked for."""
    entry: dict[str, Any] = {"__key__": f"part{index % 3}/{index:04d}", "about.bin": b"x" * 900}
    if task == "segmentation":
        entry |= {"jpg": jpeg(index), "mask.png": png(mask(index)), "txt": "a caption"}
    elif task == "classification":
        entry |= {"png": png(picture(index)), "cls": index % 5, "json": {"cow": True}}
    else:
        names = sorted({CLASSES[index % 5], CLASSES[index % 3]})
        entry |= {"jpeg": jpeg(index), "json": {"labels": names, "score": 1.5}}
    return entry


def write(folder: Path, task: str, counts: Sequence[int] = COUNTS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for number, count in enumerate(counts):
        with wds.TarWriter(str(folder / f"{number:03d}.tar")) as tar:
            for index in range(first, first + count):
                tar.write(sample(task, index))
        first += count


def pack(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def upload(folder: Path, place: str) -> None:
    target = open_storage(place)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with target.writing(path.relative_to(folder).as_posix()) as file:
                file.write(path.read_bytes())


def index(shards: Any, root: Any, task: str = "classification", **options: Any) -> Manifest:
    """Index into root/foreign/train."""
    names = {"image", "label"} & options.keys()
    contents = ShardContents(
        task=task,
        classes=options.pop("classes", CLASSES),
        **{name: options.pop(name) for name in names},
    )
    places = shards if isinstance(shards, list) else [shards]
    return index_shards(places, f"{root}/foreign", "train", contents, **options)


def labelled(label: bytes = b"1", image: bytes | None = None) -> list[tuple[str, bytes]]:
    return [("a.jpg", jpeg(1) if image is None else image), ("a.cls", label)]
