"""Data sets in a bucket: prepared there, read from there, over a network that fails."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

from data_pipeline import object_store, parts
from data_pipeline.config import Cache, EvalData, TrainData
from data_pipeline.dataset import Dataset, open_dataset
from data_pipeline.errors import DataError
from data_pipeline.loader import Batch, EvalLoader, TrainLoader
from data_pipeline.manifest import FILE_NAME, read_manifest
from data_pipeline.prepare import Settings, prepare
from data_pipeline.storage import open_storage
from tests.object_store import Proxy

SHARDS = (5, 3, 8)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_FIRST_WAIT", 0.005)


@pytest.fixture
def local(make_dataset: Any) -> Dataset:
    return make_dataset("classification", SHARDS)


@pytest.fixture
def root(local: Dataset, bucket: str) -> str:
    """The local data set copied into a bucket, as any tool would."""
    target = open_storage(f"s3://{bucket}/data/tiny/train")
    for path in Path(local.place).iterdir():
        with target.writing(path.name) as file:
            file.write(path.read_bytes())
    return f"s3://{bucket}/data"


def batches(dataset: Dataset, block_size: int = 4, steps: range = range(8)) -> list[Batch]:
    loader = TrainLoader(
        dataset=dataset,
        task="classification",
        data=TrainData(dataset="tiny", crop=16, block_size=block_size),
        seed=3,
        global_batch=4,
        slots=range(4),
        num_classes=5,
        start_step=steps.start,
        stop_step=steps.stop,
        threads=2,
    )
    with loader:
        return list(loader)


def assert_same(ones: Sequence[Batch], others: Sequence[Batch]) -> None:
    assert [one.keys for one in ones] == [other.keys for other in others]
    for one, other in zip(ones, others, strict=True):
        assert one.images.equal(other.images)
        assert one.labels.equal(other.labels)


@pytest.mark.parametrize("block_size", [1, 4, 100])
def test_batches_are_those_of_the_disk(
    local: Dataset, root: str, block_size: int, proxy: Proxy
) -> None:
    remote = open_dataset(root, "tiny", "train")
    assert remote.manifest == local.manifest
    assert remote.manifest.digest == local.manifest.digest
    assert_same(batches(remote, block_size), batches(local, block_size))
    reads = len(proxy.paths("GET", ".tar"))
    blocks = sum(-(-count // block_size) for count in SHARDS)
    # Two epochs; at a seam two slots may come to a block at different times.
    assert reads <= 2 * blocks + (8 if block_size > 1 else 0)


def test_every_epoch_reads_ahead_and_ends(local: Dataset, root: str) -> None:
    remote = open_dataset(root, "tiny", "train")
    before = threading.active_count()
    assert_same(batches(remote, 2, range(3, 40)), batches(local, 2, range(3, 40)))
    for _ in range(100):  # the last threads have nothing left to do but end
        if threading.active_count() <= before:
            break
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_evaluation_reads_every_sample_once_and_by_blocks(
    local: Dataset, root: str, proxy: Proxy
) -> None:
    def samples(dataset: Dataset) -> list[Any]:
        data = EvalData(dataset="tiny", crop=16)
        indices = range(1, 16)
        loader = EvalLoader(
            dataset=dataset, task="classification", data=data, indices=indices, num_classes=5
        )
        return [(one.key, one.index, one.image.numpy().tobytes()) for one in loader]

    assert samples(open_dataset(root, "tiny", "train")) == samples(local)
    assert len(proxy.paths("GET", ".tar")) == len(SHARDS)


@pytest.mark.parametrize("fault", ["slowdown", "reset", "truncate", "flip", "error"])
def test_faults_change_no_sample(local: Dataset, root: str, proxy: Proxy, fault: str) -> None:
    remote = open_dataset(root, "tiny", "train")
    proxy.matching = ".tar"
    once = [fault, None, None]  # damaged twice, it would count as damaged in the store
    proxy.faults.extend(once if fault == "flip" else [*once, fault, fault, None, fault])
    assert_same(batches(remote), batches(local))
    assert not proxy.faults


def test_a_store_that_goes_down_while_training(local: Dataset, root: str, proxy: Proxy) -> None:
    remote = open_dataset(root, "tiny", "train")
    proxy.down = True

    def repair() -> None:
        while len(proxy.paths("GET", ".tar")) + len(proxy.paths("GET", FILE_NAME)) < 8:
            time.sleep(0.01)
        proxy.down = False

    threading.Thread(target=repair, daemon=True).start()
    assert_same(batches(remote), batches(local))


def test_a_sample_damaged_in_the_bucket_is_named(local: Dataset, root: str) -> None:
    row = local.manifest.read_rows(2).to_pylist()[3]
    store = open_storage(f"{root}/tiny/train")
    data = bytearray(store.read_whole("00002.tar"))
    data[row["image_offset"] + 200] ^= 1
    with store.writing("00002.tar") as file:
        file.write(data)
    remote = open_dataset(root, "tiny", "train")
    block = remote.read_block(2, 0, 8)
    assert block.sample(2) == local.read(2, 2)
    end = row["offset"] + row["size"]
    with pytest.raises(
        DataError, match=rf"00002\.tar: sample 'picture011', bytes {row['offset']} to {end}"
    ):
        block.sample(3)


def test_damaged_rows_of_the_manifest_are_read_again(
    local: Dataset, root: str, proxy: Proxy
) -> None:
    remote = open_dataset(root, "tiny", "train")
    proxy.matching = FILE_NAME
    proxy.faults.extend(["flip"])
    assert remote.manifest.read_rows(2).equals(local.manifest.read_rows(2))
    proxy.faults.extend(["flip", "flip"])
    with pytest.raises(DataError, match="the rows of shard 1 are damaged"):
        remote.manifest.read_rows(1)


def test_the_second_run_reads_from_the_cache(
    local: Dataset, root: str, proxy: Proxy, tmp_path: Path
) -> None:
    where = Cache(directory=str(tmp_path / "cache"), size=10**8)
    first = batches(open_dataset(root, "tiny", "train", where))
    reads = len(proxy.paths("GET", ".tar"))
    assert reads == 2 + 1 + 2  # blocks of four
    remote = open_dataset(root, "tiny", "train", where)
    assert_same(batches(remote), first)
    assert_same(first, batches(local))
    assert len(proxy.paths("GET", ".tar")) == reads
    # What rots on the disk is fetched again, sample by sample, and the entry with it later.
    for path in (tmp_path / "cache").glob("??/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert_same(batches(open_dataset(root, "tiny", "train", where)), first)
    after = len(proxy.paths("GET", ".tar"))
    assert after > reads
    assert_same(batches(open_dataset(root, "tiny", "train", where)), first)


def test_what_arrives_damaged_is_not_cached(
    local: Dataset, root: str, proxy: Proxy, tmp_path: Path
) -> None:
    where = Cache(directory=str(tmp_path / "cache"), size=10**8)
    remote = open_dataset(root, "tiny", "train", where)
    remote.manifest.read_rows(0)
    proxy.matching = ".tar"
    proxy.faults.append("flip")
    assert remote.read(0, 1) == local.read(0, 1)
    assert remote.read(0, 1) == local.read(0, 1)
    assert len(proxy.paths("GET", ".tar")) == 3


def test_a_tiny_cache_is_enough(local: Dataset, root: str, tmp_path: Path) -> None:
    where = Cache(directory=str(tmp_path / "cache"), size=20_000)
    assert_same(batches(open_dataset(root, "tiny", "train", where)), batches(local))
    sizes = [path.stat().st_size for path in (tmp_path / "cache").glob("??/*")]
    assert sizes
    assert sum(sizes) <= 20_000


def test_the_cache_is_on_for_buckets_and_off_for_disks(
    local: Dataset, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATROUS_CACHE", str(tmp_path / "cache"))
    open_dataset(tmp_path, "tiny", "train", None).read(0, 0)
    open_dataset(root, "tiny", "train", False).read(0, 0)
    assert not (tmp_path / "cache").exists()
    open_dataset(root, "tiny", "train", None).read(0, 0)
    assert list((tmp_path / "cache").glob("??/*"))


def test_a_missing_data_set_in_a_bucket(bucket: str) -> None:
    with pytest.raises(DataError, match=rf"s3://{bucket}/data/voc/val: no prepared data set"):
        open_dataset(f"s3://{bucket}/data", "voc", "val")


SMALL = Settings(samples_per_shard=2)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(12):
        folder = tmp_path / "raw/train" / ("ant", "bee")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture = np.full((8, 9 + number, 3), 100, np.uint8)
        (folder / f"{number}.JPEG").write_bytes(simplejpeg.encode_jpeg(picture))
    return tmp_path / "raw"


def objects(place: str) -> dict[str, bytes]:
    store = open_storage(place)
    return {name: store.read_whole(name) for name in store.names("")}


@pytest.mark.parametrize("workers", [1, 2])
def test_preparing_into_a_bucket_gives_the_bytes_of_the_disk(
    pictures: Path, tmp_path: Path, bucket: str, workers: int, proxy: Proxy
) -> None:
    disk = prepare("imagenet", pictures, tmp_path / "out", SMALL, workers=1)["train"]
    proxy.matching = ".tar"
    proxy.faults.extend(["slowdown", None, "reset"])
    place = f"s3://{bucket}/sets/out"
    there = prepare("imagenet", pictures, place, SMALL, workers=workers)["train"]
    assert there.digest == disk.digest
    assert there == disk == read_manifest(f"{place}/train")
    assert objects(f"{place}/train") == objects(str(tmp_path / "out/train"))
    puts = len(proxy.paths("PUT", ".tar"))
    assert prepare("imagenet", pictures, place, SMALL, workers=1)["train"] == there
    assert len(proxy.paths("PUT", ".tar")) == puts
    assert proxy.paths("PUT", "")[-1].endswith(FILE_NAME)


def test_a_shard_lost_from_a_bucket_is_written_again(pictures: Path, bucket: str) -> None:
    place = f"s3://{bucket}/out"
    before = prepare("imagenet", pictures, place, SMALL, workers=1)["train"]
    open_storage(f"{place}/train").delete("shard-000003.tar")
    assert prepare("imagenet", pictures, place, SMALL, workers=1)["train"] == before
    assert open_storage(f"{place}/train").size("shard-000003.tar") == before.shards[3].size


SCRIPT = """
import sys
import time
from pathlib import Path
from data_pipeline.prepare import Settings, prepare

def report(split, done, total):
    print(split, done, flush=True)
    if done == 6:
        time.sleep(60)  # the kill comes now

prepare("imagenet", Path(sys.argv[1]), sys.argv[2], Settings(samples_per_shard=2), workers=1,
        progress=report)
"""


def test_killed_while_preparing_it_goes_on(
    pictures: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"s3://{bucket}/out"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(pictures), place],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path.cwd(),
        env=os.environ | {"TMPDIR": str(scratch)},
    ) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline().startswith("train ")
        process.send_signal(signal.SIGKILL)
    assert list(scratch.iterdir()) == []
    assert open_storage(f"{place}/train").size(FILE_NAME) is None
    names: list[str] = []
    original = parts.write_part
    monkeypatch.setattr(parts, "write_part", lambda task: names.append(task.name) or original(task))  # type: ignore[func-returns-value]
    resumed = prepare("imagenet", pictures, place, SMALL, workers=1)["train"]
    assert len(names) == 3
    disk = prepare("imagenet", pictures, tmp_path / "out", SMALL, workers=1)["train"]
    assert resumed == disk
    assert objects(f"{place}/train") == objects(str(tmp_path / "out/train"))
    shutil.rmtree(tmp_path / "out")
