"""Shards that WebDataset wrote, indexed and read in place, beside what WebDataset reads of them."""

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from data_pipeline import foreign_shards, shard_index
from data_pipeline.config import ShardContents, TrainData
from data_pipeline.dataset import Dataset, open_dataset
from data_pipeline.decode import decode_class, decode_labels
from data_pipeline.errors import DataError
from data_pipeline.loader import Batch, TrainLoader
from data_pipeline.manifest import FILE_NAME, read_manifest
from data_pipeline.prepared import open_splits
from data_pipeline.shard_index import index_shards
from data_pipeline.storage import open_storage
from data_pipeline.verify import verify
from tests.object_store import Proxy
from tests.unit.data_pipeline.foreign import (
    CLASSES,
    COUNTS,
    TASKS,
    index,
    jpeg,
    pack,
    png,
    sample,
    upload,
    write,
)


def batches(dataset: Dataset, task: str, block_size: int = 1) -> list[Batch]:
    loader = TrainLoader(
        dataset=dataset,
        task=task,
        data=TrainData(dataset="foreign", crop=16, block_size=block_size),
        seed=3,
        global_batch=4,
        slots=range(4),
        num_classes=5,
        stop_step=6,
        threads=2,
    )
    with loader:
        return list(loader)


def spied_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are read from now on."""
    names: list[str] = []
    original = shard_index.index_shard

    def spy(storage: Any, name: str, *rest: Any) -> Any:
        names.append(name)
        return original(storage, name, *rest)

    monkeypatch.setattr(shard_index, "index_shard", spy)
    return names


@pytest.fixture(params=["disk", "bucket"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """Where shards lie, and where data sets do; `put` brings the shards there."""
    if request.param == "disk":
        return str(tmp_path / "raw"), str(tmp_path / "data")
    bucket = request.getfixturevalue("bucket")
    return f"s3://{bucket}/raw", f"s3://{bucket}/data"


def put(folder: Path, place: str) -> None:
    if place != str(folder):
        upload(folder, place)


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_those_that_webdataset_reads(tmp_path, places, task):
    raw, root = places
    write(tmp_path / "raw", task)
    put(tmp_path / "raw", raw)
    manifest = index(raw + "/{000..002}.tar", root, task)
    assert [shard.num_samples for shard in manifest.shards] == list(COUNTS)
    assert manifest.class_names == CLASSES
    dataset = open_dataset(root, "foreign", "train")
    urls = [str(path) for path in sorted((tmp_path / "raw").glob("*.tar"))]
    theirs = list(wds.WebDataset(urls, shardshuffle=False))
    assert dataset.num_samples == len(theirs) == sum(COUNTS)
    for number in reversed(range(len(theirs))):  # in any order
        ours, other = dataset.read(*dataset.locate(number)), theirs[number]
        assert ours.key == other["__key__"]
        assert ours.image in (other.get("jpg"), other.get("jpeg"), other.get("png"))
        assert (ours.height, ours.width) == (24, 33)
        if task == "segmentation":
            assert ours.label == other["mask.png"]
        elif task == "classification":
            assert decode_class(ours.label, "") == int(other["cls"])
        else:
            names = json.loads(other["json"])["labels"]
            assert [CLASSES[i] for i in decode_labels(ours.label, "")] == names
    rows = [row for i in range(3) for row in manifest.read_rows(i).to_pylist()]
    if task == "segmentation":
        assert all(row["labels"] == [0, 1, 2, 3, 4] for row in rows)
    assert all(report.intact for report in verify(dataset))


@pytest.mark.parametrize("task", TASKS)
def test_they_train(tmp_path, places, task):
    raw, root = places
    write(tmp_path / "raw", task)
    put(tmp_path / "raw", raw)
    index(raw, root, task)
    by_samples = batches(open_dataset(root, "foreign", "train"), task)
    by_blocks = batches(open_dataset(root, "foreign", "train"), task, block_size=4)
    keys = [key for batch in by_samples[:3] for key in batch.keys]
    assert len(set(keys)) == 12
    shape = {"classification": (4,), "multilabel": (4, 5), "segmentation": (4, 16, 16)}[task]
    for batch in [*by_samples, *by_blocks]:
        assert batch.images.shape == (4, 3, 16, 16)
        assert batch.labels.shape == shape
        if task == "classification":
            assert batch.labels.tolist() == [int(key[-4:]) % 5 for key in batch.keys]


@pytest.mark.parametrize("task", TASKS)
def test_prepared_shards_can_be_indexed_too(make_dataset, tmp_path, task):
    prepared = make_dataset(task, COUNTS)
    index(tmp_path / "tiny/train", tmp_path / "data", task, classes=5)
    dataset = open_dataset(tmp_path / "data", "foreign", "train")
    for number in range(dataset.num_samples):
        place = dataset.locate(number)
        assert dataset.read(*place) == prepared.read(*place)


@pytest.mark.data
@pytest.mark.skipif("ATROUS_TEST_DATA" not in os.environ, reason="ATROUS_TEST_DATA is not set")
def test_real_pictures_and_palette_masks(tmp_path):
    voc = Path(os.environ["ATROUS_TEST_DATA"]) / "VOCdevkit/VOC2012"
    keys = (voc / "ImageSets/Segmentation/train.txt").read_text().split()[:20]
    with wds.ShardWriter(str(tmp_path / "voc-%03d.tar"), maxcount=8, verbose=0) as writer:
        for key in keys:
            picture = (voc / f"JPEGImages/{key}.jpg").read_bytes()
            label = (voc / f"SegmentationClass/{key}.png").read_bytes()
            writer.write({"__key__": key, "jpg": picture, "seg.png": label})
    index(f"{tmp_path}/voc-{{000..002}}.tar", tmp_path / "data", "segmentation", classes=21)
    dataset = open_dataset(tmp_path / "data", "foreign", "train")
    for number in (19, 3, 11):
        raw = dataset.read(*dataset.locate(number))
        assert raw.label == (voc / f"SegmentationClass/{keys[number]}.png").read_bytes()
        with Image.open(io.BytesIO(raw.label)) as image:
            present = set(np.unique(np.asarray(image)).tolist()) - {255}
            assert image.size == (raw.width, raw.height)
        shard, row = dataset.locate(number)
        assert set(dataset.manifest.read_rows(shard)["labels"][row].as_py()) == present


def test_no_shard_is_copied_and_each_is_read_once(tmp_path, bucket, proxy: Proxy, monkeypatch):
    monkeypatch.setattr(foreign_shards, "_CHUNK", 4096)
    write(tmp_path / "raw", "classification")
    upload(tmp_path / "raw", f"s3://{bucket}/raw")
    before = len(proxy.requests)
    index(f"s3://{bucket}/raw", f"s3://{bucket}/data")
    written = [path for how, path in proxy.requests[before:] if how == "PUT"]
    assert not [path for path in written if path.endswith(".tar")]
    for path in (tmp_path / "raw").iterdir():
        reads = [
            one for one in proxy.requests[before:] if one == ("GET", f"/{bucket}/raw/{path.name}")
        ]
        assert len(reads) == -(-path.stat().st_size // 4096)
    before = len(proxy.requests)
    index(f"s3://{bucket}/raw", f"s3://{bucket}/data")
    assert not [path for how, path in proxy.requests[before:] if how == "PUT" or ".tar" in path]


def test_an_index_may_lie_beside_its_shards_and_move_with_them(tmp_path):
    write(tmp_path / "a/foreign/train", "classification")
    with pytest.raises(DataError, match=r"shards without a manifest.*`atrous data index /"):
        open_dataset(tmp_path / "a", "foreign", "train")
    manifest = index(tmp_path / "a/foreign/train", tmp_path / "a")
    assert manifest.shards_at == "."
    (tmp_path / "a").rename(tmp_path / "b")
    assert len(batches(open_dataset(tmp_path / "b", "foreign", "train"), "classification")) == 6
    assert list(open_splits(tmp_path / "b/foreign")) == ["train"]


def test_shards_below_the_data_root_move_with_it(tmp_path, bucket):
    write(tmp_path / "a/raw/x", "classification")
    manifest = index(tmp_path / "a/raw/x", tmp_path / "a")
    assert manifest.shards_at == "../../raw/x"
    upload(tmp_path / "a", f"s3://{bucket}/copy")
    (tmp_path / "a").rename(tmp_path / "b")
    here = open_dataset(tmp_path / "b", "foreign", "train")
    there = open_dataset(f"s3://{bucket}/copy", "foreign", "train")
    assert here.manifest.digest == there.manifest.digest == manifest.digest
    assert here.read(2, 3) == there.read(2, 3)
    assert there.remote


def test_shards_elsewhere_are_named_by_their_place(tmp_path, bucket):
    write(tmp_path / "raw", "classification")
    upload(tmp_path / "raw", f"s3://{bucket}/raw")
    near = index(tmp_path / "raw", tmp_path / "x/data")
    far = index(f"s3://{bucket}/raw", tmp_path / "y/data")
    assert (near.shards_at, far.shards_at) == (str(tmp_path / "raw"), f"s3://{bucket}/raw")
    assert near.digest == far.digest
    dataset = open_dataset(tmp_path / "y/data", "foreign", "train")
    assert dataset.remote
    assert dataset.read(0, 1) == open_dataset(tmp_path / "x/data", "foreign", "train").read(0, 1)


def test_an_interrupted_index_goes_on(tmp_path, monkeypatch):
    write(tmp_path / "raw", "classification")
    original = shard_index.index_shard

    def killed(storage: Any, name: str, *rest: Any) -> Any:
        if name == "002.tar":
            raise KeyboardInterrupt
        return original(storage, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(shard_index, "index_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            index(tmp_path / "raw", tmp_path / "data", threads=1)
    assert not (tmp_path / "data/foreign/train" / FILE_NAME).exists()
    part = next((tmp_path / "data/foreign/train/.parts").iterdir())
    part.write_bytes(part.read_bytes()[:100])  # a power cut that a disk lied about
    names = spied_reads(monkeypatch)
    interrupted = index(tmp_path / "raw", tmp_path / "data")
    assert len(names) == 2
    assert "002.tar" in names
    whole = index(tmp_path / "raw", tmp_path / "other")
    assert interrupted.digest == whole.digest
    assert interrupted.read_rows(2) == whole.read_rows(2)


def test_only_changed_shards_are_read_again(tmp_path, places, monkeypatch, caplog):
    raw, root = places
    write(tmp_path / "raw", "classification")
    put(tmp_path / "raw", raw)
    first = index(raw, root)
    names = spied_reads(monkeypatch)
    assert index(raw, root) == first
    assert names == []
    assert not caplog.records
    with wds.TarWriter(str(tmp_path / "raw/001.tar")) as tar:
        for number in (70, 71):
            tar.write(sample("classification", number))
    put(tmp_path / "raw", raw)
    again = index(raw, root)
    assert "1 of 3 shards are new or have changed since they were indexed (001.tar)" in caplog.text
    assert names == ["001.tar"]
    assert again.digest != first.digest
    dataset = open_dataset(root, "foreign", "train")
    assert [dataset.read(1, row).key for row in range(2)] == ["part1/0070", "part2/0071"]
    parts = open_storage(f"{root}/foreign/train").names(".parts/")
    assert len(parts) == 3


def test_a_shard_that_changed_and_was_not_indexed_again_is_noticed(tmp_path):
    write(tmp_path / "raw", "classification")
    index(tmp_path / "raw", tmp_path / "data")
    dataset = open_dataset(tmp_path / "data", "foreign", "train")
    write(tmp_path / "raw", "multilabel")
    with pytest.raises(DataError, match=r"000\.tar: .*(index it again|shorter)"):
        dataset.read(0, 0)


def test_other_contents_give_another_data_set(tmp_path):
    pack(
        tmp_path / "raw/0.tar",
        [("a.jpg", jpeg(1)), ("a.cls", b"1"), ("a.json", b'{"kind": "cow", "label": 0}')],
    )
    by_class = index(tmp_path / "raw", tmp_path / "data")
    by_field = index(tmp_path / "raw", tmp_path / "data", label="json:kind")
    by_label = index(tmp_path / "raw", tmp_path / "data", label=".json;cls")
    assert len({by_class.digest, by_field.digest, by_label.digest}) == 3
    assert [m.read_rows(0)["labels"].to_pylist() for m in (by_label,)] == [[[0]]]
    index(tmp_path / "raw", tmp_path / "data", label="json:kind")
    assert open_dataset(tmp_path / "data", "foreign", "train").read(0, 0).label == b"2"


def test_a_prepared_data_set_is_not_written_over(make_dataset, tmp_path):
    make_dataset("classification", [3])
    write(tmp_path / "raw", "classification")
    contents = ShardContents(task="classification", classes=CLASSES)
    with pytest.raises(DataError, match="holds a prepared data set"):
        index_shards([tmp_path / "raw"], tmp_path / "tiny", "train", contents)


@pytest.mark.parametrize(
    ("name", "text", "names", "ignored"),
    [
        ("c.txt", "ant\n\n bee \n", ("ant", "bee"), 255),
        ("c.yaml", "[ant, bee]", ("ant", "bee"), 255),
        ("c.yaml", "names: {1: bee, 0: ant}\nignore_label: 7", ("ant", "bee"), 7),
        ("c.yaml", "names: {1: bee, 2: ant}", "the ids in shards cannot be changed", 0),
        ("c.yaml", "names: [ant, 3]", "write a list of names", 0),
        ("c.yaml", "names: [ant, ant]", "name each class once", 0),
        ("c.yaml", "names: [ant]\npalette: {}", "nothing else", 0),
        ("c.yaml", "names: [ant\n", "not YAML", 0),
        ("c.yaml", "names: [ant, bee]\nignore_label: 1", "ignore_label 1 among their ids", 0),
        ("c.txt", "", "name each class once", 0),
        ("gone.txt", None, r"gone\.txt: not found", 0),
    ],
)
def test_class_files(tmp_path, name, text, names, ignored):
    if text is not None:
        (tmp_path / name).write_text(text)
    pixels = np.full((24, 33), ignored, np.uint8)
    pack(tmp_path / "raw/x.tar", [("a.jpg", jpeg(1)), ("a.png", png(pixels))])
    classes = str(tmp_path / name)
    if isinstance(names, str):
        with pytest.raises(DataError, match=names):
            index(tmp_path / "raw", tmp_path / "data", "segmentation", classes=classes)
        return
    manifest = index(tmp_path / "raw", tmp_path / "data", "segmentation", classes=classes)
    assert (manifest.class_names, manifest.ignore_label) == (names, ignored)


def test_a_number_of_classes_names_them_by_their_ids(tmp_path):
    write(tmp_path / "raw", "classification")
    manifest = index(tmp_path / "raw", tmp_path / "data", classes=5)
    assert manifest.class_names == ("0", "1", "2", "3", "4")
    assert read_manifest(tmp_path / "data/foreign/train") == manifest


def test_a_destination_that_cannot_be_written(tmp_path, monkeypatch):
    write(tmp_path / "raw", "classification")
    (tmp_path / "data").write_text("")
    with pytest.raises(DataError, match="Not a directory; mend that and start again"):
        index(tmp_path / "raw", tmp_path / "data")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shard_index.pq, "write_table", full)
        with pytest.raises(DataError, match="No space left"):
            index(tmp_path / "raw", tmp_path / "other")
    assert not list((tmp_path / "other").rglob("*.parquet"))
    assert index(tmp_path / "raw", tmp_path / "other").num_samples == sum(COUNTS)
