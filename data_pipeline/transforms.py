"""What happens to a sample on its way into a batch: pure functions of arrays and a random source.

The random source is `random.Random`, of which only `random()` is used: Python promises that stream
for all releases, which numpy's Generator does not.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import cv2
import numpy as np

from data_pipeline.decode import Pixels

Size = tuple[int, int]  # height, width in pixels

# Decodes the image at hand to `(H, W, 3)`, of at least the given height and width if it has them.
Decode = Callable[[int, int], Pixels]

_ASPECT_RATIOS = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True)
class SegmentationAugmentation:
    """How training images and masks are changed (the reference's input_preprocess.py).

    The scale is one of lo, lo + step, ..., hi with equal chances; step 0: any from lo to hi.
    """

    crop: Size
    scale: tuple[float, float] = (0.5, 2.0)
    scale_step: float = 0.25
    flip: bool = True
    mean_pixel: tuple[float, float, float] = (
        127.5,
        127.5,
        127.5,
    )  # RGB; rounded, as images are uint8
    ignore_label: int = 255


def augment_segmentation(
    image: Pixels,
    mask: Pixels,
    rng: Random,
    how: SegmentationAugmentation,
    into: tuple[Pixels, Pixels] | None = None,
) -> tuple[Pixels, Pixels]:
    """Random scale, padding at the bottom and right, random crop, random flip, in that order.

    Takes RGB `(H, W, 3)` and its mask `(H, W)`, gives `(*crop, 3)` and `crop`, in the memory of
    `into` where that is given. The image is resized bilinearly, the mask to the nearest
    pixel; only the crop window is computed, of whole pixels of the source, so that it lies within
    a pixel of where the reference has it (docs/decisions/0015).
    """
    scale = _draw_scale(rng, how)
    scaled = [max(1, int(side * scale)) for side in mask.shape]
    starts = [_draw_index(rng, max(0, s - c) + 1) for s, c in zip(scaled, how.crop, strict=True)]
    shown = Window(*starts, *map(min, scaled, how.crop))
    flip = how.flip and rng.random() < 0.5
    window, labels = into or (np.empty((*how.crop, 3), np.uint8), np.empty(how.crop, np.uint8))
    left = how.crop[1] - shown.width if flip else 0
    part = slice(shown.height), slice(left, left + shown.width)
    source = _spans(scaled, shown, mask)
    for pixels, out, interpolation in (
        (image[source], window[part], cv2.INTER_LINEAR),
        (mask[source], labels[part], cv2.INTER_NEAREST_EXACT),
    ):
        cv2.resize(pixels, (shown.width, shown.height), dst=out, interpolation=interpolation)
        if flip:
            cv2.flip(out, 1, dst=out)
    if (shown.height, shown.width) != how.crop:
        _fill_around(window, part, how.mean_pixel)
        _fill_around(labels, part, (how.ignore_label,))
    return window, labels


@dataclass(frozen=True)
class Window:
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def augment_classification(
    decode: Decode,
    size: Size,
    rng: Random,
    crop: Size,
    area: tuple[float, float],
    flip: bool,
    out: Pixels | None = None,
) -> Pixels:
    """Random window of the image of `size`, resized to `crop`, then a random flip; into `out`.

    The crop of the Inception network (Szegedy et al. 2015, section 6), aspect ratios 3/4 to 4/3.
    """
    window = random_window(size, rng, area)
    if flip and rng.random() < 0.5:
        return cv2.flip(resize_window(decode, size, window, crop), 1, dst=out)
    return resize_window(decode, size, window, crop, out)


def center_crop(decode: Decode, size: Size, crop: Size, fraction: float = 0.875) -> Pixels:
    """The central part of the image of `size`, resized to `crop` without distorting it.

    The part is `fraction` of the largest centred window of the crop's shape: the same pixels as the
    usual "resize the shorter side to crop / fraction, then cut out the centre".
    """
    (height, width), (crop_height, crop_width) = size, crop
    factor = fraction * min(height / crop_height, width / crop_width)
    rows, columns = max(1, round(crop_height * factor)), max(1, round(crop_width * factor))
    window = Window((height - rows) // 2, (width - columns) // 2, rows, columns)
    return resize_window(decode, size, window, crop)


def random_window(size: Size, rng: Random, area: tuple[float, float]) -> Window:
    """A window with a share of the image's area from `area` and an aspect ratio from 3/4 to 4/3.

    The share is drawn evenly, the ratio evenly in its logarithm. When ten draws do not fit into the
    image: the largest centred window whose ratio is allowed.
    """
    height, width = size
    low, high = map(math.log, _ASPECT_RATIOS)
    for _ in range(_CROP_ATTEMPTS):
        pixels = height * width * (area[0] + (area[1] - area[0]) * rng.random())
        ratio = math.exp(low + (high - low) * rng.random())
        rows, columns = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            top = _draw_index(rng, height - rows + 1)
            return Window(top, _draw_index(rng, width - columns + 1), rows, columns)
    rows = min(height, max(1, round(width / _ASPECT_RATIOS[0])))
    columns = min(width, max(1, round(height * _ASPECT_RATIOS[1])))
    return Window((height - rows) // 2, (width - columns) // 2, rows, columns)


def resize_window(
    decode: Decode, size: Size, window: Window, crop: Size, out: Pixels | None = None
) -> Pixels:
    """Cut `window` out of the image of `size` and resize it to `crop`, into `out`.

    The image is decoded no larger than the crop needs. Shrinking averages over areas, which leaves
    no aliasing at any factor; enlarging, where averaging would repeat pixels, is bilinear, and so
    is shrinking by less than a fifth, which JPEG decoders mostly leave, in a sixth of the time.
    """
    image = decode(
        min(size[0], math.ceil(size[0] * crop[0] / window.height)),
        min(size[1], math.ceil(size[1] * crop[1] / window.width)),
    )
    part = image[_spans(size, window, image)]
    shrinks = part.shape[0] >= 1.2 * crop[0] and part.shape[1] >= 1.2 * crop[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(part, (crop[1], crop[0]), dst=out, interpolation=method)


def _spans(size: Sequence[int], window: Window, image: Pixels) -> tuple[slice, slice]:
    """The rows and columns of the image that show `window` of an image of `size`."""
    return (
        _scaled_span(window.top, window.height, size[0], image.shape[0]),
        _scaled_span(window.left, window.width, size[1], image.shape[1]),
    )


def _scaled_span(start: int, length: int, full: int, decoded: int) -> slice:
    """The part of a side of `decoded` pixels that shows `start`, `length` of `full` pixels."""
    first = min(round(start * decoded / full), decoded - 1)
    return slice(first, max(first + 1, round((start + length) * decoded / full)))


def _draw_index(rng: Random, count: int) -> int:
    """An integer of range(count), evenly."""
    return int(rng.random() * count)


def _draw_scale(rng: Random, how: SegmentationAugmentation) -> float:
    low, high = how.scale
    if how.scale_step == 0:
        return low + (high - low) * rng.random()
    # The margin keeps the last value when (high - low) / step comes out a hair below an integer.
    return low + how.scale_step * _draw_index(rng, int((high - low) / how.scale_step + 1e-6) + 1)


def _fill_around(array: Pixels, part: tuple[slice, slice], value: tuple[float, ...]) -> None:
    """Fill what is below and beside `part`, which reaches to the upper edge."""
    line = np.empty(array.shape[1:], np.uint8)
    line[:] = [round(channel) for channel in value] if array.ndim == 3 else round(value[0])
    rows, columns = part
    array[rows.stop :] = line
    array[rows, : columns.start] = line[: columns.start]
    array[rows, columns.stop :] = line[columns.stop :]
