"""Writes small synthetic data sets in the five layouts that `prepare` reads.

All show the same kinds of objects (see `scene`), so training on one helps with the next. A picture
depends on (seed, layout, split, index) alone. What each layout has besides:
- imagenet: one object near the middle of each picture;
- multilabel: one to four objects; in train, labels are lost and made up at the given rates;
- coco: instances of all sizes, some pictures with small ones only, crowds, classes that VOC lacks;
- voc: masks with a 255 border; only trainaug has the `extra` pictures, their masks have no border;
- cityscapes: street scenes with fine masks, and coarse ones that leave the borders unlabeled.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.formats.sample import IGNORE_LABEL, VOC_CLASSES
from data_pipeline.formats.scene import (
    KINDS,
    Mask,
    Picture,
    Placed,
    blob,
    draw,
    paint,
    place,
    place_at_random,
)
from data_pipeline.formats.street import coarsen, draw_street
from data_pipeline.palette import voc_palette

COUNTS: Mapping[str, int] = {
    "imagenet/train": 960, "imagenet/val": 160,
    "multilabel/train": 960, "multilabel/val": 160,
    "coco/train": 480, "coco/val": 80,
    "voc/train": 160, "voc/val": 80, "voc/extra": 320,
    "cityscapes/train": 160, "cityscapes/val": 60, "cityscapes/train_extra": 160,
}  # fmt: skip
_MARKER = "synthetic.json"
_VERSION = 1  # raise it when the same parameters give other pictures
_ROW_GROUP = 256
_DRAWN_AT = 1514764800  # 2018-01-01, as files are dated

# COCO's own names and ids; the last two are no classes of VOC.
_COCO_IDS = {
    "person": 1, "bicycle": 2, "car": 3, "airplane": 5, "bus": 6, "boat": 9, "bird": 16,
    "bottle": 44, "frisbee": 34, "kite": 38,
}  # fmt: skip
_COCO_NAMES = {"aeroplane": "airplane"}
_COCO_STRANGERS = ("frisbee", "kite")


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The parameters of a synthesis, all that its pictures depend on."""

    seed: int
    size: int
    counts: dict[str, int]
    drop_rate: float
    wrong_rate: float
    version: int = _VERSION

    def pictures(self, layout: str, split: str) -> Iterator[tuple[int, np.random.Generator]]:
        """The index and the random source of each picture of a split."""
        stream = zlib.crc32(f"{layout}/{split}".encode())
        for index in range(self.counts[f"{layout}/{split}"]):
            yield index, np.random.default_rng([self.seed, stream, index])


def synthesize(
    destination: Path,
    *,
    seed: int = 0,
    layouts: Sequence[str] | None = None,
    counts: Mapping[str, int] | None = None,
    size: int = 128,
    drop_rate: float = 0.1,
    wrong_rate: float = 0.05,
) -> dict[str, Path]:
    """Write the raw data sets and return the source folder of each; written before, they are kept.

    Args:
        destination: gets one folder per layout.
        seed: other seeds give other pictures.
        layouts: which of `LAYOUTS` to write; None: all.
        counts: pictures of a split, for those that shall differ from `COUNTS`.
        size: height of a picture in pixels, about; street scenes are twice as wide as high.
        drop_rate: share of the true labels missing in multilabel/train.
        wrong_rate: share of the pictures of multilabel/train with one label too many.

    Raises:
        DataError: an unknown layout or split, or a folder to write that is not ours to replace.
    """
    chosen = tuple(layouts) if layouts is not None else tuple(LAYOUTS)
    unknown = (set(chosen) - LAYOUTS.keys()) | (set(counts or ()) - COUNTS.keys())
    if unknown:
        raise DataError(
            f"{', '.join(sorted(unknown))}: unknown; layouts: {', '.join(LAYOUTS)}; "
            f"counts: {', '.join(COUNTS)}"
        )
    wanted = {
        key: value
        for key, value in {**COUNTS, **(counts or {})}.items()
        if key.split("/")[0] in chosen
    }
    job = _Job(seed=seed, size=size, counts=wanted, drop_rate=drop_rate, wrong_rate=wrong_rate)
    for layout in chosen:
        folder = destination / layout
        parameters = {**asdict(job), "counts": _counts_of(job, layout)}
        if not _is_finished(folder, parameters):
            LAYOUTS[layout](folder, job)
            (folder / _MARKER).write_text(json.dumps({**parameters, "finished": True}))
        _date(folder)
    return {layout: destination / layout for layout in chosen}


def _date(folder: Path) -> None:
    """Give all files one time: what was prepared from them is known again after a copy."""
    for file in folder.rglob("*"):
        os.utime(file, (_DRAWN_AT, _DRAWN_AT))


def _counts_of(job: _Job, layout: str) -> dict[str, int]:
    return {key: value for key, value in job.counts.items() if key.startswith(f"{layout}/")}


