import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from pycocotools import mask as rle

from data_pipeline.errors import DataError
from data_pipeline.formats import coco
from data_pipeline.formats.sample import VOC_CLASSES

HEIGHT, WIDTH = 60, 80
# Ids that are not COCO's: only names count.
CATEGORIES = {"tv": 1, "cat": 2, "airplane": 3, "toaster": 4, "couch": 5}


def box(x: int, y: int, w: int, h: int) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def annotation(
    name: str, area: float, segmentation: Any, *, crowd: int = 0, image: int = 1
) -> dict:
    return {
        "category_id": CATEGORIES[name],
        "image_id": image,
        "area": area,
        "iscrowd": crowd,
        "segmentation": segmentation,
    }


def write(source: Path, annotations: list[dict], images: int = 1, **changes: Any) -> Path:
    (source / "annotations").mkdir(exist_ok=True)
    (source / "val2017").mkdir(exist_ok=True)
    rows = []
    for number in range(1, images + 1):
        name = f"{number:012d}.jpg"
        picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        (source / "val2017" / name).write_bytes(simplejpeg.encode_jpeg(picture))
        rows.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH} | changes)
    content = {
        "images": rows,
        "annotations": [entry | {"id": 100 + i} for i, entry in enumerate(annotations)],
        "categories": [{"id": number, "name": name} for name, number in CATEGORIES.items()],
    }
    path = source / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(content))
    return path


def mask_of(source: Path) -> np.ndarray:
    split = coco.read_split(source, "val")
    label = split.load(split.items[0]).label
    return cv2.imdecode(np.frombuffer(label, np.uint8), cv2.IMREAD_UNCHANGED)


def test_small_instances_are_painted_over_large_ones_whatever_their_order(tmp_path):
    small, large = (
        annotation("tv", 100, box(20, 20, 10, 10)),
        annotation("cat", 2000, box(0, 0, 50, 40)),
    )
    for order in ([small, large], [large, small]):
        write(tmp_path, order)
        mask = mask_of(tmp_path)
        assert mask[25, 25] == VOC_CLASSES.index("tvmonitor") == 20
        assert mask[5, 5] == VOC_CLASSES.index("cat") == 8
        assert mask[55, 70] == 0


def test_categories_are_renamed_and_others_are_background(tmp_path):
    names = ["airplane", "couch", "toaster"]
    write(
        tmp_path,
        [annotation(name, 1001, box(25 * i, 0, 20, 50)) for i, name in enumerate(names)],
    )
    mask = mask_of(tmp_path)
    assert [mask[10, 10], mask[10, 35], mask[10, 60]] == [1, 18, 0]


def test_a_crowd_is_ignored_but_instances_show_in_front_of_it(tmp_path):
    crowd = np.zeros((HEIGHT, WIDTH), np.uint8)
    crowd[10:50, 10:70] = 1
    flat = crowd.ravel(order="F")
    runs = np.diff(np.flatnonzero(np.diff(flat, prepend=0, append=2)), prepend=0).tolist()
    regions = {"size": [HEIGHT, WIDTH], "counts": runs}
    write(
        tmp_path,
        [
            annotation("cat", 1500, box(0, 0, 30, 50)),
            annotation("cat", 50, regions, crowd=1),  # smaller, yet behind
        ],
    )
    mask = mask_of(tmp_path)
    assert mask[20, 20] == 8
    assert mask[20, 50] == 255
    assert np.array_equal(mask == 255, (crowd == 1) & (mask != 8))


def test_a_crowd_of_another_class_is_background(tmp_path):
    regions = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
    write(
        tmp_path,
        [annotation("cat", 1500, box(0, 0, 9, 9)), annotation("toaster", 9, regions, crowd=1)],
    )
    assert 255 not in mask_of(tmp_path)


def test_run_length_codes_give_the_same_region_compressed_or_not():
    wanted = np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.5
    compressed = rle.encode(np.asfortranarray(wanted.astype(np.uint8)))
    as_text = {"size": compressed["size"], "counts": compressed["counts"].decode()}
    flat = wanted.ravel(order="F").astype(np.int8)
    runs = np.diff(np.flatnonzero(np.diff(flat, prepend=0, append=2)), prepend=0).tolist()
    for code in (compressed, as_text, {"size": [HEIGHT, WIDTH], "counts": runs}):
        assert np.array_equal(coco.region(code, HEIGHT, WIDTH, "x"), wanted)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "three corners"),
        ([[0, 0, 5, 5]], "three corners"),
        ({"size": [WIDTH, HEIGHT], "counts": [1]}, "for a picture of"),
        ({"size": [HEIGHT, WIDTH], "counts": [10, HEIGHT * WIDTH]}, "runs of 4810 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH + 5, -5]}, "runs of"),
        ({"counts": [1]}, "size"),
    ],
)
def test_broken_regions_are_named(tmp_path, segmentation, message):
    with pytest.raises(DataError, match=f"annotation 7: broken region: .*{message}"):
        coco.region(segmentation, HEIGHT, WIDTH, "annotation 7")


def test_pictures_are_kept_by_the_area_of_a_single_voc_instance(tmp_path):
    write(
        tmp_path,
        [
            annotation("cat", 1001, box(0, 0, 9, 9), image=1),
            annotation("cat", 1000, box(0, 0, 9, 9), image=2),
            annotation("toaster", 3000, box(0, 0, 9, 9), image=3),
            annotation("cat", 3000, box(0, 0, 9, 9), image=4, crowd=1),
            annotation("cat", 800, box(0, 0, 9, 9), image=5),
            annotation("tv", 800, box(0, 0, 9, 9), image=5),
        ],
        images=6,
    )
    assert [item.key for item in coco.read_split(tmp_path, "val").items] == ["000000000001"]
    kept = coco.read_split(tmp_path, "val2017", min_area=700).items
    assert [int(item.key) for item in kept] == [1, 2, 5]


def test_a_picture_of_another_size_than_annotated_is_broken(tmp_path):
    write(tmp_path, [annotation("cat", 1500, box(0, 0, 9, 9))], height=61)
    with pytest.raises(DataError, match="80x60, but its mask is 80x61"):
        mask_of(tmp_path)


def test_a_file_name_may_not_leave_the_folder(tmp_path):
    write(tmp_path, [annotation("cat", 1500, box(0, 0, 9, 9))], file_name="../../x.jpg")
    with pytest.raises(DataError, match="leaves the folder"):
        coco.read_split(tmp_path, "val")


@pytest.mark.parametrize("content", ["{", "[]", '{"images": []}', '{"categories": [3]}'])
def test_other_json_is_refused(tmp_path, content):
    write(tmp_path, []).write_text(content)
    with pytest.raises(DataError, match=r"instances_val2017\.json: not COCO's"):
        coco.read_split(tmp_path, "val")


def test_the_splits_are_those_with_annotations(tmp_path):
    write(tmp_path, [])
    assert coco.splits(tmp_path) == ("val",)
    with pytest.raises(DataError, match="no split 'train'; found: val"):
        coco.read_split(tmp_path, "train2017")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(DataError, match="missing annotations"):
        coco.splits(tmp_path / "elsewhere")
