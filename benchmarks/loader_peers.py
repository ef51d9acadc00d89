"""Everybody's way to load a case of `benchmarks.loader`, ours and the decoders alone among them.

The peers decode with Pillow and augment with torchvision, as the reference scripts of torchvision
do (references/segmentation and references/classification, Pillow backend); what differs is who
reads, shuffles, spreads and collates: worker processes, or threads of SPDL's.
"""

import io
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image

from benchmarks.clock import clock
from benchmarks.loader_data import Case, read_all
from data_pipeline.config import Cache, TrainData
from data_pipeline.kept_pixels import keep_pixels
from data_pipeline.loader import TrainLoader

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ENDLESS = 1 << 30  # samples: epochs of a small data set would end before workers are up
SETTLE = 6  # batches that loaders have ready before a round begins; they are not counted
Round = Callable[[], tuple[int, float, float]]  # samples, seconds, processor seconds
Pair = tuple[Any, Any]


class Augment:
    """torchvision's reference presets for training: encoded bytes to normalised float32 tensors."""

    def __init__(self, case: Case) -> None:
        self._crop = case.crop
        self._segmentation = case.task == "segmentation"

    def __call__(self, image: bytes, label: bytes) -> Pair:
        """Of a picture and a mask, or a picture and a class."""
        picture = Image.open(io.BytesIO(image)).convert("RGB")
        if self._segmentation:
            return self._pair(picture, Image.open(io.BytesIO(label)))
        return self._picture(picture), int(label)

    def _picture(self, picture: Image.Image) -> torch.Tensor:
        """RandomResizedCrop, flip, normalise."""
        from torchvision.transforms import RandomResizedCrop, functional

        picture = RandomResizedCrop(self._crop, antialias=True)(picture)
        return normalised(functional.hflip(picture) if random.random() < 0.5 else picture)

    def _pair(self, picture: Image.Image, mask: Image.Image) -> Pair:
        """RandomResize of half to twice the size, flip, RandomCrop with padding, normalise."""
        from torchvision.transforms import InterpolationMode, functional

        size = int(min(picture.size) * random.uniform(0.5, 2))
        picture = functional.resize(picture, [size], antialias=True)
        mask = functional.resize(mask, [size], InterpolationMode.NEAREST)
        if random.random() < 0.5:
            picture, mask = functional.hflip(picture), functional.hflip(mask)
        width, height = picture.size
        below, right = max(0, self._crop - height), max(0, self._crop - width)
        if below or right:
            picture = functional.pad(picture, [0, 0, right, below], fill=0)
            mask = functional.pad(mask, [0, 0, right, below], fill=255)
        top = random.randint(0, height + below - self._crop)
        left = random.randint(0, width + right - self._crop)
        place = top, left, self._crop, self._crop
        ids = functional.pil_to_tensor(functional.crop(mask, *place)).squeeze(0)
        return normalised(functional.crop(picture, *place)), ids.long()


def normalised(picture: Image.Image) -> torch.Tensor:
    from torchvision.transforms import functional

    pixels = functional.convert_image_dtype(functional.pil_to_tensor(picture))
    return functional.normalize(pixels, MEAN, STD)


class Files(torch.utils.data.Dataset[Pair]):
    """A folder of pictures and labels, for torchvision's way."""

    def __init__(self, case: Case) -> None:
        self._paths = sorted(case.files.glob("*.jpg"))
        self._extension = case.extension
        self._augment = Augment(case)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Pair:
        path = self._paths[index]
        return self._augment(
            path.read_bytes(), path.with_suffix(f".{self._extension}").read_bytes()
        )


def ours(case: Case) -> Iterator[int]:
    """`TrainLoader`."""
    with train_loader(case) as loader:
        for batch in loader:
            yield len(batch.keys)


def ours_kept(case: Case) -> Iterator[int]:
    """`TrainLoader` after its first epoch with `keep_pixels`."""
    kept = keep_pixels(case.dataset, Cache(directory=str(case.root / "cache")))
    assert kept is not None
    for raw in read_all(case):
        kept.image(raw)
    with train_loader(case, kept_pixels=kept) as loader:
        for batch in loader:
            yield len(batch.keys)


def train_loader(case: Case, stop_step: int = 1 << 40, **options: Any) -> TrainLoader:
    dataset = options.pop("dataset", None) or case.dataset
    block_size = options.pop("block_size", 1)
    return TrainLoader(
        dataset=dataset,
        task=case.task,
        data=TrainData(dataset=case.task, crop=case.crop, block_size=block_size),
        seed=0,
        global_batch=case.batch,
        slots=range(case.batch),
        num_classes=len(dataset.manifest.class_names),
        stop_step=stop_step,
        threads=case.threads,
        **options,
    )


def torchvision(case: Case) -> Iterator[int]:
    """A map-style data set of files in a DataLoader."""
    files = Files(case)
    order = torch.utils.data.RandomSampler(files, replacement=True, num_samples=_ENDLESS)
    return _sizes(_data_loader(case, files, sampler=order))


def webdataset(case: Case) -> Iterator[int]:
    """Its pipeline over the same shards in its DataLoader."""
    return _sizes(web_loader(case, case.shards, resampled=True))


