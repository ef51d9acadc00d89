"""Tiny data sets of real shards for the tests of reading and loading."""

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg

from data_pipeline.dataset import Dataset, open_dataset
from data_pipeline.formats.sample import Sample
from data_pipeline.manifest import Manifest, write_manifest
from data_pipeline.shards import write_shard
from data_pipeline.storage import LocalStorage
from tests.object_store import bucket, proxy, store

__all__ = ["bucket", "proxy", "store"]  # fixtures

MakeDataset = Callable[..., Dataset]


def tiny_sample(task: str, index: int) -> Sample:
    """A noisy sample whose size, pixels and label all follow from its index."""
    rng = np.random.Generator(np.random.PCG64(index))
    height, width = 24 + index % 7, 30 + index % 5
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if task == "segmentation":
        mask = rng.integers(0, 5, (height, width), dtype=np.uint8)
        extension, label, labels = "seg.png", cv2.imencode(".png", mask)[1].tobytes(), range(5)
    elif task == "classification":
        extension, label, labels = "cls", b"%d" % (index % 5), [index % 5]
    else:
        extension, label, labels = "json", b"[%d, 4]" % (index % 4), [index % 4, 4]
    return Sample(
        key=f"picture{index:03d}",
        image=simplejpeg.encode_jpeg(image),
        image_extension="jpg",
        label=label,
        label_extension=extension,
        width=width,
        height=height,
        labels=tuple(labels),
    )


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """Write and open a data set: make_dataset(task, samples of each shard, sample(task, index))."""

    def make(
        task: str,
        shard_samples: Sequence[int],
        sample: Callable[[str, int], Sample] = tiny_sample,
    ) -> Dataset:
        directory = tmp_path / "tiny" / "train"
        directory.mkdir(parents=True)
        shards, tables, first = [], [], 0
        for number, count in enumerate(shard_samples):
            samples = [sample(task, first + i) for i in range(count)]
            shard, table = write_shard(LocalStorage(directory), f"{number:05d}.tar", samples)
            shards.append(shard)
            tables.append(table)
            first += count
        manifest = Manifest(
            dataset="tiny",
            split="train",
            task=task,
            class_names=tuple("abcde"),
            ignore_label=255 if task == "segmentation" else None,
            shards=tuple(shards),
        )
        write_manifest(directory, manifest, tables)
        return open_dataset(tmp_path, "tiny", "train")

    return make
