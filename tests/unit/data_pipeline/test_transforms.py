"""Augmentation: the windows of the reference's, and what must hold of every one."""

from collections import Counter
from random import Random
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional

from data_pipeline.transforms import (
    SegmentationAugmentation,
    Window,
    augment_classification,
    augment_segmentation,
    center_crop,
    random_window,
    resize_window,
)

PIXELS = np.random.Generator(np.random.PCG64(0))
NOISE = PIXELS.integers(0, 256, (75, 101, 3), dtype=np.uint8)
IDS = PIXELS.integers(0, 21, (75, 101), dtype=np.uint8)


class Script(Random):
    """A random source that says what it is told, and records how often it was asked."""

    def __init__(self, *values: float) -> None:
        super().__init__(0)
        self.values = list(values)

    def random(self) -> float:
        return self.values.pop(0)


def whole(image: np.ndarray) -> Any:
    """A decoder that cannot decode at reduced size."""
    return lambda height, width: image


def reduced(image: np.ndarray) -> Any:
    """A decoder that halves an image whenever that is large enough, rounding up as JPEG does."""

    def decode(height: int, width: int) -> np.ndarray:
        half = ((image.shape[1] + 1) // 2, (image.shape[0] + 1) // 2)
        small = half[1] >= height and half[0] >= width
        return cv2.resize(image, half, interpolation=cv2.INTER_AREA) if small else image

    return decode


def script(scale: float, flip: bool) -> Script:
    """Draws of one of the reference's scales, and of a window seven tenths down and right."""
    return Script((scale - 0.5) / 0.25 / 7 + 0.01, 0.7, 0.7, 0.4 if flip else 0.6)


SCALES = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
CROPS = [(33, 33), (65, 97), (129, 65), (257, 257)]
ROWS, COLUMNS = np.meshgrid(np.arange(75), np.arange(101), indexing="ij")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("flip", [False, True])
def test_pixels_lie_within_one_of_where_the_reference_has_them(
    scale: float, crop: tuple[int, int], flip: bool
) -> None:
    """Seen by an image that holds twice the number of each row and column, and masks of both.

    The reference resizes the whole image with aligned corners and cuts the crop out.
    """
    image = 2 * np.stack([ROWS, COLUMNS, ROWS], axis=2).astype(np.uint8)
    how = SegmentationAugmentation(crop=crop)
    for axis, numbers in enumerate((ROWS, COLUMNS)):
        rng, mask = script(scale, flip), numbers.astype(np.uint8)
        window, labels = augment_segmentation(image, mask, rng, how)
        assert rng.values == []
        side, scaled = mask.shape[axis], int(mask.shape[axis] * scale)
        start = int(0.7 * (max(0, scaled - crop[axis]) + 1))
        length = min(scaled, crop[axis])
        expected = (start + np.arange(length)) * (side - 1) / (scaled - 1)
        inside = np.ix_((labels != 255).any(axis=1), (labels != 255).any(axis=0))
        lines = np.stack([window[..., axis][inside] / 2, labels[inside]])
        assert lines.shape[1 + axis] == length
        lines = np.moveaxis(lines, 1 + axis, -1)
        if flip and axis == 1:
            lines = lines[..., ::-1]
        error = np.abs(lines - expected)
        assert error[0].max() <= 1.0
        assert error[1].max() <= 1.5  # the nearest pixel is up to half a pixel away
        assert np.abs(lines[0] - lines[1]).max() <= 1.0
        assert abs((lines[1] - expected).mean()) < 0.8


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("flip", [False, True])
def test_an_image_that_is_seen_whole_is_resized(scale: float, flip: bool) -> None:
    size = (int(75 * scale), int(101 * scale))
    how = SegmentationAugmentation(crop=(150, 202))
    image, mask = augment_segmentation(NOISE, IDS, script(scale, flip), how)
    planes = torch.from_numpy(NOISE).permute(2, 0, 1)[None].double()
    expected = functional.interpolate(planes, size, mode="bilinear")[0].permute(1, 2, 0).numpy()
    ids = torch.from_numpy(IDS)[None, None]
    labels = functional.interpolate(ids, size, mode="nearest-exact")[0, 0].numpy()
    if flip:
        image, mask = image[:, ::-1], mask[:, ::-1]
    assert np.abs(image[: size[0], : size[1]] - expected).max() <= 1
    assert np.array_equal(mask[: size[0], : size[1]], labels)
    assert set(mask[size[0] :].ravel()) | set(mask[:, size[1] :].ravel()) <= {255}


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("flip", [False, True])
def test_at_scale_one_pixels_are_cut_out(crop: tuple[int, int], flip: bool) -> None:
    how = SegmentationAugmentation(crop=crop)
    image, mask = augment_segmentation(NOISE, IDS, script(1.0, flip), how)
    top, left = (int(0.7 * (max(0, s - c) + 1)) for s, c in zip((75, 101), crop, strict=True))
    height, width = (min(s, c) for s, c in zip((75, 101), crop, strict=True))
    if flip:
        image, mask = image[:, ::-1], mask[:, ::-1]
    part = slice(top, top + height), slice(left, left + width)
    assert np.array_equal(image[:height, :width], NOISE[part])
    assert np.array_equal(mask[:height, :width], IDS[part])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("crop", [(65, 97), (129, 150)])
def test_given_memory_changes_nothing(seed: int, crop: tuple[int, int]) -> None:
    how = SegmentationAugmentation(crop=crop, mean_pixel=(1, 2, 3), ignore_label=9)
    expected = augment_segmentation(NOISE, IDS, Random(seed), how)
    images, masks = np.empty((2, *crop, 3), np.uint8), np.empty((2, *crop), np.uint8)
    augment_segmentation(NOISE, IDS, Random(seed), how, (images[1], masks[1]))
    assert np.array_equal(images[1], expected[0])
    assert np.array_equal(masks[1], expected[1])


def test_scale_one_without_crop_or_flip_changes_nothing() -> None:
    how = SegmentationAugmentation(crop=(75, 101), scale=(1, 1), flip=False)
    image, mask = augment_segmentation(NOISE, IDS, Random(0), how)
    assert np.array_equal(image, NOISE)
    assert np.array_equal(mask, IDS)


def test_padding_is_at_the_bottom_and_right() -> None:
    how = SegmentationAugmentation(
        crop=(90, 120), scale=(1, 1), flip=False, mean_pixel=(1, 2, 3), ignore_label=9
    )
    image, mask = augment_segmentation(NOISE, IDS, Random(0), how)
    assert np.array_equal(image[:75, :101], NOISE)
    assert np.array_equal(mask[:75, :101], IDS)
    assert {tuple(p) for p in image[75:].reshape(-1, 3)} == {(1, 2, 3)}
    assert {tuple(p) for p in image[:, 101:].reshape(-1, 3)} == {(1, 2, 3)}
    assert set(mask[75:].ravel()) | set(mask[:, 101:].ravel()) == {9}


def test_image_and_mask_stay_together() -> None:
    """An image that is its own mask agrees with it wherever interpolation has nothing to mix."""
    ids = np.zeros((60, 80), np.uint8)
    ids[20:40, 30:60] = 200
    image = np.repeat(ids[..., None], 3, axis=2)
    how = SegmentationAugmentation(crop=(65, 65))
    for seed in range(50):
        window, mask = augment_segmentation(image, ids, Random(seed), how)
        inside = (mask != 255) & ((window[..., 0] == 0) | (window[..., 0] == 200))
        assert np.array_equal(window[..., 0][inside], mask[inside])
        assert inside.sum() > 0.8 * (mask != 255).sum()


def scales_drawn(scale: tuple[float, float], step: float, draws: int) -> Counter[int]:
    """How wide a 1000 pixel image becomes, seen by where its padding starts."""
    image, mask = np.zeros((2, 1000, 3), np.uint8), np.zeros((2, 1000), np.uint8)
    how = SegmentationAugmentation(crop=(4, 2001), scale=scale, scale_step=step, flip=False)
    results = (augment_segmentation(image, mask, Random(i), how)[1] for i in range(draws))
    return Counter(int((result[0] == 0).sum()) for result in results)


def test_each_scale_of_the_grid_is_equally_likely() -> None:
    counts = scales_drawn((0.5, 2.0), 0.25, 1400)
    assert sorted(counts) == [500, 750, 1000, 1250, 1500, 1750, 2000]
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 22.5  # chi-square, 99.9 %


def test_a_grid_that_rounds_badly_keeps_its_last_scale() -> None:
    assert (1.4 - 1.1) / 0.1 < 3
    assert sorted(scales_drawn((1.1, 1.4), 0.1, 60)) == [1100, 1200, 1300, 1400]


def test_step_zero_draws_from_the_whole_range() -> None:
    counts = scales_drawn((0.5, 2.0), 0, 200)
    assert len(counts) > 150
    assert min(counts) >= 500
    assert max(counts) <= 2000


def test_every_crop_position_is_reached_equally() -> None:
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = np.zeros((3, 4, 3), np.uint8)
    how = SegmentationAugmentation(crop=(2, 2), scale=(1, 1), flip=False)
    corners = Counter(
        int(augment_segmentation(image, ids, Random(i), how)[1][0, 0]) for i in range(600)
    )
    assert sorted(corners) == [0, 1, 2, 4, 5, 6]
    assert sum((n - 100) ** 2 / 100 for n in corners.values()) < 20.5  # chi-square, 99.9 %


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 2)])
def test_thin_images_pass(shape: tuple[int, int]) -> None:
    image, mask = np.full((*shape, 3), 7, np.uint8), np.full(shape, 3, np.uint8)
    for seed in range(30):
        how = SegmentationAugmentation(crop=(17, 17))
        window, labels = augment_segmentation(image, mask, Random(seed), how)
        assert window.shape == (17, 17, 3)
        assert set(labels.ravel()) <= {3, 255}
        assert 3 in labels
        assert (window[labels == 3] == 7).all()


