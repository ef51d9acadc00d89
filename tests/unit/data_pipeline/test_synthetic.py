import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.formats import coco
from data_pipeline.formats.sample import VOC_CLASSES, read_mask
from data_pipeline.formats.scene import KINDS, paint, place
from data_pipeline.formats.synthetic import COUNTS, LAYOUTS, synthesize
from data_pipeline.prepare import Settings, prepare

FEW = dict.fromkeys(COUNTS, 16)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    return synthesize(tmp_path_factory.mktemp("synthetic"), counts=FEW, seed=5)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_can_be_prepared_without_a_broken_input(layout, sources, tmp_path):
    result = prepare(
        layout, sources[layout], tmp_path / layout, Settings(samples_per_shard=16), workers=1
    )
    expected = {
        "imagenet": {"train", "val"},
        "multilabel": {"train", "val"},
        "coco": {"train", "val"},
        "voc": {"train", "val", "trainval", "trainaug"},
        "cityscapes": {
            "train",
            "val",
            "trainval",
            "train_extra",
            "train_coarse",
            "trainval_coarse",
        },
    }
    assert set(result) == expected[layout]
    assert all(manifest.source["skipped"] == 0 for manifest in result.values())
    largest = max(result.values(), key=lambda manifest: manifest.num_samples)
    present = {
        label
        for i in range(len(largest.shards))
        for labels in largest.read_rows(i)["labels"].to_pylist()
        for label in labels
    }
    assert len(present) > 5


def test_the_same_call_gives_the_same_bytes_and_other_seeds_others(sources, tmp_path):
    layouts = ["imagenet", "coco", "cityscapes"]
    again = synthesize(tmp_path / "a", counts=FEW, seed=5, layouts=layouts)
    other = synthesize(tmp_path / "b", counts=FEW, seed=6, layouts=layouts)
    for layout in layouts:
        assert digests(again[layout]) == digests(sources[layout])
        pictures = set(digests(again[layout]).values()) & set(digests(other[layout]).values())
        assert not pictures


def test_a_picture_does_not_depend_on_how_many_there_are(sources, tmp_path):
    more = synthesize(tmp_path, counts={"voc/train": 3}, seed=5, layouts=["voc"])["voc"]
    name = "VOCdevkit/VOC2012/JPEGImages/2007_000002.jpg"
    assert (more / name).read_bytes() == (sources["voc"] / name).read_bytes()


def test_a_finished_synthesis_is_kept_and_a_cut_one_made_anew(tmp_path):
    few = {"imagenet/train": 8, "imagenet/val": 8}
    source = synthesize(tmp_path, counts=few, layouts=["imagenet"])["imagenet"]
    before = digests(source)
    (source / "train/bird/extra.txt").write_text("kept: nothing is written again")
    synthesize(tmp_path, counts=few, layouts=["imagenet"])
    assert (source / "train/bird/extra.txt").exists()
    with pytest.raises(DataError, match="with other parameters"):
        synthesize(tmp_path, counts=few, layouts=["imagenet"], seed=1)
    marker = source / "synthetic.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "finished": False}))
    synthesize(tmp_path, counts=few, layouts=["imagenet"])
    assert digests(source) == before


def test_what_was_prepared_is_known_again_after_all_of_it_was_copied(tmp_path):
    def prepared(place):
        drawn = synthesize(place / "raw", counts=FEW, layouts=["voc"])["voc"]
        return prepare("voc", drawn, place / "voc", workers=1)

    before = prepared(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copyfile)
    assert {n: m.digest for n, m in prepared(tmp_path / "there").items()} == {
        n: m.digest for n, m in before.items()
    }


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "voc").mkdir()
    (tmp_path / "voc/precious").write_text("data")
    with pytest.raises(DataError, match="was not synthesized"):
        synthesize(tmp_path, layouts=["voc"])
    assert (tmp_path / "voc/precious").read_text() == "data"


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(DataError, match="ade20k: unknown; layouts: imagenet"):
        synthesize(tmp_path, layouts=["ade20k"])
    with pytest.raises(DataError, match="voc/test: unknown"):
        synthesize(tmp_path, counts={"voc/test": 3})


def test_imagenet_has_every_kind_equally_often(sources):
    counts = {kind: len(list((sources["imagenet"] / "train" / kind).iterdir())) for kind in KINDS}
    assert counts == dict.fromkeys(KINDS, 2)


