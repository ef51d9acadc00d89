"""Preparation of real pictures in their original layouts, read back by WebDataset."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from pycocotools.coco import COCO

from data_pipeline.formats.sample import VOC_CLASSES
from data_pipeline.prepare import Settings, prepare

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif("ATROUS_TEST_DATA" not in os.environ, reason="ATROUS_TEST_DATA is not set"),
]
DATA = Path(os.environ.get("ATROUS_TEST_DATA", "."))


def read_back(directory: Path) -> dict[str, dict]:
    """The members of every sample, still encoded."""
    shards = [str(path) for path in sorted(directory.glob("*.tar"))]
    return {entry["__key__"]: entry for entry in wds.WebDataset(shards, shardshuffle=False)}


def unpack(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.mode == "L"
        return np.asarray(image)


def prepare_one(format: str, folder: str, out: Path, split: str, limit: int | None = None):
    settings = Settings(samples_per_shard=100, limit=limit)
    return prepare(format, DATA / folder, out, settings, splits=[split], workers=1)[split]


@pytest.mark.parametrize(
    ("split", "count", "official", "folder"),
    [
        ("train", 457, 1464, "SegmentationClass"),
        ("val", 465, 1449, "SegmentationClass"),
        ("trainaug", 527, 10582, "SegmentationClassAug"),
    ],
)
def test_voc_masks_are_the_original_indices(tmp_path, split, count, official, folder):
    manifest = prepare_one("voc", "", tmp_path, split)
    assert manifest.num_samples == count
    assert manifest.source["warnings"] == [
        f"{split}: {count} inputs; the official split has {official}"
    ]
    read = read_back(tmp_path / split)
    assert len(read) == count
    root = DATA / "VOCdevkit/VOC2012"
    for key in list(read)[::40]:
        with Image.open(root / folder / f"{key}.png") as image:
            assert image.mode == "P"
            indices = np.asarray(image)
        assert np.array_equal(unpack(read[key]["seg.png"]), indices)
        assert read[key]["jpg"] == (root / "JPEGImages" / f"{key}.jpg").read_bytes()
    labels = {row["key"]: row["labels"] for row in manifest.read_rows(0).to_pylist()}
    for key in list(labels)[:10]:
        present = set(np.unique(unpack(read[key]["seg.png"]))) - {255}
        assert set(labels[key]) == present


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_masks_agree_with_cocos_own_tools(tmp_path, split):
    manifest = prepare_one("coco", "coco", tmp_path, split)
    path = DATA / f"coco/annotations/instances_{split}2017.json"
    coco = COCO(path)
    renamed = {
        "aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch",
        "pottedplant": "potted plant", "diningtable": "dining table", "tvmonitor": "tv",
    }  # fmt: skip
    ids = {coco.getCatIds(catNms=[renamed.get(n, n)])[0]: i for i, n in enumerate(VOC_CLASSES) if i}
    assert len(ids) == 20
    images = {
        entry["image_id"]
        for entry in json.loads(path.read_text())["annotations"]
        if entry["category_id"] in ids and not entry["iscrowd"] and entry["area"] > 1000
    }
    read = read_back(tmp_path / split)
    assert {int(key) for key in read} == images
    assert manifest.num_samples == len(images)
    for key, entry in read.items():
        mask = unpack(entry["seg.png"])
        annotations = [a for a in coco.imgToAnns[int(key)] if a["category_id"] in ids]
        wanted = {ids[a["category_id"]] for a in annotations if not a["iscrowd"]}
        assert set(np.unique(mask)) - {0, 255} <= wanted
        regions = [coco.annToMask(a) for a in annotations]
        assert np.array_equal(mask > 0, np.any(regions, axis=0))
        smallest = min((a for a in annotations if not a["iscrowd"]), key=lambda a: a["area"])
        assert (mask[coco.annToMask(smallest) > 0] == ids[smallest["category_id"]]).all()


def test_imagenette_classes_are_mixed_and_bytes_untouched(tmp_path):
    manifest = prepare_one("imagenet", "imagenette", tmp_path, "train", limit=300)
    assert len(manifest.class_names) == 10
    data = (tmp_path / "train" / manifest.shards[0].name).read_bytes()
    rows = manifest.read_rows(0).to_pylist()
    assert len({row["labels"][0] for row in rows}) == 10
    for row in rows[:20]:
        folder, rest = row["key"].split("_", 1)
        found = [DATA / "imagenette/train" / folder / f"{name}.JPEG" for name in (row["key"], rest)]
        original = next(path for path in found if path.exists())
        assert data[row["image_offset"] :][: row["image_size"]] == original.read_bytes()
        assert int(data[row["label_offset"] :][: row["label_size"]]) == row["labels"][0]