@pytest.mark.parametrize("size", [(100, 100), (375, 500), (30, 400), (400, 30), (1, 1)])
def test_windows_lie_in_the_image_and_keep_their_promises(size: tuple[int, int]) -> None:
    windows = [random_window(size, Random(seed), (0.08, 1.0)) for seed in range(300)]
    for window in windows:
        assert 0 <= window.top <= size[0] - window.height
        assert 0 <= window.left <= size[1] - window.width
        assert min(window.height, window.width) >= 1
    if min(size) >= 100:
        shares = [w.height * w.width / (size[0] * size[1]) for w in windows]
        assert 0.075 < min(shares) < 0.12
        assert 0.85 < max(shares) <= 1.01
        ratios = [w.width / w.height for w in windows]
        assert min(ratios) > 0.72
        assert max(ratios) < 1.39


def test_an_image_too_long_for_any_draw_gives_its_centre() -> None:
    assert random_window((30, 400), Random(0), (0.9, 1.0)) == Window(0, 180, 30, 40)
    assert random_window((400, 30), Random(0), (0.9, 1.0)) == Window(180, 0, 40, 30)


def test_a_reduced_decode_shows_the_same_window() -> None:
    image = cv2.GaussianBlur(PIXELS.integers(0, 256, (400, 600, 3), dtype=np.uint8), (0, 0), 12)
    for seed in range(30):
        crops = [
            augment_classification(
                decode(image), (400, 600), Random(seed), (96, 96), (0.3, 1.0), True
            )
            for decode in (whole, reduced)
        ]
        assert crops[0].shape == crops[1].shape == (96, 96, 3)
        assert np.abs(crops[0].astype(int) - crops[1]).mean() < 1.5


