"""From a sample as stored to the image and label of a batch, or of an evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import Crop, TrainData, as_size
from data_pipeline.dataset import Dataset, RawSample
from data_pipeline.decode import (
    Pixels,
    decode_class,
    decode_image,
    decode_image_scaled,
    decode_labels,
    decode_mask,
)
from data_pipeline.errors import DataError
from data_pipeline.kept_pixels import KeptPixels
from data_pipeline.transforms import (
    Decode,
    SegmentationAugmentation,
    Size,
    augment_classification,
    augment_segmentation,
    center_crop,
)

Label = Pixels | NDArray[np.float32] | int

_AREA = (0.08, 1.0)
_SCALE = (0.5, 2.0)
_IGNORE_LABEL = 255


@dataclass(frozen=True)
class Buffers:
    """The memory of a batch, written in place by the threads."""

    images: Pixels  # (B, H, W, 3)
    labels: NDArray[Any]

    @classmethod
    def new(cls, task: str, batch: int, crop: Size, num_classes: int) -> "Buffers":
        """Uninitialized memory for `batch` samples of a task."""
        labels: NDArray[Any]
        if task == "segmentation":
            labels = np.empty((batch, *crop), np.uint8)
        elif task == "classification":
            labels = np.empty(batch, np.int64)
        else:
            labels = np.empty((batch, num_classes), np.float32)
        return cls(np.empty((batch, *crop, 3), np.uint8), labels)


Write = Callable[[RawSample, Random, Buffers, int], None]  # the last: a place in the batch


def training_writer(
    task: str,
    dataset: Dataset,
    data: TrainData,
    num_classes: int,
    mean_pixel: tuple[float, float, float],
    kept: KeptPixels | None = None,
) -> Write:
    """What augments a sample into a place of a training batch; `kept` is of a segmentation."""
    if task == "segmentation":
        return _pair_writer(dataset, data, num_classes, mean_pixel, kept)
    crop, area, flip = as_size(data.crop), data.area or _AREA, data.flip
    label = _label_decoder(task, num_classes)

    def write(raw: RawSample, rng: Random, buffers: Buffers, place: int) -> None:
        size, out = (raw.height, raw.width), buffers.images[place]
        augment_classification(_decoder(raw), size, rng, crop, area, flip, out)
        buffers.labels[place] = label(raw)

    return write


def evaluation_decoder(
    task: str, dataset: Dataset, num_classes: int, crop: Crop | None
) -> Callable[[RawSample], tuple[Pixels, Label]]:
    """What turns a sample into the image and label to evaluate.

    Raises:
        ValueError: there is no crop, and the task is not segmentation.
    """
    if task == "segmentation":
        return _pair_decoder(dataset, num_classes)
    if crop is None:
        raise ValueError(f"{task}: set crop in the evaluation data, e.g. 224")
    size = as_size(crop)
    label = _label_decoder(task, num_classes)
    return lambda raw: (center_crop(_decoder(raw), (raw.height, raw.width), size), label(raw))


def _pair_writer(
    dataset: Dataset,
    data: TrainData,
    num_classes: int,
    mean_pixel: tuple[float, float, float],
    kept: KeptPixels | None,
) -> Write:
    ignore = dataset.manifest.ignore_label
    masks = _mask_decoder(dataset, num_classes)
    how = SegmentationAugmentation(
        crop=as_size(data.crop),
        scale=data.scale or _SCALE,
        scale_step=data.scale_step,
        flip=data.flip,
        mean_pixel=mean_pixel,
        ignore_label=_IGNORE_LABEL if ignore is None else ignore,
    )

    def write(raw: RawSample, rng: Random, buffers: Buffers, place: int) -> None:
        mask = masks(raw)
        # Whole at any scale, as kept ones are: reducing has other pixels, and saves little.
        image = kept.image(raw) if kept else decode_image(raw.image, raw.key)
        augment_segmentation(image, mask, rng, how, (buffers.images[place], buffers.labels[place]))

    return write


def _decoder(raw: RawSample) -> Decode:
    return lambda height, width: decode_image_scaled(
        raw.image, raw.key, min_height=height, min_width=width
    )


def _pair_decoder(
    dataset: Dataset, num_classes: int
) -> Callable[[RawSample], tuple[Pixels, Pixels]]:
    decode = _mask_decoder(dataset, num_classes)
    return lambda raw: (decode_image(raw.image, raw.key), decode(raw))


def _mask_decoder(dataset: Dataset, num_classes: int) -> Callable[[RawSample], Pixels]:
    ignore_label = dataset.manifest.ignore_label
    unknown = [(num_classes, 255)]  # first and last of ids that are neither classes nor ignored
    if ignore_label is not None and ignore_label >= num_classes:
        unknown = [(num_classes, ignore_label - 1), (ignore_label + 1, 255)]

    def decode(raw: RawSample) -> Pixels:
        mask = decode_mask(raw.label, raw.key)
        if mask.shape != (raw.height, raw.width):
            raise DataError(
                f"{raw.key}: the image has {(raw.height, raw.width)} pixels, its mask "
                f"{mask.shape}; correct the pair and prepare the data set again"
            )
        for low, high in unknown:
            if low <= high and cv2.hasNonZero(cv2.inRange(mask, low, high)):
                ids = np.unique(mask)
                raise DataError(
                    f"{raw.key}: the mask has ids {ids[(low <= ids) & (ids <= high)][:9].tolist()} "
                    f"in a data set of {num_classes} classes; correct it and prepare the data set "
                    "again"
                )
        return mask

    return decode


def _label_decoder(task: str, num_classes: int) -> Callable[[RawSample], Label]:
    def checked(labels: list[int], key: str) -> list[int]:
        if any(label >= num_classes for label in labels):
            raise DataError(f"{key}: class {max(labels)} in a data set of {num_classes} classes")
        return labels

    def one(raw: RawSample) -> int:
        return checked([decode_class(raw.label, raw.key)], raw.key)[0]

    def several(raw: RawSample) -> NDArray[np.float32]:
        target = np.zeros(num_classes, np.float32)
        target[checked(decode_labels(raw.label, raw.key), raw.key)] = 1
        return target

    if task not in ("classification", "multilabel"):
        raise ValueError(f"task {task!r}: know classification, multilabel and segmentation")
    return one if task == "classification" else several
