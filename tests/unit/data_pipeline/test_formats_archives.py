"""The data sets in their published archives: the same manifests as from the folders."""

import io
import os
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data_pipeline import archives
from data_pipeline.errors import DataError
from data_pipeline.formats import cityscapes, imagenet, voc
from data_pipeline.formats.synthetic import synthesize
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import Settings, prepare

COUNTS = {
    "imagenet/train": 20, "imagenet/val": 10, "coco/train": 6, "coco/val": 4,
    "voc/train": 5, "voc/val": 4, "voc/extra": 5,
    "cityscapes/train": 3, "cityscapes/val": 2, "cityscapes/train_extra": 3,
}  # fmt: skip
CITYSCAPES = {
    "leftImg8bit_trainvaltest.zip": ("leftImg8bit/train", "leftImg8bit/val", "leftImg8bit/test"),
    "leftImg8bit_trainextra.zip": ("leftImg8bit/train_extra",),
    "gtFine_trainvaltest.zip": ("gtFine",),
    "gtCoarse.zip": ("gtCoarse",),
}
COCO = {
    "train2017.zip": ("train2017",),
    "val2017.zip": ("val2017",),
    "annotations_trainval2017.zip": ("annotations",),
}


@pytest.fixture(autouse=True)
def _fresh_indexes():
    archives.forget_archives()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    synthesize(root, layouts=["imagenet", "coco", "voc", "cityscapes"], counts=COUNTS, size=96)
    return root


def files_below(root: Path, folders: Iterable[str]) -> list[Path]:
    return sorted(p for name in folders for p in (root / name).rglob("*") if p.is_file())


