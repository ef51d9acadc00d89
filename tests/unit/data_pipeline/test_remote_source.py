"""Raw data sets in a bucket, unpacked and in their archives: prepared as from a disk."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
from PIL import Image

from data_pipeline import archives, object_store, raw_files
from data_pipeline.archives import file_stamp, read_bytes
from data_pipeline.errors import DataError, StorageUnavailable
from data_pipeline.formats.synthetic import synthesize
from data_pipeline.manifest import FILE_NAME
from data_pipeline.prepare import Settings, prepare
from data_pipeline.source_tree import SourceTree
from data_pipeline.storage import open_storage
from tests.object_store import Proxy
from tests.unit.data_pipeline.test_archives import write_tar, write_zip
from tests.unit.data_pipeline.test_formats_archives import (
    CITYSCAPES,
    COCO,
    files_below,
    pack_imagenet_train,
    pack_imagenet_val,
    pack_tar,
    pack_zip,
    write_sbd,
)

COUNTS = {
    "imagenet/train": 12, "imagenet/val": 6, "multilabel/train": 9, "multilabel/val": 4,
    "coco/train": 5, "coco/val": 3, "voc/train": 4, "voc/val": 3, "voc/extra": 4,
    "cityscapes/train": 2, "cityscapes/val": 2, "cityscapes/train_extra": 2,
}  # fmt: skip
SETTINGS = Settings(dataset="one", samples_per_shard=3)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_FIRST_WAIT", 0.005)
    archives.forget_archives()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    synthesize(root, counts=COUNTS, size=96)
    return root


@pytest.fixture
def upload(bucket: str):
    """Copy a folder into the bucket, as any tool would."""

    def copy(source: Path, name: str = "raw") -> str:
        target = open_storage(f"s3://{bucket}/{name}")
        for path in files_below(source, ["."]):
            with target.writing(path.relative_to(source).as_posix()) as file:
                file.write(path.read_bytes())
        return target.place

    return copy


def digests(format: str, source: Path | str, out: Path) -> dict[str, str]:
    manifests = prepare(format, source, out, SETTINGS, workers=1)
    return {name: manifest.digest for name, manifest in manifests.items()}


@pytest.mark.parametrize("format", ["imagenet", "multilabel", "coco", "voc", "cityscapes"])
def test_folders_in_a_bucket_are_as_on_a_disk(tmp_path, drawn, upload, format):
    wanted = digests(format, drawn / format, tmp_path / "a")
    assert digests(format, upload(drawn / format), tmp_path / "b") == wanted
    assert len(wanted) >= 2


def pack(format: str, drawn: Path, target: Path) -> None:
    """The archives of a data set as published."""
    target.mkdir()
    if format == "imagenet":
        pack_imagenet_train(target / "ILSVRC2012_img_train.tar", drawn / format)
        pack_imagenet_val(target, drawn / format)
    elif format == "voc":
        published = write_sbd(target.parent / "sbd", drawn)
        root = target.parent / "sbd"
        with tarfile.open(target / "VOCtrainval_11-May-2012.tar", "w") as tar:
            for path in files_below(published, ["ImageSets", "JPEGImages", "SegmentationClass"]):
                tar.add(path, f"VOCdevkit/VOC2012/{path.relative_to(published)}")
        pack_tar(target / "benchmark.tgz", root, ["benchmark_RELEASE"], "w:gz")
    else:
        for name, folders in {"coco": COCO, "cityscapes": CITYSCAPES}[format].items():
            pack_zip(target / name, drawn / format, folders, 8 if format == "coco" else 0)


@pytest.mark.parametrize("format", ["imagenet", "coco", "voc", "cityscapes"])
def test_archives_in_a_bucket_are_as_on_a_disk(tmp_path, drawn, upload, format):
    pack(format, drawn, tmp_path / "packed")
    wanted = digests(format, tmp_path / "packed", tmp_path / "a")
    assert digests(format, upload(tmp_path / "packed"), tmp_path / "b") == wanted


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_member_is_one_request_and_an_index_few(tmp_path, upload, proxy, kind):
    (tmp_path / "raw").mkdir()
    content = {f"top/{number:03d}.txt": bytes([number]) * 3000 for number in range(250)}
    (write_tar if kind == "tar" else write_zip)(tmp_path / f"raw/x.{kind}", content)
    tree = SourceTree(upload(tmp_path / "raw"), {f"x.{kind}": "top"})
    proxy.requests.clear()
    files = tree.files("top")
    assert len(files) == 250
    assert len(proxy.requests) <= 6  # listings of the root and of the folder, size, ranges
    proxy.requests.clear()
    assert {f"top/{name}": read_bytes(files[name]) for name in list(files)[:9]} == {
        name: content[name] for name in list(content)[:9]
    }
    assert proxy.paths("GET", f"x.{kind}") == [path for _, path in proxy.requests]
    assert len(proxy.requests) == 9


def write_folder_layout(root: Path) -> None:
    for split, count in (("train", 4), ("val", 2)):
        for folder in ("images", "masks"):
            (root / folder / split).mkdir(parents=True)
        for number in range(count):
            picture = np.full((6, 8, 3), 20 * number, np.uint8)
            (root / f"images/{split}/{number}.jpg").write_bytes(simplejpeg.encode_jpeg(picture))
            mask = Image.fromarray(np.full((6, 8), number % 2, np.uint8))
            mask.save(root / f"masks/{split}/{number}.png")
    (root / "classes.yaml").write_text("names: [background, road]\n")


def test_pictures_of_ones_own(tmp_path, upload):
    write_folder_layout(tmp_path / "mine")
    wanted = digests("folder", tmp_path / "mine", tmp_path / "a")
    assert digests("folder", upload(tmp_path / "mine"), tmp_path / "b") == wanted
    (tmp_path / "mine/masks/train/2.png").unlink()
    with pytest.raises(DataError, match=r"images/train/2\.jpg: has no mask; expected s3://"):
        prepare("folder", upload(tmp_path / "mine", "other"), tmp_path / "c", workers=1)


@pytest.mark.parametrize("place", ["train-{:05d}.tar", "train/{}.tar"])
def test_labelled_shards(tmp_path, upload, place):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/classes.txt").write_text("ant\nbee\n")
    for shard in range(3):
        picture = simplejpeg.encode_jpeg(np.zeros((8, 9 + shard, 3), np.uint8))
        members = {f"{shard}-{i}.{kind}": picture for i in range(4) for kind in ("jpg", "cls")}
        members = {n: b"bee" if n.endswith("cls") else data for n, data in members.items()}
        (tmp_path / "raw" / place.format(shard)).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / "raw" / place.format(shard), members)
    wanted = digests("multilabel", tmp_path / "raw", tmp_path / "a")
    assert digests("multilabel", upload(tmp_path / "raw"), tmp_path / "b") == wanted


@pytest.mark.parametrize("form", ["parquet", "tsv"])
def test_lists_of_labels_and_paths(tmp_path, upload, form):
    (tmp_path / "raw/pictures").mkdir(parents=True)
    labels = [["ant"], ["bee", "ant"], [], ["cow"]]
    for number in range(4):
        picture = simplejpeg.encode_jpeg(np.zeros((8, 9 + number, 3), np.uint8))
        (tmp_path / f"raw/pictures/{number}.jpg").write_bytes(picture)
    paths = [f"pictures/{number}.jpg" for number in range(4)]
    if form == "tsv":
        rows = [f"{path}\t{','.join(names)}\n" for path, names in zip(paths, labels, strict=True)]
        (tmp_path / "raw/train.tsv").write_text("".join(rows))
    else:
        table = pa.table({"path": paths, "labels": pa.array(labels, pa.list_(pa.string()))})
        pq.write_table(table, tmp_path / "raw/train.parquet")
    (tmp_path / "raw/classes.txt").write_text("ant\nbee\ncow\n")
    wanted = digests("multilabel", tmp_path / "raw", tmp_path / "a")
    assert digests("multilabel", upload(tmp_path / "raw"), tmp_path / "b") == wanted


def test_a_busy_store_is_waited_for(tmp_path, drawn, upload, proxy: Proxy):
    pack("imagenet", drawn, tmp_path / "packed")
    wanted = digests("imagenet", tmp_path / "packed", tmp_path / "a")
    source = upload(tmp_path / "packed")
    proxy.faults.extend(["slowdown", None, "truncate", "reset", None, "error", None] * 4)
    assert digests("imagenet", source, tmp_path / "b") == wanted
    assert not proxy.faults


def test_a_store_that_is_down_makes_no_sample_a_broken_one(
    tmp_path, drawn, upload, proxy, monkeypatch
):
    source = upload(drawn / "imagenet")

    def stop(split: str, done: int, total: int) -> None:
        proxy.down = True

    original = object_store.ObjectStore.__init__
    monkeypatch.setattr(
        object_store.ObjectStore,
        "__init__",
        lambda self, place, **_: original(self, place, patience=0.1, timeout=1),
    )
    settings = Settings(samples_per_shard=3, on_broken="skip")
    with pytest.raises(StorageUnavailable):
        prepare("imagenet", source, tmp_path / "out", settings, workers=1, progress=stop)
    assert not (tmp_path / "out/train" / FILE_NAME).exists()
    proxy.down = False
    again = prepare("imagenet", source, tmp_path / "out", settings, workers=1)
    assert again["train"].source["skipped"] == 0


def test_a_changed_object_changes_its_stamp_and_a_missing_one_is_named(tmp_path, bucket):
    storage = open_storage(f"s3://{bucket}/raw")
    with storage.writing("images/a.txt") as file:
        file.write(b"first")
    tree = SourceTree(storage.place)
    first = tree.file("images/a.txt")
    assert file_stamp(first)[:2] == ["a.txt", 5]
    with storage.writing("images/a.txt") as file:
        file.write(b"other")
    raw_files.forget_listings()
    assert file_stamp(SourceTree(storage.place).file("images/a.txt")) != file_stamp(first)
    assert read_bytes(first) == b"other"
    missing = tree.file("images/b.txt")
    assert file_stamp(missing) == ["b.txt", None, None]
    with pytest.raises(DataError, match=r"s3://.*/raw/images/b\.txt: not there"):
        read_bytes(missing)


def test_finished_is_found_and_a_changed_source_refused(tmp_path, drawn, upload, proxy):
    source = upload(drawn / "voc")
    first = digests("voc", source, tmp_path / "out")
    proxy.requests.clear()
    assert digests("voc", source, tmp_path / "out") == first
    assert not proxy.paths("GET", ".jpg")
    changed = tmp_path / "changed"
    shutil.copytree(drawn / "voc", changed)
    picture = next((changed / "VOCdevkit/VOC2012/JPEGImages").iterdir())
    Image.open(picture).save(picture, "JPEG", quality=30)
    with pytest.raises(DataError, match="prepared before from other inputs"):
        digests("voc", upload(changed), tmp_path / "out")


def test_what_is_not_there_or_not_possible_is_said(tmp_path, bucket):
    with pytest.raises(DataError, match="no object has a name that goes on from it"):
        prepare("voc", f"s3://{bucket}/nowhere", tmp_path / "out")
    storage = open_storage(f"s3://{bucket}/raw")
    with storage.writing("train/00000.tar") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"missing JPEGImages.*found: train"):
        prepare("voc", storage.place, tmp_path / "out")
    with pytest.raises(DataError, match=r"neither classes\.txt nor train\.parquet"):
        prepare("multilabel", storage.place, tmp_path / "out")
    with pytest.raises(StorageUnavailable, match="no such bucket"):
        prepare("voc", "s3://not-made-by-anyone/raw", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_cut_short_is_named(tmp_path, drawn, upload):
    pack("imagenet", drawn, tmp_path / "packed")
    path = tmp_path / "packed/ILSVRC2012_img_train.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"img_train\.tar: not a whole tar archive"):
        prepare("imagenet", upload(tmp_path / "packed"), tmp_path / "out", workers=1)
