"""Reading samples out of shards: whole, in blocks, from many threads, and from broken data."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from time import sleep
from typing import Any

import pytest

from data_pipeline.blocks import BlockReader
from data_pipeline.dataset import Dataset, open_dataset
from data_pipeline.errors import DataError
from data_pipeline.manifest import read_manifest, write_manifest
from data_pipeline.plan import Plan, SampleIndex
from data_pipeline.storage import LoadingCache, is_local, join

SHARDS = (5, 3, 8)
EVERY = [SampleIndex(shard, row) for shard, count in enumerate(SHARDS) for row in range(count)]


@pytest.fixture
def dataset(make_dataset: Any) -> Dataset:
    return make_dataset("classification", SHARDS)


@pytest.fixture
def preads(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The (offset, size) of every read of a shard from now on; the manifest's rows are read."""
    for shard in range(len(SHARDS)):
        dataset.read(shard, 0)
    calls: list[tuple[int, int]] = []
    pread = os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        calls.append((offset, size))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", counted)
    return calls


def test_samples_are_what_was_written(dataset: Dataset) -> None:
    for index, place in enumerate(EVERY):
        raw = dataset.read(*place)
        assert raw.key == f"picture{index:03d}"
        assert raw.image[:2] == b"\xff\xd8"
        assert raw.image[-2:] == b"\xff\xd9"
        assert int(raw.label) == index % 5
        assert (raw.height, raw.width) == (24 + index % 7, 30 + index % 5)


def test_locate_counts_through_the_shards(dataset: Dataset) -> None:
    assert [dataset.locate(index) for index in range(dataset.num_samples)] == EVERY
    with pytest.raises(IndexError, match="sample 16 of 16"):
        dataset.locate(16)


def test_largest_size_is_taken_over_each_side(dataset: Dataset) -> None:
    assert dataset.largest_size() == (30, 34)


def test_one_read_per_sample_without_blocks(dataset: Dataset, preads: list[Any]) -> None:
    dataset.read(2, 4)
    assert len(preads) == 1


@pytest.mark.parametrize("block_size", [1, 2, 4, 100])
def test_blocks_give_the_same_samples(dataset: Dataset, block_size: int) -> None:
    reader = BlockReader(dataset, block_size, 2)
    assert [reader.read(*place) for place in EVERY] == [dataset.read(*place) for place in EVERY]


def test_one_read_per_block_when_slots_take_turns(dataset: Dataset, preads: list[Any]) -> None:
    plan = Plan(shard_samples=SHARDS, block_size=4, seed=0, global_batch=2)
    reader = BlockReader(dataset, 4, 2)
    steps = [plan.samples(step, range(2)) for step in range(plan.steps_per_epoch)]
    for sample in (sample for step in steps for sample in step):
        reader.read(*sample)
    per_slot = [[(s.shard, s.row // 4) for s in slot] for slot in zip(*steps, strict=True)]
    visits = sum(1 + sum(a != b for a, b in pairwise(slot)) for slot in per_slot)
    assert visits - 1 <= len(preads) <= visits  # two slots may share the block at their seam


def test_threads_share_a_block(dataset: Dataset, preads: list[Any]) -> None:
    reader = BlockReader(dataset, 8, 1)
    with ThreadPoolExecutor(4) as pool:
        samples = list(pool.map(lambda row: reader.read(2, row), range(8)))
    assert [sample.key for sample in samples] == [f"picture{8 + row:03d}" for row in range(8)]
    assert len(preads) == 1


def test_more_shards_than_open_files(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [dataset.read(*place) for place in EVERY]
    monkeypatch.setattr("data_pipeline.storage._OPEN_FILES", 1)
    assert dataset.manifest.path is not None
    crowded = Dataset(read_manifest(dataset.manifest.path.parent))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            assert list(pool.map(lambda place: crowded.read(*place), EVERY)) == expected
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 2  # one shard, one manifest


def test_a_missing_data_set_lists_what_is_there(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tiny/val: no prepared data set.* holds tiny/train\."):
        open_dataset(tmp_path, "tiny", "val")
    with pytest.raises(DataError, match="holds nothing"):
        open_dataset(tmp_path / "elsewhere", "tiny", "val")


@pytest.mark.parametrize("root", ["gs://b", "hdfs://host/path", Path("http://b/x")])
def test_an_unknown_scheme_is_refused(root: Any) -> None:
    with pytest.raises(DataError, match=r"lie in local directories or under s3://"):
        open_dataset(root, "tiny", "train")


def test_places_are_joined_whatever_they_are() -> None:
    assert join("/data/x", "voc", "train") == "/data/x/voc/train"
    assert join("s3://bucket/a/", "voc") == join(Path("s3://bucket/a"), "voc")
    assert join("s3://bucket/a", "voc", "train") == "s3://bucket/a/voc/train"
    assert join("s3://bucket") == "s3://bucket"
    assert is_local("relative/x:y")
    assert not is_local(Path("s3://bucket/a"))


def test_a_short_shard_is_named(dataset: Dataset, tmp_path: Path) -> None:
    os.truncate(tmp_path / "tiny/train/00002.tar", 2000)
    with pytest.raises(DataError, match=r"00002\.tar: 0 of the \d+ bytes from \d+ on"):
        dataset.read(2, 7)


def test_a_missing_shard_is_named_and_may_come_back(dataset: Dataset, tmp_path: Path) -> None:
    shard = tmp_path / "tiny/train/00001.tar"
    shard.rename(tmp_path / "away")
    with pytest.raises(DataError, match=r"00001\.tar: named in the manifest but not there"):
        dataset.read(1, 0)
    (tmp_path / "away").rename(shard)
    assert dataset.read(1, 0).key == "picture005"


@pytest.mark.parametrize("name", ["../secret.tar", "/etc/passwd"])
def test_a_shard_outside_the_data_set_is_refused(
    dataset: Dataset, tmp_path: Path, name: str
) -> None:
    manifest = dataset.manifest
    shards = (replace(manifest.shards[0], name=name), *manifest.shards[1:])
    rows = [manifest.read_rows(i) for i in range(3)]
    write_manifest(tmp_path / "tiny/train", replace(manifest, shards=shards), rows)
    with pytest.raises(DataError, match="lies outside the data set"):
        open_dataset(tmp_path, "tiny", "train")


def test_the_cache_loads_once_for_all_who_wait() -> None:
    loads: list[int] = []

    def load(key: int) -> int:
        loads.append(key)
        sleep(0.02)
        return key * 10

    cache = LoadingCache(2, load)
    together = threading.Barrier(4)

    def get(key: int) -> int:
        together.wait(10)
        return cache.get(key)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(get, [1, 2, 1, 2])) == [10, 20, 10, 20]
    assert sorted(loads) == [1, 2]


def test_the_cache_drops_the_least_recently_used() -> None:
    loads: list[int] = []
    cache = LoadingCache(2, loads.append)
    for key in (1, 2, 1, 3, 1, 2):
        cache.get(key)
    assert loads == [1, 2, 3, 2]


def test_the_cache_does_not_keep_failures() -> None:
    outcomes = iter([1, 0])
    cache: LoadingCache[str, float] = LoadingCache(2, lambda key: 1 // (1 - next(outcomes)))
    with pytest.raises(ZeroDivisionError):
        cache.get("x")
    assert cache.get("x") == 1
