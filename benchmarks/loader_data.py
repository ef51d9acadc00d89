"""What the loaders of `benchmarks.loader` read: the same bytes in everybody's own format."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from data_pipeline.dataset import Dataset, RawSample, open_dataset
from data_pipeline.prepare import Settings, prepare

CLASSES = 21
SAMPLES_PER_SHARD = 32
_SIZES = ((375, 500), (500, 375), (333, 500), (375, 500))


@dataclass(frozen=True)
class Case:
    """One thing to load: pairs of pictures and masks, or pictures and classes."""

    task: str  # segmentation or classification
    root: Path
    crop: int
    batch: int
    threads: int
    steps: int  # batches that are timed in a round
    url: str = ""  # of the same shards in an object store

    @property
    def dataset(self) -> Dataset:
        """As prepared."""
        return open_dataset(self.root, self.task, "train")

    @property
    def shards(self) -> list[str]:
        """Paths of the shards."""
        return [str(path) for path in sorted((self.root / self.task / "train").glob("*.tar"))]

    @property
    def files(self) -> Path:
        """A folder of the same pictures and labels, a file each."""
        return self.root / f"{self.task}-files"

    @property
    def extension(self) -> str:
        """Of a label's name in a shard."""
        return "seg.png" if self.task == "segmentation" else "cls"


def make_case(case: Case, count: int) -> Case:
    """Prepare the data set of a case, and lay its bytes out as single files."""
    source = case.root / f"{case.task}-source"
    for number, (image, mask) in enumerate(pairs(count)):
        if case.task == "segmentation":
            _write(source / "images" / "train" / f"{number:05d}.jpg", image)
            _write(source / "masks" / "train" / f"{number:05d}.png", mask)
        else:
            _write(source / "train" / f"n{number % CLASSES:08d}" / f"{number:05d}.JPEG", image)
    kind = "folder" if case.task == "segmentation" else "imagenet"
    if kind == "folder":
        names = ", ".join(f"class{i}" for i in range(CLASSES))
        _write(source / "classes.yaml", f"names: [{names}]\nignore_label: 255\n".encode())
    settings = Settings(samples_per_shard=SAMPLES_PER_SHARD)
    prepare(kind, source, case.root / case.task, settings, splits=["train"], workers=1)
    for number, sample in enumerate(read_all(case)):
        _write(case.files / f"{number:05d}.jpg", sample.image)
        _write(case.files / f"{number:05d}.{case.extension}", sample.label)
    return case


def read_all(case: Case) -> Iterator[RawSample]:
    """The samples of a case, as stored."""
    dataset = case.dataset
    return (dataset.read(*dataset.locate(i)) for i in range(dataset.num_samples))


def pairs(count: int) -> Iterator[tuple[bytes, bytes]]:
    """Encoded pictures and masks: of VOC where ATROUS_TEST_DATA has it, else of its sizes."""
    root = Path(os.environ.get("ATROUS_TEST_DATA", "/nowhere")) / "VOCdevkit" / "VOC2012"
    names = root / "ImageSets" / "Segmentation" / "trainval.txt"
    if not names.is_file():
        yield from (drawn_pair(number) for number in range(count))
        return
    for name in names.read_text().split()[:count]:
        image = (root / "JPEGImages" / f"{name}.jpg").read_bytes()
        yield image, (root / "SegmentationClass" / f"{name}.png").read_bytes()


def drawn_pair(number: int) -> tuple[bytes, bytes]:
    """A picture of about 90 KB and a mask of a few blobs with a border of 255."""
    rng = np.random.Generator(np.random.PCG64(number))
    height, width = _SIZES[number % len(_SIZES)]
    picture = sum(_texture(rng, height, width, cell) * weight for cell, weight in _TEXTURES)
    assert not isinstance(picture, int)
    image = simplejpeg.encode_jpeg(picture.clip(0, 255).astype(np.uint8), quality=90)
    blobs = cv2.resize(rng.random((4, 5)), (width, height), interpolation=cv2.INTER_CUBIC)
    mask = np.where(blobs > 0.6, rng.integers(1, CLASSES), 0).astype(np.uint8)
    border = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8)) > 0
    mask[border] = 255
    return image, cv2.imencode(".png", mask)[1].tobytes()


_TEXTURES = ((1, 0.1), (3, 0.3), (60, 0.6))  # cells of so many pixels, their share


def _texture(rng: np.random.Generator, height: int, width: int, cell: int) -> NDArray[np.floating]:
    coarse = rng.integers(0, 256, (height // cell + 1, width // cell + 1, 3)).astype(np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
