"""Counts what a prepared data set holds: classes, sizes, ids, duplicates, damages."""

import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset import Dataset, RawSample
from data_pipeline.decode import Pixels, decode_class, decode_image, decode_labels, decode_mask
from data_pipeline.errors import DataError, StorageUnavailable
from data_pipeline.in_order import InOrder
from data_pipeline.manifest import Manifest
from data_pipeline.mask_checks import count_frame, count_regions, count_steps

_IDS = 256  # of a mask
_QUANTILES = (0, 5, 25, 50, 75, 95, 100)  # percent


@dataclass(frozen=True, kw_only=True)
class SampleFacts:
    """What one sample holds; `error` when it cannot be read or decoded."""

    key: str
    error: str | None = None
    digest: bytes = b""  # of the image's bytes
    size: tuple[int, int] = (0, 0)  # height, width in pixels
    grey: bool = False
    labels: tuple[int, ...] | None = None  # ids present, with the ignore label; None: no label
    pixels: NDArray[np.int64] | None = None  # of each id, masks only, as the next two
    frame: NDArray[np.int64] | None = None
    regions: Mapping[int, int] = field(default_factory=dict)
    interpolated: bool = False


class SplitSurvey:
    """The sums over the samples of one split."""

    def __init__(self, manifest: Manifest) -> None:
        num_ids = max(_IDS, len(manifest.class_names))
        self.manifest = manifest
        self.name = manifest.split
        self.looked_at = 0
        self.errors: dict[str, str] = {}  # key -> what is wrong
        self.pixels = np.zeros(num_ids, np.int64)
        self.frame = np.zeros(num_ids, np.int64)
        self.images = np.zeros(num_ids, np.int64)  # that hold the class
        self.regions = np.zeros(num_ids, np.int64)
        self.unknown: Counter[int] = Counter()  # id outside the classes -> images
        self.sizes: list[tuple[int, int]] = []
        self.grey = 0
        self.unlabelled: list[str] = []
        self.all_ignored: list[str] = []
        self.interpolated: list[str] = []
        self.duplicates: list[tuple[str, str]] = []
        self.keys: dict[bytes, str] = {}  # digest -> key of the first image with it

    @property
    def num_classes(self) -> int:
        """Classes of the manifest."""
        return len(self.manifest.class_names)

    @property
    def has_masks(self) -> bool:
        """Whether its labels are masks."""
        return self.manifest.task == "segmentation"

    @property
    def ignored_share(self) -> float:
        """Share of the pixels that have the ignore label; 0 without masks."""
        ignore, total = self.manifest.ignore_label, int(self.pixels.sum())
        return float(self.pixels[ignore] / total) if ignore is not None and total else 0.0

    def share(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Shares of the classes (K,) among `counts` of ids, others left out."""
        known = counts[: self.num_classes].astype(np.float64)
        return known / max(1.0, known.sum())

    def add(self, facts: SampleFacts) -> None:
        """Count one sample."""
        self.looked_at += 1
        if facts.error:
            self.errors[facts.key] = facts.error
            return
        self.sizes.append(facts.size)
        self.grey += facts.grey
        if first := self.keys.get(facts.digest):
            self.duplicates.append((first, facts.key))
        else:
            self.keys[facts.digest] = facts.key
        self._add_labels(facts)

    def _add_labels(self, facts: SampleFacts) -> None:
        ignore = self.manifest.ignore_label
        labels = [] if facts.labels is None else [i for i in facts.labels if i != ignore]
        known = [label for label in labels if label < self.num_classes]
        self.images[known] += 1
        self.unknown.update(label for label in labels if label >= self.num_classes)
        if facts.labels is None or (not labels and facts.pixels is None):
            self.unlabelled.append(facts.key)
        elif not labels:
            self.all_ignored.append(facts.key)
        if facts.pixels is not None and facts.frame is not None:
            self.pixels[:_IDS] += facts.pixels
            self.frame[:_IDS] += facts.frame
        for label, count in facts.regions.items():
            self.regions[label] += count
        if facts.interpolated:
            self.interpolated.append(facts.key)

    def classes(self) -> list[dict[str, Any]]:
        """A row for each class: images that hold it, and for masks its pixels and regions."""
        pixel_share, images = self.share(self.pixels), max(1, len(self.sizes))
        rows = []
        for label, name in enumerate(self.manifest.class_names):
            count = int(self.images[label])
            row = {"id": label, "name": name, "images": count, "image_share": count / images}
            if self.has_masks:
                row |= {
                    "pixels": int(self.pixels[label]),
                    "pixel_share": float(pixel_share[label]),
                    "regions": int(self.regions[label]),
                }
            rows.append(row)
        return rows

    def size_quantiles(self) -> dict[str, dict[str, int]]:
        """Quantiles of height and width in pixels, and the image of most pixels."""
        if not self.sizes:
            return {}
        sides = np.array(self.sizes)
        result = {
            name: {
                f"{percent}%": int(value)
                for percent, value in zip(
                    _QUANTILES,
                    np.percentile(sides[:, axis], _QUANTILES, method="nearest"),
                    strict=True,
                )
            }
            for axis, name in enumerate(("height", "width"))
        }
        height, width = max(self.sizes, key=lambda size: size[0] * size[1])
        return result | {"largest": {"height": height, "width": width}}

    def as_dict(self) -> dict[str, Any]:
        """Everything counted, for JSON."""
        return {
            "split": self.name,
            "task": self.manifest.task,
            "samples": self.manifest.num_samples,
            "looked_at": self.looked_at,
            "classes": self.classes(),
            "sizes": self.size_quantiles(),
            "ignored_share": self.ignored_share,
            "grey_images": self.grey,
            "unknown_ids": {str(label): count for label, count in sorted(self.unknown.items())},
            "unlabelled": self.unlabelled,
            "all_ignored": self.all_ignored,
            "interpolated": self.interpolated,
            "duplicates": self.duplicates,
            "errors": self.errors,
        }


def survey(
    dataset: Dataset,
    indices: Sequence[int],
    threads: int | None = None,
    advance: Callable[[], object] | None = None,
) -> SplitSurvey:
    """Look at the samples `indices` of a split on threads; few of them are in memory at a time.

    `advance` is called after each.

    Raises:
        StorageUnavailable: the store cannot be reached.
    """
    result, threads = SplitSurvey(dataset.manifest), threads or os.cpu_count() or 1
    groups: Any = ((None, [partial(_look_at, dataset, index)]) for index in indices)
    for _, (facts,) in InOrder(groups, threads, ahead=2 * threads):
        result.add(facts)
        if advance:
            advance()
    return result


def choose(num_samples: int, limit: int | None, seed: int = 0) -> list[int]:
    """All samples of a split, or `limit` of them drawn by the seed, ascending."""
    if limit is None or limit >= num_samples:
        return list(range(num_samples))
    return sorted(random.Random(seed).sample(range(num_samples), limit))


def shared_images(one: SplitSurvey, other: SplitSurvey) -> list[tuple[str, str]]:
    """Keys, in both splits, of images that are the same to the byte."""
    return [(key, other.keys[digest]) for digest, key in one.keys.items() if digest in other.keys]


def _look_at(dataset: Dataset, index: int) -> SampleFacts:
    raw = None
    try:
        raw = dataset.read(*dataset.locate(index))
        image = decode_image(raw.image, raw.key)
        return _facts(raw, image, dataset.manifest)
    except StorageUnavailable:
        raise
    except DataError as error:
        return SampleFacts(key=raw.key if raw else f"sample {index}", error=str(error))


def _facts(raw: RawSample, image: Pixels, manifest: Manifest) -> SampleFacts:
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    common: dict[str, Any] = {
        "key": raw.key,
        "digest": hashlib.sha256(raw.image).digest()[:16],
        "size": image.shape[:2],
        "grey": bool((red == green).all() and (green == blue).all()),
    }
    if not raw.label:
        return SampleFacts(**common)
    if manifest.task == "classification":
        return SampleFacts(**common, labels=(decode_class(raw.label, raw.key),))
    if manifest.task == "multilabel":
        labels = tuple(sorted(set(decode_labels(raw.label, raw.key))))
        return SampleFacts(**common, labels=labels)
    return SampleFacts(**common, **_mask_facts(raw, image.shape[:2], manifest))


def _mask_facts(raw: RawSample, size: tuple[int, ...], manifest: Manifest) -> dict[str, Any]:
    mask = decode_mask(raw.label, raw.key)
    if mask.shape != size:
        raise DataError(
            f"{raw.key}: the image is {size[1]} x {size[0]} pixels, its mask "
            f"{mask.shape[1]} x {mask.shape[0]}; mend it and prepare the data set again"
        )
    pixels = np.bincount(mask.ravel(), minlength=_IDS)
    labels = tuple(np.flatnonzero(pixels).tolist())
    known = [label for label in labels if label < len(manifest.class_names)]
    return {
        "labels": labels,
        "pixels": pixels,
        "frame": count_frame(mask),
        "regions": {label: count_regions(mask, label) for label in known},
        "interpolated": count_steps(mask).interpolated,
    }