def test_decoding_is_asked_for_what_the_crop_needs() -> None:
    asked = []

    def decode(height: int, width: int) -> np.ndarray:
        asked.append((height, width))
        return np.zeros((400, 600, 3), np.uint8)

    resize_window(decode, (400, 600), Window(0, 0, 200, 300), (100, 100))
    resize_window(decode, (400, 600), Window(0, 0, 50, 50), (100, 100))
    assert asked == [(200, 200), (400, 600)]


def test_shrinking_does_not_alias() -> None:
    """Stripes finer than the crop can show become their mean, neither vanish nor make patterns."""
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::4] = 255
    small = resize_window(whole(stripes), (256, 256), Window(0, 0, 256, 256), (64, 64))
    assert np.abs(small - 255 / 4).max() <= 1


def test_flips_are_even_and_exact() -> None:
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)

    def crop(seed: int, flip: bool) -> np.ndarray:
        return augment_classification(
            whole(ramp), (64, 64), Random(seed), (32, 32), (1.0, 1.0), flip
        )

    flipped = [
        seed for seed in range(200) if crop(seed, True)[0, 0, 0] > crop(seed, True)[0, -1, 0]
    ]
    assert 70 < len(flipped) < 130
    assert np.array_equal(crop(flipped[0], True), crop(flipped[0], False)[:, ::-1])


def test_center_crop_takes_the_middle_undistorted() -> None:
    image = np.zeros((160, 240, 3), np.uint8)
    image[10:150, 50:190] = 255  # 0.875 of the shorter side, centred
    assert (center_crop(whole(image), (160, 240), (140, 140)) == 255).all()
    image[10:150, 50] = image[10:150, 189] = image[10, 50:190] = image[149, 50:190] = 0
    framed = center_crop(whole(image), (160, 240), (140, 140))
    for edge in (framed[0], framed[-1], framed[:, 0], framed[:, -1]):
        assert (edge == 0).all()


def test_center_crop_enlarges_small_images() -> None:
    crop = center_crop(whole(NOISE[:9, :9]), (9, 9), (32, 48))
    assert crop.shape == (32, 48, 3)