def web_loader(case: Case, urls: list[str], **options: Any) -> Any:
    import webdataset as wds

    pipeline = (
        wds.WebDataset(urls, shardshuffle=False, empty_check=False, **options)
        .shuffle(256)
        .to_tuple("jpg", case.extension)
        .map(_Apply(Augment(case)))
        .batched(case.batch, partial=False)
    )
    return wds.WebLoader(pipeline, batch_size=None, num_workers=case.threads)


class _Apply:
    def __init__(self, augment: Augment) -> None:
        self._augment = augment

    def __call__(self, sample: Any) -> Pair:
        image, label = (sample["image"], sample["label"]) if isinstance(sample, dict) else sample
        return self._augment(image, label)


def spdl(case: Case) -> Iterator[int]:
    """Its pipeline of threads."""
    from spdl.pipeline import PipelineBuilder

    augment, dataset = Augment(case), case.dataset

    def load(index: int) -> Pair:
        raw = dataset.read(*dataset.locate(index))
        return augment(raw.image, raw.label)

    order = (random.randrange(dataset.num_samples) for _ in count())
    pipeline = (
        PipelineBuilder()
        .add_source(order)
        .pipe(load, concurrency=case.threads)
        .aggregate(case.batch)
        .pipe(torch.utils.data.default_collate)
        .add_sink(4)
        .build(num_threads=case.threads)
    )
    torch.set_num_threads(1)
    with pipeline.auto_stop():
        yield from _sizes(pipeline.get_iterator(timeout=60))


def streaming(case: Case) -> Iterator[int]:
    """MosaicML's format and data set in a DataLoader."""
    from streaming import MDSWriter, StreamingDataset

    folder = case.root / f"{case.task}-mds"
    with MDSWriter(out=str(folder), columns={"image": "bytes", "label": "bytes"}) as writer:
        for raw in read_all(case):
            writer.write({"image": raw.image, "label": raw.label})
    apply = _Apply(Augment(case))

    class Augmented(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            return apply(super().__getitem__(index))

    dataset = Augmented(local=str(folder), batch_size=case.batch, shuffle=True, epoch_size=100_000)
    return _sizes(_data_loader(case, dataset))


def litdata(case: Case) -> Iterator[int]:
    """LitData's format, data set and DataLoader."""
    import litdata as lit

    folder = case.root / f"{case.task}-lit"
    files = sorted(str(path) for path in case.files.glob("*.jpg"))
    write = partial(_bytes_of, extension=case.extension)
    lit.optimize(write, files, str(folder), chunk_bytes="64MB", num_workers=1, verbose=False)
    dataset = lit.StreamingDataset(
        str(folder), shuffle=True, drop_last=True, transform=_Apply(Augment(case))
    )
    loader = lit.StreamingDataLoader(
        dataset,
        batch_size=case.batch,
        num_workers=case.threads,
        drop_last=True,
        persistent_workers=True,
    )
    while True:
        yield from _sizes(loader)


def _bytes_of(file: str, extension: str) -> dict[str, bytes]:
    path = Path(file)
    label = path.with_suffix(f".{extension}").read_bytes()
    return {"image": path.read_bytes(), "label": label}


def _opencv(data: bytes) -> Any:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def _pillow(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)))


FLOOR = "floor"
# name -> decoders of pictures (libjpeg-turbo, all three) and of masks
DECODERS = {
    FLOOR: (simplejpeg.decode_jpeg, _opencv),
    "decoding published files whole, simplejpeg and Pillow": (simplejpeg.decode_jpeg, _pillow),
    "decoding published files whole, OpenCV": (_opencv, _opencv),
    "decoding published files whole, Pillow": (_pillow, _pillow),
}


def decoding(case: Case, name: str) -> Round:
    """Nothing but decoding at full size, on as many threads, from memory.

    `FLOOR` reads the bytes of our shards, in which masks have no filters; others the files as they
    were before preparation.
    """
    picture, label = DECODERS[name]
    if name == FLOOR:
        pairs = [(raw.image, raw.label) for raw in read_all(case)]
    else:
        source = case.root / f"{case.task}-source"
        pairs = [
            (path.read_bytes(), (source / "masks" / "train" / f"{path.stem}.png").read_bytes())
            for path in sorted((source / "images" / "train").iterdir())
        ]
    shares = [
        [pairs[i % len(pairs)] for i in range(first, first + case.batch)]
        for first in range(0, case.steps * case.batch, case.batch)
    ]
    pool = ThreadPoolExecutor(case.threads)
    cv2.setNumThreads(0)

    def decode(share: list[tuple[bytes, bytes]]) -> None:
        for image, mask in share:
            picture(image)
            if case.task == "segmentation":
                label(mask)

    def run() -> tuple[int, float, float]:
        with clock() as spent:
            list(pool.map(decode, shares))
        return case.steps * case.batch, spent.wall, spent.cpu

    return run


def rounds(stream: Callable[[Case], Iterator[int]], case: Case) -> Round:
    """`case.steps` batches of a stream, timed after a few that it has ready."""
    sizes = stream(case)

    def run() -> tuple[int, float, float]:
        list(islice(sizes, SETTLE))
        with clock() as spent:
            samples = sum(islice(sizes, case.steps))
        return samples, spent.wall, spent.cpu

    return run


def _data_loader(case: Case, dataset: Any, **options: Any) -> Any:
    return torch.utils.data.DataLoader(
        dataset, case.batch, num_workers=case.threads, drop_last=True, **options
    )


def _sizes(batches: Any) -> Iterator[int]:
    return (len(batch[0]) for batch in batches)
