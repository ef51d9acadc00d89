from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from data_pipeline.errors import DataError
from data_pipeline.formats import imagenet


def add(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(simplejpeg.encode_jpeg(np.zeros((8, 12, 3), np.uint8)))
    return path


def test_class_ids_are_those_of_train_in_every_split(tmp_path):
    add(tmp_path / "train/n01/n01_5.JPEG")
    add(tmp_path / "train/n02/b.jpg")
    add(tmp_path / "train/n03/c.png")
    add(tmp_path / "val/n03/ILSVRC2012_val_1.JPEG")
    assert imagenet.splits(tmp_path) == ("train", "val")
    train = imagenet.read_split(tmp_path, "train")
    val = imagenet.read_split(tmp_path, "val")
    assert train.class_names == val.class_names == ("n01", "n02", "n03")
    assert train.task == "classification"
    assert [(item.key, item.label) for item in train.items] == [
        ("n01_5", 0),
        ("n02_b", 1),
        ("n03_c", 2),
    ]
    loaded = val.load(val.items[0])
    assert (loaded.key, loaded.label, loaded.labels) == ("n03_ILSVRC2012_val_1", b"2", (2,))
    # Named .png, but a JPEG: the extension follows the content.
    assert train.load(train.items[2]).image_extension == "jpg"
    assert (loaded.width, loaded.height) == (12, 8)


def test_a_class_that_train_lacks_is_an_error(tmp_path):
    add(tmp_path / "train/n01/a.JPEG")
    add(tmp_path / "val/n09/b.JPEG")
    with pytest.raises(DataError, match="train lacks: n09"):
        imagenet.read_split(tmp_path, "val")


def test_other_files_are_left_out_with_a_warning(tmp_path):
    add(tmp_path / "train/n01/a.JPEG")
    (tmp_path / "train/n01/readme.txt").write_text("x")
    split = imagenet.read_split(tmp_path, "train")
    assert len(split.items) == 1
    assert "1 files are no pictures and were left out, first n01/readme.txt" in split.warnings[0]


def test_a_missing_picture_and_a_missing_split_are_named(tmp_path):
    path = add(tmp_path / "train/n01/a.JPEG")
    split = imagenet.read_split(tmp_path, "train")
    path.unlink()
    with pytest.raises(DataError, match=r"a\.JPEG: No such file"):
        split.load(split.items[0])
    with pytest.raises(DataError, match="no split 'test'; found: train"):
        imagenet.read_split(tmp_path, "test")