def _is_finished(folder: Path, parameters: dict[str, Any]) -> bool:
    """Whether the layout is there; if not, make an empty folder for it, marked as unfinished."""
    marker = folder / _MARKER
    if marker.exists():
        found = json.loads(marker.read_text())
        if found == {**parameters, "finished": True}:
            return True
        if found.get("finished"):
            raise DataError(f"{folder}: synthesized before with other parameters; delete it first")
        shutil.rmtree(folder)  # a synthesis that was cut short
    elif folder.exists():
        raise DataError(f"{folder}: exists and was not synthesized; choose another destination")
    folder.mkdir(parents=True)
    marker.write_text(json.dumps({**parameters, "finished": False}))
    return False


def _write_imagenet(folder: Path, job: _Job) -> None:
    for split in ("train", "val"):
        for kind in KINDS:
            (folder / split / kind).mkdir(parents=True)
        for index, rng in job.pictures("imagenet", split):
            kind = KINDS[index % len(KINDS)]
            center = rng.uniform(0.42, 0.58, 2) * job.size
            radius = rng.uniform(0.3, 0.45) * job.size
            size = (job.size, job.size)
            picture = draw(rng, size, [place(rng, kind, (center[0], center[1]), radius, size)])
            (folder / split / kind / f"{kind}_{index:06d}.JPEG").write_bytes(_jpeg(picture))


def _write_multilabel(folder: Path, job: _Job) -> None:
    (folder / "classes.txt").write_text("".join(f"{kind}\n" for kind in KINDS))
    schema = pa.schema([("image", pa.binary()), ("labels", pa.list_(pa.string()))])
    for split in ("train", "val"):
        rows = [
            _multilabel_row(rng, job, noisy=split == "train")
            for _, rng in job.pictures("multilabel", split)
        ]
        table = pa.Table.from_pylist(rows, schema=schema)
        pq.write_table(table, folder / f"{split}.parquet", row_group_size=_ROW_GROUP)


def _multilabel_row(rng: np.random.Generator, job: _Job, *, noisy: bool) -> dict[str, Any]:
    size = (job.size, job.size)
    radii = (rng.uniform(0.15, 0.3, int(rng.integers(1, 5))) * job.size).tolist()
    objects = place_at_random(rng, radii, size)
    picture = draw(rng, size, objects)
    labels = sorted({entry.kind for entry in objects})
    if noisy:
        absent = [kind for kind in KINDS if kind not in labels]
        labels = [kind for kind in labels if rng.random() >= job.drop_rate]
        if rng.random() < job.wrong_rate:
            labels = sorted([*labels, str(rng.choice(absent))])
    return {"image": _jpeg(picture), "labels": labels}


def _write_coco(folder: Path, job: _Job) -> None:
    (folder / "annotations").mkdir()
    for split in ("train", "val"):
        (folder / f"{split}2017").mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index, rng in job.pictures("coco", split):
            height, width = _landscape_or_portrait(rng, job.size)
            picture, found = _coco_picture(rng, height, width)
            name = f"{index + 1:012d}.jpg"
            (folder / f"{split}2017" / name).write_bytes(_jpeg(picture))
            images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
            for entry in found:
                numbers = {"id": len(annotations) + 1, "image_id": index + 1}
                annotations.append(numbers | entry)
        content = {
            "info": {"description": "synthetic"},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for name, number in _COCO_IDS.items()],
        }
        path = folder / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(content))


def _coco_picture(
    rng: np.random.Generator, height: int, width: int
) -> tuple[Picture, list[dict[str, Any]]]:
    """A picture and its annotations, from the back to the front: strangers, a crowd, instances."""
    picture = draw(rng, (height, width), ())
    annotations = []
    if rng.random() < 0.3:
        center = rng.uniform((0, 0), (width, height))
        outline = np.clip(blob(rng, center, 0.2 * height), 0, (width - 1, height - 1)).astype(
            np.int32
        )
        cv2.fillPoly(picture, [outline], [int(level) for level in rng.integers(0, 256, 3)])
        stranger = Placed(kind=str(rng.choice(_COCO_STRANGERS)), polygons=(outline,), radius=0)
        annotations.append(_coco_instance(stranger, height, width))
    if rng.random() < 0.2:
        crowd = place_at_random(rng, [0.1 * height] * 5, (height, width), ("person",))
        mask = np.zeros((height, width), np.uint8)
        for entry in crowd:
            paint(rng, picture, entry)
            mask |= entry.mask(height, width)
        annotations.append(_coco_crowd(mask))
    small_only = rng.random() < 0.15
    low, high = (0.06, 0.1) if small_only else (0.12, 0.4)
    radii = (rng.uniform(low, high, int(rng.integers(1, 5))) * height).tolist()
    for entry in place_at_random(rng, radii, (height, width)):
        paint(rng, picture, entry)
        annotations.append(_coco_instance(entry, height, width))
    return picture, annotations


