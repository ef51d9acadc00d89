from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.formats import voc


def write_mask(path: Path, mask: np.ndarray, mode: str = "P") -> None:
    image = Image.fromarray(mask)
    if mode == "P":
        image.putpalette(list(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8)))
    image.save(path)


def make(root: Path, lists: dict[str, str]) -> Path:
    for folder in (
        "JPEGImages",
        "SegmentationClass",
        "SegmentationClassAug",
        "ImageSets/Segmentation",
    ):
        (root / folder).mkdir(parents=True)
    for name in sorted({name for text in lists.values() for name in text.split()}):
        picture = np.zeros((6, 9, 3), np.uint8)
        (root / "JPEGImages" / f"{name}.jpg").write_bytes(simplejpeg.encode_jpeg(picture))
    for split, text in lists.items():
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text(text)
    return root


def full(value: int) -> np.ndarray:
    return np.full((6, 9), value, np.uint8)


def loaded_mask(split, index: int) -> np.ndarray:
    label = split.load(split.items[index]).label
    return cv2.imdecode(np.frombuffer(label, np.uint8), cv2.IMREAD_UNCHANGED)


@pytest.mark.parametrize("folder", ["", "VOCdevkit/VOC2012", "VOC2012"])
def test_the_root_is_found_in_the_usual_places(tmp_path, folder):
    root = make(tmp_path / folder, {"val": "a\nb\n", "train": "c\n"})
    mask = full(0)
    mask[0, :3] = 1, 20, 255
    write_mask(root / "SegmentationClass/a.png", mask)
    assert voc.splits(tmp_path) == ("train", "val")
    split = voc.read_split(tmp_path, "val")
    assert [item.key for item in split.items] == ["a", "b"]
    assert (split.class_names[0], split.class_names[20], split.ignore_label) == (
        "background",
        "tvmonitor",
        255,
    )
    assert split.expected_count == 1449
    assert split.load(split.items[0]).labels == (0, 1, 20)
    assert np.array_equal(loaded_mask(split, 0), mask)


def test_trainaug_takes_the_augmented_masks_and_falls_back(tmp_path):
    root = make(tmp_path, {"trainaug": "a\nb\nc\n", "train": "a\n"})
    write_mask(root / "SegmentationClass/a.png", full(1))
    write_mask(root / "SegmentationClassAug/a.png", full(2), mode="L")
    write_mask(root / "SegmentationClass/b.png", full(3))
    split = voc.read_split(tmp_path, "trainaug")
    assert (loaded_mask(split, 0) == 2).all()
    assert (loaded_mask(split, 1) == 3).all()
    with pytest.raises(DataError, match=r"SegmentationClass/c\.png: No such file"):
        split.load(split.items[2])
    assert (loaded_mask(voc.read_split(tmp_path, "train"), 0) == 1).all()


def test_unknown_ids_and_coloured_masks_are_broken(tmp_path):
    root = make(tmp_path, {"val": "a\nb\n"})
    write_mask(root / "SegmentationClass/a.png", full(21))
    write_mask(root / "SegmentationClass/b.png", np.zeros((6, 9, 3), np.uint8), mode="RGB")
    split = voc.read_split(tmp_path, "val")
    with pytest.raises(DataError, match=r"unknown ids \[21\]"):
        split.load(split.items[0])
    with pytest.raises(DataError, match="mode RGB"):
        split.load(split.items[1])


def test_a_list_may_not_name_files_elsewhere(tmp_path):
    make(tmp_path, {"val": ""})
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("../../etc/passwd\n")
    with pytest.raises(DataError, match="not the name of a picture"):
        voc.read_split(tmp_path, "val")


def test_a_wrong_layout_is_named(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError, match=r"missing JPEGImages.*found: pictures"):
        voc.splits(tmp_path)
