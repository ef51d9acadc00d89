"""Decoded images that a node keeps: the same batches, decoded once, whatever befalls the cache."""

import errno
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

from data_pipeline import kept_pixels as module
from data_pipeline import node_cache
from data_pipeline.config import Cache, TrainData
from data_pipeline.dataset import Dataset
from data_pipeline.decode import decode_image
from data_pipeline.errors import DataError
from data_pipeline.formats.sample import Sample
from data_pipeline.kept_pixels import KeptPixels, keep_pixels
from data_pipeline.loader import Batch, TrainLoader
from tests.unit.data_pipeline.conftest import tiny_sample

SHARDS = (9, 4, 14)
STEPS = 18  # three epochs of six steps, each of which leaves three samples out


@pytest.fixture
def dataset(make_dataset: Any) -> Dataset:
    return make_dataset("segmentation", SHARDS)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(directory=str(tmp_path / "cache"))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the images that were decoded to be kept."""
    keys: list[str] = []
    decode = module.decode_image

    def counted(data: bytes, key: str) -> Any:
        keys.append(key)
        return decode(data, key)

    monkeypatch.setattr(module, "decode_image", counted)
    return keys


def batches(dataset: Dataset, kept: KeptPixels | None, **changes: Any) -> list[Batch]:
    values = {
        "dataset": dataset,
        "task": "segmentation",
        "data": TrainData(dataset="tiny", crop=33),
        "seed": 5,
        "global_batch": 4,
        "slots": range(4),
        "num_classes": 5,
        "stop_step": STEPS,
        "threads": 2,
    }
    with TrainLoader(**values | {"kept_pixels": kept} | changes) as loader:
        return list(loader)


def assert_same(some: list[Batch], others: list[Batch]) -> None:
    for a, b in zip(some, others, strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def entries(cache: Cache) -> list[Path]:
    return sorted(Path(str(cache.directory)).glob("??/*"))


def test_each_image_is_decoded_once_and_batches_are_the_same(
    dataset: Dataset, cache: Cache, decoded: list[str]
) -> None:
    expected = batches(dataset, None)
    assert_same(batches(dataset, keep_pixels(dataset, cache)), expected)
    seen = {key for batch in expected for key in batch.keys}
    assert sorted(decoded) == sorted(seen)
    assert len(entries(cache)) == len(seen)
    assert_same(batches(dataset, keep_pixels(dataset, cache)), expected)
    assert len(decoded) == len(seen)


def test_what_rots_is_decoded_again(dataset: Dataset, cache: Cache, decoded: list[str]) -> None:
    expected = batches(dataset, None)
    batches(dataset, keep_pixels(dataset, cache))
    decoded.clear()
    flipped, cut, *_, emptied = entries(cache)
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 16
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-1])
    emptied.write_bytes(b"")
    for _ in range(2):  # the second time all are whole again
        assert_same(batches(dataset, keep_pixels(dataset, cache)), expected)
    assert 3 <= len(decoded) <= 6
    assert len(set(decoded)) == 3


def test_samples_of_another_data_set_are_others(
    make_dataset: Any, tmp_path: Path, cache: Cache
) -> None:
    """The same names, places and sizes in bytes, other pictures."""

    def plain(index: int) -> Sample:
        sample = tiny_sample("segmentation", index)
        pixels = decode_image(sample.image, sample.key)
        image = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 0])[1].tobytes()
        return replace(sample, image=image, image_extension="png")

    first = make_dataset("segmentation", (8,), lambda _, i: plain(i))
    batches(first, keep_pixels(first, cache), stop_step=2)
    (tmp_path / "tiny").rename(tmp_path / "old")
    second = make_dataset("segmentation", (8,), lambda _, i: plain(i + 35))
    assert len(raw_of(first)(0).image) == len(raw_of(second)(0).image)
    found = batches(second, keep_pixels(second, cache), stop_step=2)
    assert_same(found, batches(second, None, stop_step=2))


def test_images_that_do_not_all_fit_are_not_kept(
    dataset: Dataset, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    shards = sum(shard.size for shard in dataset.manifest.shards)  # are kept there too
    needed = dataset.num_pixels() * 3 + dataset.num_samples * 4 + shards
    sizes = [raw.height * raw.width for raw in map(raw_of(dataset), range(dataset.num_samples))]
    assert dataset.num_pixels() == sum(sizes)
    exact = cache.model_copy(update={"size": int(needed / 0.9) + 2})
    assert keep_pixels(dataset, exact) is not None
    node_cache._open.cache_clear()
    small = cache.model_copy(update={"size": int(needed / 0.9) - 2})
    with caplog.at_level(logging.WARNING):
        assert keep_pixels(dataset, small) is None
    assert "data.keep_pixels" in caplog.text
    assert "data.cache.size" in caplog.text


def test_a_full_disk_costs_only_the_cache(
    dataset: Dataset, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(node_cache, "_write", refuse)
    assert_same(batches(dataset, keep_pixels(dataset, cache)), batches(dataset, None))
    assert entries(cache) == []


def test_a_broken_image_is_named_and_not_kept(dataset: Dataset, cache: Cache) -> None:
    kept, raw = keep_pixels(dataset, cache), raw_of(dataset)(0)
    assert kept is not None
    broken = type(raw)(**vars(raw) | {"image": raw.image[: len(raw.image) // 2]})
    with pytest.raises(DataError, match="picture000"):
        kept.image(broken)
    assert entries(cache) == []


def raw_of(dataset: Dataset) -> Any:
    return lambda index: dataset.read(*dataset.locate(index))
