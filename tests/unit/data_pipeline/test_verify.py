"""Damage of every kind is found and named: shard and sample."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError, StorageUnavailable
from data_pipeline.manifest import write_manifest
from data_pipeline.prepared import open_splits
from data_pipeline.storage import open_storage
from data_pipeline.survey import survey
from data_pipeline.verify import ShardReport, verify

SHARDS = (4, 1, 6)


@pytest.fixture
def dataset(make_dataset: Any) -> Dataset:
    return make_dataset("segmentation", SHARDS)


def check(dataset: Dataset) -> list[ShardReport]:
    """The reports of a fresh look at the data set's directory."""
    (found,) = open_splits(dataset.place).values()
    return list(verify(found, threads=2))


def shard_path(dataset: Dataset, shard: int) -> Path:
    return Path(dataset.place) / dataset.manifest.shards[shard].name


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def row(dataset: Dataset, shard: int, number: int) -> dict[str, Any]:
    return dataset.manifest.read_rows(shard).to_pylist()[number]


@pytest.mark.parametrize("chunk", [1, 3000, 16 << 20])
def test_intact_shards_pass(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("data_pipeline.verify._CHUNK", chunk)
    reports = check(dataset)
    assert [report.name for report in reports] == [s.name for s in dataset.manifest.shards]
    assert [report.num_samples for report in reports] == list(SHARDS)
    assert all(report.intact for report in reports)


@pytest.mark.parametrize("chunk", [1, 3000, 16 << 20])
@pytest.mark.parametrize("part", ["image", "label"])
def test_a_flipped_bit_names_its_sample(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, chunk: int, part: str
) -> None:
    monkeypatch.setattr("data_pipeline.verify._CHUNK", chunk)
    place = row(dataset, 2, 3)
    flip(shard_path(dataset, 2), place[f"{part}_offset"] + 7)
    first, second, third = check(dataset)
    assert first.intact
    assert second.intact
    assert list(third.samples) == [place["key"]]
    assert "crc32 differs" in third.samples[place["key"]]
    assert len(third.damages) == 1
    assert third.damages[0].startswith("sha256 ")


def test_a_flipped_bit_outside_of_samples_is_told_apart(dataset: Dataset) -> None:
    flip(shard_path(dataset, 0), dataset.manifest.shards[0].size - 1)
    report = check(dataset)[0]
    assert not report.samples
    assert "all samples are intact" in report.damages[0]


@pytest.mark.parametrize("chunk", [1, 3000, 16 << 20])
def test_a_truncated_shard_names_what_is_missing(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("data_pipeline.verify._CHUNK", chunk)
    cut = row(dataset, 2, 4)
    path = shard_path(dataset, 2)
    path.write_bytes(path.read_bytes()[: cut["offset"] + 100])
    report = check(dataset)[2]
    assert report.damages[0].startswith(f"{cut['offset'] + 100} bytes; the manifest says ")
    missing = {cut["key"]: cut["size"] - 100, (last := row(dataset, 2, 5))["key"]: last["size"]}
    sizes = {cut["key"]: cut["size"], last["key"]: last["size"]}
    assert report.samples == {
        key: f"{count} of {sizes[key]} bytes are missing" for key, count in missing.items()
    }


def test_an_empty_shard_has_no_sample(dataset: Dataset) -> None:
    shard_path(dataset, 0).write_bytes(b"")
    report = check(dataset)[0]
    assert report.damages[0].startswith("0 bytes")
    assert len(report.samples) == 4


def test_a_shard_with_bytes_too_many(dataset: Dataset) -> None:
    path = shard_path(dataset, 0)
    path.write_bytes(path.read_bytes() + bytes(512))
    report = check(dataset)[0]
    assert len(report.damages) == 1
    assert "the manifest says" in report.damages[0]
    assert not report.samples


def test_a_missing_shard(dataset: Dataset) -> None:
    shard_path(dataset, 1).unlink()
    reports = check(dataset)
    assert [report.damages for report in reports] == [[], ["missing"], []]


def test_a_shard_of_another_preparation(dataset: Dataset) -> None:
    shutil.copy(shard_path(dataset, 2), shard_path(dataset, 0))
    report = check(dataset)[0]
    assert len(report.samples) == 4
    assert "another preparation" in " ".join(report.damages)


def test_a_header_that_gives_another_size(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What checksums of the manifest itself cannot tell: they were made of the same mistake."""
    place = row(dataset, 0, 2)
    flip(shard_path(dataset, 0), place["image_offset"] - 512 + 124 + 10)  # a digit of the size
    monkeypatch.setattr("data_pipeline.verify.zlib.crc32", lambda _: place["crc32"])
    report = check(dataset)[0]
    assert report.samples[place["key"]].startswith("no tar header before the image")


def test_a_store_that_is_down_is_no_damage(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> bytes:
        raise StorageUnavailable("s3://bucket: no answer")

    (found,) = open_splits(dataset.place).values()
    monkeypatch.setattr(found.manifest.storage, "read", fail)
    with pytest.raises(StorageUnavailable, match="no answer"):
        list(verify(found))


def test_splits_are_found(dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(dataset.place, tmp_path / "tiny/val")
    assert list(open_splits(tmp_path / "tiny")) == ["train", "val"]
    assert list(open_splits(dataset.place)) == ["train"]
    with pytest.raises(DataError, match=r"no manifest\.parquet there"):
        open_splits(tmp_path)


def test_a_shard_outside_of_the_place_is_not_read(dataset: Dataset) -> None:
    manifest = dataset.manifest
    shards = (replace(manifest.shards[0], name="../elsewhere.tar"), *manifest.shards[1:])
    rows = [manifest.read_rows(shard) for shard in range(len(SHARDS))]
    write_manifest(dataset.place, replace(manifest, shards=shards), rows)
    with pytest.raises(DataError, match="lies outside the data set"):
        open_splits(dataset.place)


def test_damaged_rows_are_a_damage(dataset: Dataset) -> None:
    path = Path(dataset.place) / "manifest.parquet"
    data = path.read_bytes()
    place = data.index(b"picture00")  # keys of the first shard are short enough to lie bare
    path.write_bytes(data[:place] + b"pictures0" + data[place + 9 :])
    first, second, _ = check(dataset)
    assert "the rows of shard 0 are damaged" in first.damages[0]
    assert second.intact


def test_an_object_store_is_read_like_a_directory(dataset: Dataset, bucket: str) -> None:
    place = f"s3://{bucket}/tiny"
    flip(shard_path(dataset, 2), row(dataset, 2, 3)["image_offset"] + 7)
    storage = open_storage(place)
    for path in Path(dataset.place).iterdir():
        with storage.writing(f"train/{path.name}") as file:
            file.write(path.read_bytes())
    storage.delete(f"train/{dataset.manifest.shards[1].name}")
    (found,) = open_splits(place).values()
    reports = list(verify(found))
    assert [report.intact for report in reports] == [True, False, False]
    assert reports[1].damages == ["missing"]
    assert list(reports[2].samples) == [row(dataset, 2, 3)["key"]]
    counted = survey(found, range(4), threads=2)
    assert (counted.looked_at, len(counted.sizes)) == (4, 4)
