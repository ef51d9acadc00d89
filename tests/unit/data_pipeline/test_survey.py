"""The survey counts what is there, and warns of what ruins runs and of nothing else."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.dataset import Dataset
from data_pipeline.formats.sample import Sample
from data_pipeline.manifest import Manifest, read_manifest, write_manifest
from data_pipeline.mask_checks import count_regions, count_steps
from data_pipeline.shards import write_shard
from data_pipeline.storage import LocalStorage
from data_pipeline.survey import SplitSurvey, choose, survey
from data_pipeline.survey_page import contact_sheet, make_tile, write_page
from data_pipeline.survey_warnings import find_warnings

Mask = NDArray[np.uint8]
CLASSES = ("background", "cat", "dog")


def disc(label: int, size: int = 64, around: int = 0) -> Mask:
    """A mask with a disc of `label` in its middle."""
    mask = np.full((size, size), around, np.uint8)
    return cv2.circle(mask, (size // 2, size // 2), size // 4, label, -1)


def noise(seed: int, shape: tuple[int, ...] = (64, 64)) -> NDArray[np.uint8]:
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (*shape, 3), np.uint8)


@dataclass
class Builder:
    """Writes splits of data sets from images and labels, in memory elsewhere."""

    root: Path
    classes: tuple[str, ...] = CLASSES
    task: str = "segmentation"
    extras: dict[str, Any] = field(default_factory=dict)

    def __call__(self, split: str, labels: Sequence[Any], images: Sequence[Any] = ()) -> Dataset:
        directory = self.root / split
        directory.mkdir(parents=True)
        shard, table = write_shard(
            LocalStorage(directory),
            "shard-000000.tar",
            [self.sample(split, i, label, images) for i, label in enumerate(labels)],
        )
        manifest = Manifest(
            dataset="made",
            split=split,
            task=self.task,
            class_names=self.classes,
            ignore_label=255 if self.task == "segmentation" else None,
            shards=(shard,),
            **self.extras,
        )
        write_manifest(directory, manifest, [table])
        return Dataset(read_manifest(directory))

    def sample(self, split: str, index: int, label: Any, images: Sequence[Any]) -> Sample:
        shape = label.shape if isinstance(label, np.ndarray) else (64, 64)
        # Different in every split, whose images are otherwise the same.
        image = images[index] if images else noise(index + 1000 * len(split), shape)
        if isinstance(image, np.ndarray):
            image = simplejpeg.encode_jpeg(np.ascontiguousarray(image))
        if isinstance(label, np.ndarray):
            label = cv2.imencode(".png", label)[1].tobytes()
        return Sample(
            key=f"{split}{index}",
            image=image,
            image_extension="jpg",
            label=label,
            label_extension="seg.png",
            width=shape[1],
            height=shape[0],
            labels=(),
        )


@pytest.fixture
def build(tmp_path: Path) -> Builder:
    return Builder(tmp_path / "made")


def look(dataset: Dataset, limit: int | None = None) -> SplitSurvey:
    return survey(dataset, choose(dataset.num_samples, limit), threads=2)


def warnings_of(*datasets: Dataset) -> list[str]:
    return find_warnings([look(dataset) for dataset in datasets])


GOOD = [disc(1), disc(2), disc(1), disc(2)]


def test_good_data_have_no_warnings(build: Builder) -> None:
    assert warnings_of(build("train", GOOD), build("val", GOOD)) == []


def test_counts(build: Builder) -> None:
    two = np.zeros((40, 60), np.uint8)
    two[5:10, 5:10] = two[20:30, 20:30] = 2
    two[:, -1] = 255
    found = look(build("train", [two, np.ones((30, 20), np.uint8)]))
    classes = {row["name"]: row for row in found.classes()}
    assert [row["images"] for row in classes.values()] == [1, 1, 1]
    assert [row["pixels"] for row in classes.values()] == [2400 - 125 - 40, 600, 125]
    assert [row["regions"] for row in classes.values()] == [1, 1, 2]
    assert classes["dog"]["pixel_share"] == pytest.approx(125 / 2960)
    assert found.ignored_share == pytest.approx(40 / 3000)
    sizes = found.size_quantiles()
    assert sizes["largest"] == {"height": 40, "width": 60}
    assert (sizes["height"]["0%"], sizes["width"]["100%"]) == (30, 60)
    assert found.as_dict()["looked_at"] == 2


def test_a_limit_takes_a_fixed_choice(build: Builder) -> None:
    dataset = build("train", GOOD)
    assert look(dataset, 2).looked_at == 2
    assert choose(100, 7) == choose(100, 7) == sorted(set(choose(100, 7)))
    assert choose(100, 7) != choose(100, 7, seed=1)
    assert choose(3, 7) == [0, 1, 2]


def test_a_class_that_is_never_there(build: Builder) -> None:
    assert warnings_of(build("train", [disc(1)] * 2)) == [
        "train: classes never present: 1 (dog); add samples, or take them out of the class list"
    ]


def test_a_class_of_val_that_train_lacks(build: Builder) -> None:
    lines = warnings_of(build("train", [disc(1)] * 2), build("val", GOOD))
    assert any(
        line.startswith("val: classes that no training split has: 1 (dog)") for line in lines
    )


def test_ids_outside_the_classes(build: Builder) -> None:
    (line,) = warnings_of(build("train", [*GOOD, disc(7)]))
    assert line.startswith("train: 1 label ids outside the 3 classes: 7 (1 images)")


def test_ignored_masks(build: Builder) -> None:
    full = np.full((64, 64), 255, np.uint8)
    (line,) = warnings_of(build("train", [*GOOD, full]))
    assert line.startswith("train: masks with ignored pixels only: 1 (train4)")
    lines = warnings_of(build("other", [*GOOD, full, full, full, full, full, full]))
    assert any("60% of all pixels are ignored" in line for line in lines)


@pytest.mark.parametrize("names", [CLASSES, ("no", "yes")])
def test_inverted_masks(build: Builder, names: tuple[str, ...]) -> None:
    build.classes = names
    inverted = [disc(0, around=label) for label in range(1, len(names))]
    (line,) = warnings_of(build("train", inverted))
    assert line.startswith(f"train: masks look inverted: {names[0]!r} covers 19%")


def test_street_scenes_are_not_taken_for_inverted(build: Builder) -> None:
    build.classes = ("road", "sky", "car")
    scene = disc(0, around=1)
    scene[:4, :20] = 2
    assert warnings_of(build("train", [scene])) == []


@pytest.mark.parametrize("factor", [0.5, 0.77, 1.5, 2, 3.3])
@pytest.mark.parametrize("method", [cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA])
def test_interpolated_masks_are_told_from_others(factor: float, method: int) -> None:
    mask = disc(15, size=200)
    mask[150:, :90] = 9
    near = cv2.resize(mask, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    smooth = cv2.resize(mask, None, fx=factor, fy=factor, interpolation=method)
    assert not count_steps(mask).interpolated
    assert not count_steps(near).interpolated
    # INTER_AREA enlarges like the nearest pixel, when the factor is a whole number.
    assert count_steps(smooth).interpolated or np.array_equal(near, smooth)


def test_interpolated_masks_are_reported(build: Builder) -> None:
    build.classes = ("background", *"abcdefghijklmnop")
    smooth = cv2.resize(disc(15, 200), (131, 131), interpolation=cv2.INTER_LINEAR)
    lines = warnings_of(build("train", [smooth, disc(15)]))
    assert any("masks that look interpolated, or stored with loss: 1 (train0)" in x for x in lines)


def test_thin_objects_are_no_ramps() -> None:
    """A pole one pixel wide between ground and wall, and many discs: chance alone."""
    mask = np.zeros((100, 100), np.uint8)
    mask[:50] = 2
    mask[10:60, 30] = 1
    mask[10:60, 60] = 5
    assert not count_steps(mask).interpolated


def test_regions_touch_at_corners() -> None:
    mask = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 1, 1]], np.uint8)
    assert count_regions(mask, 1) == 2


def test_duplicates_inside_and_across_splits(build: Builder) -> None:
    one, two, three = noise(1), noise(2), noise(3)
    train = build("train", GOOD[:3], [one, two, one])
    val = build("val", GOOD[:2], [two, three])
    assert warnings_of(train, val) == [
        "train: images twice: 1 (train0 = train2); leave one of each out",
        "images both in train and in val: 1 (train1 = val0); do not train on one and evaluate on "
        "the other, or results will look too good",
    ]
    again = build("trainaug", GOOD[:2], [one, three])
    assert not any("both in train and in trainaug" in line for line in warnings_of(train, again))


def test_broken_samples(build: Builder) -> None:
    good = simplejpeg.encode_jpeg(noise(5))
    dataset = build("train", [*GOOD, disc(1), disc(1, 32)], [*map(noise, range(4)), b"no", good])
    found = look(dataset)
    assert list(found.errors) == ["train4", "train5"]
    assert "its mask 32 x 32" in found.errors["train5"]
    assert find_warnings([found])[0].startswith("train: broken samples: 2 (train4, train5); mend")
    path = Path(dataset.place) / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:3000])
    assert len(look(Dataset(read_manifest(dataset.place))).errors) == 6


def test_small_and_grey_images(build: Builder) -> None:
    grey = np.repeat(noise(0)[..., :1], 3, axis=2)
    tiny = np.array([[1]], np.uint8)
    lines = warnings_of(
        build("train", [disc(1), disc(2), tiny], [grey, 255 - grey, noise(1, (1, 1))])
    )
    assert [line.split(";")[0] for line in lines] == [
        "train: 1 images have a side under 8 pixels",
        "train: 2 of 3 images are grey",
    ]


def test_imbalance(build: Builder) -> None:
    rare = disc(1)
    rare[0, 0] = 2
    (line,) = warnings_of(build("train", [rare, disc(1)]))
    assert line.startswith("train: 'background' has 6,5")
    assert "times the pixels of 'dog'" in line


def test_classification_and_multilabel(build: Builder) -> None:
    build.task = "classification"
    assert warnings_of(build("train", [b"0", b"1", b"2"])) == []
    build.task = "multilabel"
    lines = warnings_of(build("trainmany", [b"[0, 1]", b"[]", b"[2]", b"[1, 8]"]))
    assert [line.split(";")[0] for line in lines] == [
        "trainmany: samples without a label: 1 (trainmany1)",
        "trainmany: 1 label ids outside the 3 classes: 8 (1 images)",
    ]


def test_a_split_without_labels(build: Builder) -> None:
    build.extras = {"has_labels": False}
    (line,) = warnings_of(build("test", [b"", b""]))
    assert line.startswith("test: has no labels")


def test_tiles_and_sheet(build: Builder, tmp_path: Path) -> None:
    white = np.full((64, 64, 3), 255, np.uint8)
    border = disc(1)
    border[:, :20] = 255
    dataset = build("train", [border, disc(1), disc(9)], [white * 0, b"no", white])
    tiles = [make_tile(dataset, index) for index in range(3)]
    assert tiles[0].text == "background, cat"
    assert tiles[2].text == "background, id 9?"
    assert tiles[1].text.startswith("broken: train1")
    middle, corner = tiles[0].picture[90, 90], tiles[0].picture[0, -1]
    assert middle[0] > 40 > middle[1]  # cat: (64, 0, 0) in VOC is class 8, (128, 0, 0) class 1
    assert (corner < 10).all()
    assert (tiles[0].picture[5, 5] > 120).all()
    sheet = cv2.imdecode(np.frombuffer(contact_sheet(tiles), np.uint8), cv2.IMREAD_COLOR)
    assert sheet.shape[1] > 3 * 240
    found = look(dataset)
    write_page(tmp_path / "x.html", "a <b>", [found], [tiles], find_warnings([found]))
    page = (tmp_path / "x.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert "a &lt;b&gt;" in page
    assert "http" not in page
    assert "<script" not in page


@pytest.mark.data
@pytest.mark.skipif("ATROUS_TEST_DATA" not in os.environ, reason="ATROUS_TEST_DATA is not set")
@pytest.mark.parametrize("factor", [0.5, 1.7])
def test_real_masks_before_and_after_interpolation(factor: float) -> None:
    folder = Path(os.environ["ATROUS_TEST_DATA"]) / "VOCdevkit/VOC2012/SegmentationClass"
    paths = sorted(folder.glob("*.png"))[::40]

    def interpolated(change: Callable[[Mask], Mask]) -> float:
        masks = [np.array(Image.open(path)) for path in paths]
        return float(np.mean([count_steps(change(mask)).interpolated for mask in masks]))

    def resize(method: int) -> Callable[[Mask], Mask]:
        return lambda mask: cv2.resize(mask, None, fx=factor, fy=factor, interpolation=method)

    assert interpolated(lambda mask: mask) == 0
    assert interpolated(resize(cv2.INTER_NEAREST)) == 0
    assert interpolated(resize(cv2.INTER_LINEAR)) == 1
