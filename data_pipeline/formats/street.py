"""Draws street scenes in the labels of Cityscapes, with the objects of `scene` as road users."""

import cv2
import numpy as np

from data_pipeline.formats.scene import Mask, Picture, blob, noise, paint, place

_EGO, _ROAD, _SIDEWALK, _BUILDING, _VEGETATION, _SKY = 1, 7, 8, 11, 21, 23
_USERS = {"person": 24, "car": 26, "bus": 28, "bicycle": 33}


def draw_street(rng: np.random.Generator, height: int, width: int) -> tuple[Picture, Mask]:
    """A street and its labelIds, the hood of the camera's car (ignored) at the bottom."""
    ids = np.full((height, width), _SKY, np.uint8)
    picture = noise(rng, height, width, rng.uniform(140, 230, 3), 6)
    horizon = int(height * rng.uniform(0.4, 0.5))
    _add_buildings(rng, picture, ids, horizon)
    _add_trees(rng, picture, ids, horizon)
    _add_ground(rng, picture, ids, horizon)
    for depth in np.sort(rng.uniform(0.1, 1, int(rng.integers(3, 7)))):
        kind = str(rng.choice(list(_USERS)))
        radius = height * (0.08 + 0.14 * depth)
        center = (rng.uniform(0, width), horizon + depth * (height - horizon) * 0.6)
        user = place(rng, kind, center, radius, (height, width))
        paint(rng, picture, user)
        ids[user.mask(height, width) > 0] = _USERS[kind]
    hood = int(height * 0.95)
    picture[hood:] = rng.integers(0, 60, 3)
    ids[hood:] = _EGO
    return picture, ids


def coarsen(ids: Mask, margin: int) -> Mask:
    """What a hasty annotator draws: polygons well inside each region, unlabeled (0) elsewhere."""
    coarse = np.zeros_like(ids)
    kernel = np.ones((2 * margin + 1, 2 * margin + 1), np.uint8)
    for label in np.unique(ids):
        # Beyond the picture is no other region: erode away from real borders only.
        inner = cv2.erode((ids == label).astype(np.uint8), kernel, borderValue=1)
        outlines = cv2.findContours(inner, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
        drawn = np.zeros_like(ids)
        for outline in outlines:
            cv2.fillPoly(drawn, [cv2.approxPolyDP(outline, 1.5, True)], 1)
        coarse[(drawn > 0) & (inner > 0)] = label
    return coarse


def _add_buildings(rng: np.random.Generator, picture: Picture, ids: Mask, horizon: int) -> None:
    height, width = ids.shape
    left = 0
    while left < width:
        right = left + int(width * rng.uniform(0.08, 0.2)) + 1
        if rng.random() < 0.75:
            top = int(height * rng.uniform(0.02, 0.3))
            area = slice(top, horizon), slice(left, min(right, width))
            rows, columns = ids[area].shape
            wall = noise(rng, rows, columns, rng.uniform(70, 180, 3), 8)
            y, x = np.mgrid[:rows, :columns]
            step = max(4, height // 16)
            wall[(y % step > step // 2) & (x % step > step // 2)] //= 2  # windows
            picture[area] = wall
            ids[area] = _BUILDING
        left = right


def _add_trees(rng: np.random.Generator, picture: Picture, ids: Mask, horizon: int) -> None:
    height, width = ids.shape
    leaves = noise(rng, height, width, rng.uniform(40, 160, 3), 60)
    for _ in range(int(rng.integers(1, 4))):
        center = np.array([rng.uniform(0, width), horizon - height * rng.uniform(0.05, 0.15)])
        crown = np.zeros_like(ids)
        cv2.fillPoly(crown, [blob(rng, center, height * rng.uniform(0.1, 0.25))], 1)
        picture[crown > 0] = leaves[crown > 0]
        ids[crown > 0] = _VEGETATION


def _add_ground(rng: np.random.Generator, picture: Picture, ids: Mask, horizon: int) -> None:
    height, width = ids.shape
    picture[horizon:] = noise(rng, height - horizon, width, rng.uniform(100, 170, 3), 15)
    ids[horizon:] = _SIDEWALK
    middle = rng.uniform(0.35, 0.65) * width
    corners = [(middle - width * 0.1, horizon), (middle + width * 0.1, horizon)]
    corners += [(width * 1.1, height), (-width * 0.1, height)]
    road = np.zeros_like(ids)
    cv2.fillPoly(road, [np.rint(corners).astype(np.int32)], 1)
    asphalt = noise(rng, height, width, np.full(3, rng.uniform(50, 110)), 6)
    picture[road > 0] = asphalt[road > 0]
    ids[road > 0] = _ROAD