def _coco_instance(placed: Placed, height: int, width: int) -> dict[str, Any]:
    mask = placed.mask(height, width)
    return {
        "category_id": _COCO_IDS[_COCO_NAMES.get(placed.kind, placed.kind)],
        "iscrowd": 0,
        "area": int(mask.sum()),
        "bbox": list(cv2.boundingRect(mask)),
        "segmentation": [polygon.ravel().tolist() for polygon in placed.polygons],
    }


def _coco_crowd(mask: Mask) -> dict[str, Any]:
    """An uncompressed run-length code: runs of 0 and 1 by turns, down the columns, 0 first."""
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat, prepend=0, append=flat[-1] ^ 1))
    return {
        "category_id": _COCO_IDS["person"],
        "iscrowd": 1,
        "area": int(mask.sum()),
        "bbox": list(cv2.boundingRect(mask)),
        "segmentation": {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()},
    }


def _write_voc(folder: Path, job: _Job) -> None:
    root = folder / "VOCdevkit" / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    for name in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        (root / name).mkdir(parents=True)
    lists.mkdir(parents=True)
    names: dict[str, list[str]] = {}
    for split in ("train", "val", "extra"):
        year = {"train": 2007, "val": 2008, "extra": 2011}[split]
        names[split] = []
        for index, rng in job.pictures("voc", split):
            name = f"{year}_{index:06d}"
            names[split].append(name)
            _write_voc_picture(rng, root, name, split, job.size)
    names["trainval"] = sorted(names["train"] + names["val"])
    names["trainaug"] = sorted(names["train"] + names.pop("extra"))
    for split, entries in names.items():
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in entries))


def _write_voc_picture(
    rng: np.random.Generator, root: Path, name: str, split: str, side: int
) -> None:
    size = _landscape_or_portrait(rng, side)
    radii = (rng.uniform(0.15, 0.4, int(rng.integers(1, 4))) * side).tolist()
    objects = place_at_random(rng, radii, size)
    (root / "JPEGImages" / f"{name}.jpg").write_bytes(_jpeg(draw(rng, size, objects)))
    plain, bordered = _voc_masks(objects, size)
    if split != "extra":
        _write_palette_png(root / "SegmentationClass" / f"{name}.png", bordered)
    if split != "val":
        _write_palette_png(
            root / "SegmentationClassAug" / f"{name}.png", plain if split == "extra" else bordered
        )


def _voc_masks(objects: Sequence[Placed], size: tuple[int, int]) -> tuple[Mask, Mask]:
    """Class ids without and with the ignored outline of each visible object."""
    plain = np.zeros(size, np.uint8)
    outline = np.zeros(size, np.uint8)
    kernel = np.ones((3, 3), np.uint8)
    for entry in objects:
        mask = entry.mask(*size)
        plain[mask > 0] = VOC_CLASSES.index(entry.kind)
        outline[mask > 0] = 0  # the outline of what is behind is hidden
        outline |= cv2.dilate(mask, kernel) - cv2.erode(mask, kernel)
    return plain, np.where(outline > 0, np.uint8(IGNORE_LABEL), plain)


def _write_palette_png(path: Path, mask: Mask) -> None:
    image = Image.fromarray(mask, mode="P")
    image.putpalette(voc_palette().tobytes())
    image.save(path)


def _write_cityscapes(folder: Path, job: _Job) -> None:
    for split in ("train", "val", "train_extra"):
        for index, rng in job.pictures("cityscapes", split):
            picture, ids = draw_street(rng, job.size, 2 * job.size)
            city = f"{split.replace('_', '')}town{index % 3}"
            name = f"{city}_{index:06d}_000019"
            _write_png(
                folder / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png",
                picture[..., ::-1],
            )
            if split != "train_extra":
                _write_png(folder / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", ids)
            coarse = coarsen(ids, max(1, job.size // 64))
            _write_png(folder / "gtCoarse" / split / city / f"{name}_gtCoarse_labelIds.png", coarse)


def _write_png(path: Path, pixels: Picture | Mask) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes())


def _landscape_or_portrait(rng: np.random.Generator, size: int) -> tuple[int, int]:
    """Height and width at 3:4 or 4:3, as most photographs are."""
    long, short = round(size * 1.25), round(size * 0.94)
    return (short, long) if rng.random() < 0.7 else (long, short)


def _jpeg(picture: Picture) -> bytes:
    data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=90)
    return data


LAYOUTS: Mapping[str, Callable[[Path, _Job], None]] = {
    "imagenet": _write_imagenet,
    "multilabel": _write_multilabel,
    "coco": _write_coco,
    "voc": _write_voc,
    "cityscapes": _write_cityscapes,
}