def pack_zip(path: Path, root: Path, folders: Iterable[str], method=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in files_below(root, folders):
            archive.write(file, file.relative_to(root))


def pack_tar(path: Path, root: Path, folders: Iterable[str], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for file in files_below(root, folders):
            tar.add(file, file.relative_to(root))


def add_bytes(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def pack_imagenet_train(path: Path, root: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for folder in sorted((root / "train").iterdir()):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as class_tar:
                for file in sorted(folder.iterdir()):
                    class_tar.add(file, file.name)
            add_bytes(tar, f"{folder.name}.tar", inner.getvalue())


def devkit(classes: list[str], truth: list[int]) -> dict[str, bytes]:
    """The files of the devkit; ids count the classes in the order given, a group follows them."""
    rows = [(number, name) for number, name in enumerate([*classes, "group"], start=1)]
    rows[-1] = (1001, "group")
    kind = np.dtype([("ILSVRC2012_ID", object), ("WNID", object)])
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, kind).reshape(-1, 1)})
    root = "ILSVRC2012_devkit_t12/data"
    return {
        f"{root}/meta.mat": buffer.getvalue(),
        f"{root}/ILSVRC2012_validation_ground_truth.txt": "".join(f"{i}\n" for i in truth).encode(),
    }


def pack_imagenet_val(target: Path, root: Path) -> tuple[list[str], list[int]]:
    """ILSVRC2012_img_val.tar of pictures in val's class folders, renamed; classes and truth."""
    classes = sorted((folder.name for folder in (root / "val").iterdir()), reverse=True)
    pictures = sorted((p.name, p) for p in files_below(root, ["val"]))
    with tarfile.open(target / "ILSVRC2012_img_val.tar", "w") as tar:
        for number, (_, path) in enumerate(pictures, start=1):
            tar.add(path, f"ILSVRC2012_val_{number:08d}.JPEG")
    truth = [classes.index(path.parent.name) + 1 for _, path in pictures]
    with tarfile.open(target / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        for name, data in devkit(classes, truth).items():
            add_bytes(tar, name, data)
    return classes, truth


def digests(format: str, source: Path, out: Path, **arguments) -> dict[str, str]:
    settings = Settings(dataset="one", samples_per_shard=3)
    manifests = prepare(format, source, out, settings, workers=1, **arguments)
    return {name: manifest.digest for name, manifest in manifests.items()}


def copy_with_val_names(root: Path, target: Path) -> None:
    """The class folders with ImageNet's own names of validation pictures."""
    target.mkdir()
    os.symlink(root / "train", target / "train")
    for number, (_, path) in enumerate(sorted((p.name, p) for p in files_below(root, ["val"])), 1):
        folder = target / "val" / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(path.read_bytes())


def test_imagenet(tmp_path, drawn):
    copy_with_val_names(drawn / "imagenet", tmp_path / "folders")
    packed = tmp_path / "packed"
    packed.mkdir()
    pack_imagenet_train(packed / "ILSVRC2012_img_train.tar", drawn / "imagenet")
    classes, truth = pack_imagenet_val(packed, drawn / "imagenet")
    wanted = digests("imagenet", tmp_path / "folders", tmp_path / "a")
    assert digests("imagenet", packed, tmp_path / "b") == wanted
    assert list(wanted) == ["train", "val"]
    split = imagenet.read_split(packed, "val")
    assert split.class_names == tuple(sorted(classes))
    assert [split.class_names[item.label] for item in split.items] == [
        classes[number - 1] for number in truth
    ]
    assert (split.expected_count, imagenet.read_split(packed, "train").expected_count) == (
        50_000,
        1_281_167,
    )


def test_imagenets_validation_pictures_alone_take_the_classes_of_the_devkit(tmp_path, drawn):
    classes, truth = pack_imagenet_val(tmp_path, drawn / "imagenet")
    assert imagenet.splits(tmp_path) == ("val",)
    split = imagenet.read_split(tmp_path, "val")
    assert (split.class_names, len(split.items)) == (tuple(sorted(classes)), len(truth))
    # Unpacked, all in one folder as in the archive.
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar") as tar:
        tar.extractall(tmp_path / "val", filter="data")
    (tmp_path / "ILSVRC2012_img_val.tar").unlink()
    again = imagenet.read_split(tmp_path, "val")
    assert [(item.key, item.label) for item in again.items] == [
        (item.key, item.label) for item in split.items
    ]
    (tmp_path / f"val/ILSVRC2012_val_{len(truth) + 1:08d}.JPEG").write_bytes(b"x")
    with pytest.raises(DataError, match=f"the devkit has {len(truth)} labels"):
        imagenet.read_split(tmp_path, "val")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("meta.mat", b"no matlab file", "not the devkit's meta.mat"),
        ("ILSVRC2012_validation_ground_truth.txt", b"1\n77\n", "77 is no class id of meta.mat"),
    ],
)
def test_a_broken_devkit_is_named(tmp_path, drawn, name, data, message):
    classes, truth = pack_imagenet_val(tmp_path, drawn / "imagenet")
    for path, content in devkit(classes, truth).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    (tmp_path / "ILSVRC2012_devkit_t12/data" / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        imagenet.read_split(tmp_path, "val")


def test_coco(tmp_path, drawn):
    for name, folders in COCO.items():
        pack_zip(tmp_path / name, drawn / "coco", folders, zipfile.ZIP_DEFLATED)
    wanted = digests("coco", drawn / "coco", tmp_path / "a")
    assert digests("coco", tmp_path, tmp_path / "b") == wanted
    assert list(wanted) == ["train", "val"]


def test_cityscapes_and_its_test_split_without_labels(tmp_path, drawn):
    source = tmp_path / "folders"
    source.mkdir()
    for name in ("gtFine", "gtCoarse"):
        os.symlink(drawn / "cityscapes" / name, source / name)
    (source / "leftImg8bit").mkdir()
    for name in ("train", "val", "train_extra"):
        os.symlink(drawn / "cityscapes/leftImg8bit" / name, source / "leftImg8bit" / name)
    pictures = files_below(drawn / "cityscapes", ["leftImg8bit/val"])
    (source / "leftImg8bit/test/berlin").mkdir(parents=True)
    for number, path in enumerate(pictures):
        name = f"berlin_{number:06d}_000019_leftImg8bit.png"
        (source / "leftImg8bit/test/berlin" / name).write_bytes(path.read_bytes())
    for name, folders in CITYSCAPES.items():
        pack_zip(tmp_path / name, source, folders)
    wanted = digests("cityscapes", source, tmp_path / "a")
    assert digests("cityscapes", tmp_path, tmp_path / "b") == wanted
    assert len(wanted) == 7
    assert cityscapes.read_split(source, "test").expected_count == 1525
    settings = Settings(dataset="one", samples_per_shard=3)
    test = prepare("cityscapes", source, tmp_path / "a", settings, splits=["test"], workers=1)
    check_unlabelled(test["test"], tmp_path / "a/test", [path.read_bytes() for path in pictures])


def check_unlabelled(manifest: Manifest, directory: Path, images: list[bytes]) -> None:
    assert manifest.has_labels is False
    rows = manifest.read_rows(0).to_pylist()
    assert {row["label_size"] for row in rows} == {0}
    assert all(row["labels"] == [] for row in rows)
    with tarfile.open(directory / manifest.shards[0].name) as tar:
        names = tar.getnames()
        found = [tar.extractfile(name).read() for name in names]
    assert all(name.endswith(".png") and not name.endswith(".seg.png") for name in names)
    assert sorted(found) == sorted(images)
    assert all(row["offset"] <= row["label_offset"] <= row["offset"] + row["size"] for row in rows)


def write_sbd(target: Path, drawn: Path) -> Path:
    """VOC as published in `target`, its extra masks in SBD's form under benchmark_RELEASE."""
    root = drawn / "voc/VOCdevkit/VOC2012"
    dataset = target / "benchmark_RELEASE/dataset"
    (dataset / "cls").mkdir(parents=True)
    lists = {n: (root / f"ImageSets/Segmentation/{n}.txt").read_text().split() for n in
             ("train", "val", "trainaug")}  # fmt: skip
    extra = sorted(set(lists["trainaug"]) - set(lists["train"]))
    # SBD has pictures of VOC's val too, and other masks for some of VOC's train.
    parts = {"train": [*extra[:3], lists["val"][0], lists["train"][0]], "val": extra[3:]}
    for part, names in parts.items():
        (dataset / f"{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            path = root / f"SegmentationClassAug/{name}.png"
            ids = np.array(Image.open(path)) if name in extra else np.full((3, 3), 9, np.uint8)
            content = {"GTcls": {"Segmentation": ids, "CategoriesPresent": np.unique(ids)}}
            savemat(dataset / f"cls/{name}.mat", content, do_compression=True)
    published = target / "VOCdevkit/VOC2012"
    (published / "ImageSets/Segmentation").mkdir(parents=True)
    for name in ("JPEGImages", "SegmentationClass"):
        os.symlink(root / name, published / name)
    for name in ("train", "val", "trainval"):
        path = f"ImageSets/Segmentation/{name}.txt"
        (published / path).write_bytes((root / path).read_bytes())
    return published


def test_voc_with_the_masks_of_sbd(tmp_path, drawn):
    published = write_sbd(tmp_path / "folders", drawn)
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "VOCtrainval_11-May-2012.tar", "w") as tar:
        for name in ("ImageSets", "JPEGImages", "SegmentationClass"):
            for path in files_below(published, [name]):
                tar.add(path, f"VOCdevkit/VOC2012/{path.relative_to(published)}")
    pack_tar(packed / "benchmark.tgz", tmp_path / "folders", ["benchmark_RELEASE"], "w:gz")
    # The ready-made masks of the same pictures; both know the same trainaug.
    wanted = digests("voc", drawn / "voc", tmp_path / "a")
    assert digests("voc", tmp_path / "folders", tmp_path / "b") == wanted
    assert digests("voc", packed, tmp_path / "c") == wanted
    assert list(wanted) == ["train", "trainaug", "trainval", "val"]
    split = voc.read_split(packed, "trainaug")
    assert (len(split.items), split.expected_count) == (10, 10582)
    # VOC's own masks win over those of SBD.
    endings = [str(item.files[1]).rsplit(".", 1)[1] for item in split.items]
    assert (endings.count("png"), endings.count("mat")) == (5, 5)


def test_voc_with_ready_made_masks_and_no_list(tmp_path, drawn):
    root = drawn / "voc/VOCdevkit/VOC2012"
    published = write_sbd(tmp_path, drawn)
    for path in files_below(tmp_path, ["benchmark_RELEASE"]):
        path.unlink()
    (tmp_path / "benchmark_RELEASE/dataset/cls").rmdir()
    (tmp_path / "benchmark_RELEASE/dataset").rmdir()
    (tmp_path / "benchmark_RELEASE").rmdir()
    assert voc.splits(tmp_path) == ("train", "trainval", "val")
    pack_zip(tmp_path / "SegmentationClassAug.zip", root, ["SegmentationClassAug"])
    assert published.exists()
    split = voc.read_split(tmp_path, "trainaug")
    listed = (root / "ImageSets/Segmentation/trainaug.txt").read_text().split()
    assert [item.key for item in split.items] == listed
    assert all("SegmentationClassAug.zip" in str(item.files[1]) for item in split.items)
    assert split.load(split.items[0]).labels


@pytest.mark.parametrize(
    "content", [b"no matlab file", {"other": 1}, {"GTcls": {"Segmentation": np.zeros(3)}}]
)
def test_a_broken_mask_of_sbd_is_named(tmp_path, content):
    path = tmp_path / "a.mat"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        savemat(path, content)
    with pytest.raises(DataError, match=r"a\.mat: not a mask of SBD"):
        voc.read_sbd_mask(str(path))


def test_worker_processes_read_members_of_archives(tmp_path, drawn):
    (tmp_path / "packed").mkdir()
    pack_imagenet_train(tmp_path / "packed/ILSVRC2012_img_train.tar", drawn / "imagenet")
    alone = digests("imagenet", tmp_path / "packed", tmp_path / "a")
    settings = Settings(dataset="one", samples_per_shard=3)
    together = prepare("imagenet", tmp_path / "packed", tmp_path / "b", settings, workers=2)
    assert {name: manifest.digest for name, manifest in together.items()} == alone
    # Finished, it is found; from a changed archive it is another data set.
    assert digests("imagenet", tmp_path / "packed", tmp_path / "a") == alone
    os.utime(tmp_path / "packed/ILSVRC2012_img_train.tar", ns=(1, 1))
    with pytest.raises(DataError, match="prepared before from other inputs"):
        digests("imagenet", tmp_path / "packed", tmp_path / "a")


def test_a_layout_that_is_not_there_names_the_archives_too(tmp_path):
    with pytest.raises(DataError, match=r"or the archives leftImg8bit_trainvaltest\.zip"):
        cityscapes.splits(tmp_path)


@pytest.mark.data
@pytest.mark.skipif("ATROUS_TEST_DATA" not in os.environ, reason="ATROUS_TEST_DATA is not set")
@pytest.mark.parametrize("format", ["coco", "voc", "imagenet"])
def test_real_pictures_packed(tmp_path, format):
    root = Path(os.environ["ATROUS_TEST_DATA"])
    source = {"coco": root / "coco", "voc": root, "imagenet": root / "imagenette"}[format]
    packed = tmp_path / "packed"
    packed.mkdir()
    if format == "coco":
        for name, folders in COCO.items():
            pack_zip(packed / name, source, folders)
    elif format == "voc":
        pack_tar(packed / "VOCtrainval_11-May-2012.tar", source, ["VOCdevkit"])
    else:
        pack_imagenet_train(packed / "ILSVRC2012_img_train.tar", source)
    settings = Settings(dataset="one", samples_per_shard=100, limit=150)
    splits = ["train"]
    wanted = prepare(format, source, tmp_path / "a", settings, splits=splits, workers=1)
    found = prepare(format, packed, tmp_path / "b", settings, splits=splits, workers=1)
    assert found["train"].digest == wanted["train"].digest
    assert found["train"].num_samples > 90
