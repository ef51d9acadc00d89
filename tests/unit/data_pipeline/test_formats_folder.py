from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.formats import folder
from data_pipeline.prepare import Settings, prepare

NAMES = "names: [background, road, car]\n"
PALETTE = (
    "palette: {background: [0, 0, 0], road: [128, 64, 128], car: [0, 0, 142], ignore: [9, 9, 9]}\n"
)


def add(source: Path, name: str, mask: np.ndarray | None, size: tuple[int, int] = (4, 6)) -> None:
    image = source / "images" / f"{name}.jpg"
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(simplejpeg.encode_jpeg(np.zeros((*size, 3), np.uint8)))
    if mask is not None:
        path = source / "masks" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)


def full(value: int) -> np.ndarray:
    return np.full((4, 6), value, np.uint8)


def loaded(split, index: int = 0) -> np.ndarray:
    label = split.load(split.items[index]).label
    return cv2.imdecode(np.frombuffer(label, np.uint8), cv2.IMREAD_UNCHANGED)


@pytest.fixture
def source(tmp_path) -> Path:
    source = tmp_path / "mine"
    source.mkdir()
    (source / "classes.yaml").write_text(NAMES)
    return source


def test_without_lists_and_folders_all_is_train(source):
    for number, name in enumerate("ab"):
        add(source, name, full(number))
    assert folder.splits(source) == ("train",)
    split = folder.read_split(source, "train")
    assert (split.class_names, split.ignore_label) == (("background", "road", "car"), 255)
    assert [item.key for item in split.items] == ["a", "b"]
    assert [int(loaded(split, i)[0, 0]) for i in range(2)] == [0, 1]


def test_splits_are_folders(source):
    add(source, "train/x/a", full(0))
    add(source, "train/b", full(1))
    add(source, "val/a", full(2))
    assert folder.splits(source) == ("train", "val")
    train = folder.read_split(source, "train")
    assert sorted(item.key for item in train.items) == ["b", "x_a"]
    assert (loaded(folder.read_split(source, "val")) == 2).all()


def test_splits_are_lists_of_names_with_or_without_extension(source):
    for number, name in enumerate(["a", "b", "deep/c"]):
        add(source, name, full(number))
    (source / "train.txt").write_text("deep/c\na.jpg\n\n")
    (source / "val.txt").write_text("b\n")
    (source / "README.txt").write_text("not a list\n")
    assert folder.splits(source) == ("train", "val")
    train = folder.read_split(source, "train")
    assert [item.key for item in train.items] == ["deep_c", "a"]
    assert [int(loaded(train, i)[0, 0]) for i in range(2)] == [2, 0]


@pytest.mark.parametrize("line", ["zzz", "../a", "/etc/passwd"])
def test_a_listed_picture_must_be_there(source, line):
    add(source, "a", full(0))
    (source / "train.txt").write_text(f"a\n{line}\n")
    with pytest.raises(DataError, match=rf"train\.txt: no picture '{line}' in images"):
        folder.read_split(source, "train")


def test_ids_of_a_mapping_count_on_from_zero_and_the_rest_is_ignored(source):
    (source / "classes.yaml").write_text("names: {1: road, 7: car}\nignore_label: 0\n")
    mask = full(1)
    mask[0, :2] = 0, 7
    add(source, "a", mask)
    split = folder.read_split(source, "train")
    assert split.class_names == ("road", "car")
    assert loaded(split)[0, :3].tolist() == [255, 1, 0]
    assert split.load(split.items[0]).labels == (0, 1)


def test_colours_become_ids(source):
    (source / "classes.yaml").write_text(NAMES + PALETTE)
    mask = np.zeros((4, 6, 3), np.uint8)
    mask[0, :3] = (128, 64, 128), (0, 0, 142), (9, 9, 9)
    add(source, "a", mask)
    add(source, "b", full(2))  # ids, though there is a palette
    mask = mask.copy()
    mask[1, 1] = 1, 2, 3
    add(source, "c", mask)
    split = folder.read_split(source, "train")
    assert loaded(split)[0, :4].tolist() == [1, 2, 255, 0]
    assert (loaded(split, 1) == 2).all()
    with pytest.raises(DataError, match=r"c\.png: colour #010203: not in classes\.yaml"):
        split.load(split.items[2])


def test_what_is_wrong_with_a_mask_is_named_with_its_file(source):
    add(source, "a", full(0) + np.arange(6, dtype=np.uint8))
    add(source, "b", full(0), size=(4, 7))
    add(source, "c", None)
    add(source, "d", np.zeros((4, 6, 3), np.uint8))
    split = folder.read_split(source, "train")
    for index, message in enumerate(
        (
            r"masks/a\.png: id 3, id 4, id 5: not in classes\.yaml",
            r"b\.jpg: 7x4, but its mask is 6x4",
            r"c\.jpg: has no mask; expected .*masks/c\.png",
            r"d\.png: a mask of colours; give classes\.yaml a palette",
        )
    ):
        with pytest.raises(DataError, match=message):
            split.load(split.items[index])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a, b", "not YAML"),
        ("names: []", "0 classes; a mask holds 1 to 255"),
        ("names: [a, a]", "each class once"),
        ("names: [a, ignore]", "none of them 'ignore'"),
        ("names: [a, b]\nignore_label: 1", "ignore_label: 1 is the id of b"),
        ("names: [a]\npalette: {c: [1, 2, 3]}", "palette: c is none of the names"),
        ("names: [a, b]\npalette: {a: [1, 2, 3], b: [1, 2, 3]}", "two classes have one colour"),
        ("names: [a]\npalette: {a: [1, 2, 300]}", r"palette\.a\.2: .*less than or equal to 255"),
        ("names: [a]\ncolors: 1", "colors: Extra inputs"),
        ("- a", "classes.yaml: Input should be"),
    ],
)
def test_a_wrong_classes_file_is_refused(source, text, message):
    add(source, "a", full(0))
    (source / "classes.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        folder.read_split(source, "train")


def test_wrong_layouts_are_named(source):
    with pytest.raises(DataError, match=r"missing images; found: classes\.yaml"):
        folder.splits(source)
    add(source, "train/a", full(0))
    add(source, "b", full(0))
    with pytest.raises(DataError, match="pictures beside the folders train"):
        folder.splits(source)


def test_only_test_may_do_without_masks(tmp_path, source):
    add(source, "train/a", full(1))
    add(source, "test/b", None)
    manifests = prepare("folder", source, tmp_path / "out", workers=1)
    assert (manifests["train"].has_labels, manifests["test"].has_labels) == (True, False)
    (source / "masks/train/a.png").unlink()
    with pytest.raises(DataError, match="1 broken inputs"):
        prepare("folder", source, tmp_path / "new", Settings(), splits=["train"], workers=1)