def test_label_noise_is_in_train_only_and_at_the_given_rates(tmp_path):
    def labels(name: str, **rates: float) -> dict[str, list[list[str]]]:
        source = synthesize(
            tmp_path / name,
            counts={"multilabel/train": 400, "multilabel/val": 20},
            layouts=["multilabel"],
            size=32,
            **rates,
        )["multilabel"]
        return {
            split: pq.read_table(source / f"{split}.parquet")["labels"].to_pylist()
            for split in ("train", "val")
        }

    clean = labels("clean", drop_rate=0, wrong_rate=0)
    noisy = labels("noisy", drop_rate=0.3, wrong_rate=0.2)
    assert clean["val"] == noisy["val"]
    pairs = list(zip(clean["train"], noisy["train"], strict=True))
    total = sum(len(true) for true, _ in pairs)
    dropped = sum(len(set(true) - set(seen)) for true, seen in pairs) / total
    wrong = sum(len(set(seen) - set(true)) for true, seen in pairs) / len(pairs)
    assert dropped == pytest.approx(0.3, abs=0.06)
    assert wrong == pytest.approx(0.2, abs=0.06)


def test_coco_has_crowds_strangers_and_pictures_that_the_filter_drops(tmp_path):
    counts = {"coco/train": 60, "coco/val": 1}
    source = synthesize(tmp_path, counts=counts, layouts=["coco"])["coco"]
    content = json.loads((source / "annotations/instances_train2017.json").read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    seen = {names[entry["category_id"]] for entry in content["annotations"]}
    assert {"airplane", "person", "kite", "frisbee"} <= seen
    crowds = [entry for entry in content["annotations"] if entry["iscrowd"]]
    assert crowds
    for entry in crowds:
        region = coco.region(entry["segmentation"], *entry["segmentation"]["size"], "crowd")
        assert region.sum() == entry["area"]
    kept = coco.read_split(source, "train").items
    assert 30 <= len(kept) < 60


def test_coco_polygons_cover_what_was_painted(sources):
    content = json.loads((sources["coco"] / "annotations/instances_val2017.json").read_text())
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in content["images"]}
    for entry in content["annotations"]:
        region = coco.region(entry["segmentation"], *sizes[entry["image_id"]], "x")
        assert region.sum() == pytest.approx(entry["area"], rel=0.25, abs=40)


def test_voc_masks_have_a_border_except_for_the_extra_ones(sources):
    root = sources["voc"] / "VOCdevkit/VOC2012"
    lists = {
        path.stem: path.read_text().split() for path in (root / "ImageSets/Segmentation").iterdir()
    }
    assert {name: len(entries) for name, entries in lists.items()} == {
        "train": 16,
        "val": 16,
        "trainval": 32,
        "trainaug": 32,
    }
    assert not set(lists["trainaug"]) & set(lists["val"])
    for name in lists["trainaug"]:
        path = root / "SegmentationClassAug" / f"{name}.png"
        mask = read_mask(str(path))
        assert (255 in mask) == (name in lists["train"])
        assert (root / "SegmentationClass" / f"{name}.png").exists() == (name in lists["train"])
    with Image.open(path) as image:
        assert image.mode == "P"
        assert image.getpalette()[3:6] == [128, 0, 0]  # aeroplane's colour in VOC
        assert image.getpalette()[60:63] == [0, 64, 128]  # tvmonitor's


def test_coarse_masks_agree_with_fine_ones_and_leave_borders_out(sources):
    fine_paths = sorted((sources["cityscapes"] / "gtFine/train").rglob("*.png"))
    assert len(fine_paths) == 16
    for path in fine_paths:
        fine = read_mask(str(path))
        coarse = read_mask(str(path).replace("gtFine", "gtCoarse"))
        drawn = coarse > 0
        assert 0.5 < drawn.mean() < 0.98
        assert (coarse[drawn] == fine[drawn]).all()


def test_a_kind_is_told_by_its_texture_and_not_by_its_colour():
    """Mean colours of two kinds differ less than those of two objects of one kind."""
    rng = np.random.default_rng(0)
    means: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        for _ in range(60):
            picture = np.zeros((64, 64, 3), np.uint8)
            entry = place(rng, kind, (32, 32), 25, (64, 64))
            paint(rng, picture, entry)
            means[kind].append(picture[entry.mask(64, 64) > 0].mean(0))
    between = np.std([np.mean(values, 0) for values in means.values()], 0).max()
    within = np.mean([np.std(values, 0) for values in means.values()])
    assert between < within / 2


def test_pictures_have_the_size_asked_for(tmp_path):
    counts = dict.fromkeys(COUNTS, 2)
    sources = synthesize(tmp_path, counts=counts, size=64)
    with Image.open(next((sources["imagenet"] / "train").rglob("*.JPEG"))) as image:
        assert image.size == (64, 64)
    with Image.open(next((sources["cityscapes"] / "leftImg8bit").rglob("*.png"))) as image:
        assert image.size == (128, 64)
    row = pq.read_table(sources["multilabel"] / "train.parquet").to_pylist()[0]
    with Image.open(io.BytesIO(row["image"])) as image:
        assert image.size == (64, 64)
    assert set(KINDS) < set(VOC_CLASSES)
