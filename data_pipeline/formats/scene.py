"""Draws the pictures of the synthetic data sets: textured objects in clutter.

A kind of object is told by its silhouette and by the family of its texture. Colours are drawn at
random for every object, so they say nothing. Distractors have no silhouette or texture of a kind.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]  # (H, W, 3) RGB
Mask = NDArray[np.uint8]  # (H, W)
Points = NDArray[np.int32]  # (N, 2) x, y in pixels
_Grid = NDArray[np.float32]
_Part = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """An object in a picture: its kind and the polygons whose union is its silhouette."""

    kind: str
    polygons: tuple[Points, ...]
    radius: float

    def mask(self, height: int, width: int) -> Mask:
        """1 on the silhouette, 0 elsewhere."""
        mask = np.zeros((height, width), np.uint8)
        for polygon in self.polygons:
            cv2.fillPoly(mask, [polygon], 1)
        return mask


def _disc(x: float, y: float, radius: float, flat: float = 1.0) -> _Part:
    turns = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    return [(x + radius * float(np.cos(t)), y + flat * radius * float(np.sin(t))) for t in turns]


# Silhouettes in a box of -1..1, y downwards.
_SHAPES: Mapping[str, Sequence[_Part]] = {
    "aeroplane": (
        [(-1, -0.12), (0.75, -0.15), (1, 0), (0.75, 0.15), (-1, 0.1)],
        [(0.25, 0), (-0.35, -0.95), (-0.65, -0.95), (-0.25, 0)],
        [(0.25, 0), (-0.35, 0.95), (-0.65, 0.95), (-0.25, 0)],
        [(-0.7, 0), (-1, -0.45), (-1, 0)],
    ),
    "bicycle": (
        _disc(-0.55, 0.4, 0.42),
        _disc(0.55, 0.4, 0.42),
        [(-0.55, 0.5), (-0.2, -0.4), (0.35, -0.4), (0.55, 0.5)],
        [(0.2, -0.8), (0.6, -0.8), (0.5, -0.2), (0.3, -0.2)],
    ),
    "bird": (
        _disc(0, 0.15, 0.6, 0.5),
        _disc(0.6, -0.2, 0.22),
        [(0.75, -0.35), (1, -0.15), (0.75, -0.05)],
        [(-0.3, 0), (0.25, 0), (-0.45, -0.95)],
        [(-0.45, 0.1), (-1, -0.1), (-1, 0.4)],
    ),
    "boat": (
        [(-1, 0.3), (1, 0.3), (0.6, 0.85), (-0.6, 0.85)],
        [(0, -0.95), (0.75, 0.15), (0, 0.15)],
        [(-0.12, -0.95), (0, -0.95), (0, 0.35), (-0.12, 0.35)],
        [(-0.12, -0.6), (-0.12, 0.15), (-0.6, 0.15)],
    ),
    "bottle": (
        [(-0.4, -0.1), (0.4, -0.1), (0.4, 1), (-0.4, 1)],
        [(-0.15, -1), (0.15, -1), (0.15, -0.4), (0.4, -0.1), (-0.4, -0.1), (-0.15, -0.4)],
    ),
    "bus": (
        [(-1, -0.65), (0.95, -0.65), (1, 0.45), (-1, 0.45)],
        _disc(-0.55, 0.45, 0.22),
        _disc(0.55, 0.45, 0.22),
    ),
    "car": (
        [(-0.6, -0.1), (-0.35, -0.55), (0.35, -0.55), (0.65, -0.1)],
        [(-1, 0), (-0.6, -0.1), (0.65, -0.1), (1, 0.05), (1, 0.4), (-1, 0.4)],
        _disc(-0.55, 0.4, 0.26),
        _disc(0.55, 0.4, 0.26),
    ),
    "person": (
        _disc(0, -0.8, 0.22),
        [(-0.32, -0.6), (0.32, -0.6), (0.25, 0.2), (-0.25, 0.2)],
        [(-0.25, 0.2), (0, 0.2), (-0.08, 1), (-0.34, 1)],
        [(0, 0.2), (0.25, 0.2), (0.34, 1), (0.08, 1)],
        [(0.25, -0.6), (0.7, 0), (0.55, 0.12), (0.2, -0.3)],
    ),
}  # fmt: skip
KINDS = tuple(_SHAPES)


def place(
    rng: np.random.Generator,
    kind: str,
    center: tuple[float, float],
    radius: float,
    size: tuple[int, int],
) -> Placed:
    """Put an object of `kind` at `center` (x, y), turned, stretched and mirrored at random.

    It is cut at the borders of the picture of `size` (height, width).
    """
    angle = rng.uniform(-0.35, 0.35)
    stretch = np.exp(rng.uniform(-0.2, 0.2))
    scale = radius * np.array([stretch * rng.choice([-1, 1]), 1 / stretch])
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    limit = np.array([size[1] - 1, size[0] - 1])
    polygons = tuple(
        np.clip(np.rint(np.asarray(part) * scale @ turn + center), 0, limit).astype(np.int32)
        for part in _SHAPES[kind]
    )
    return Placed(kind=kind, polygons=polygons, radius=radius)


def place_at_random(
    rng: np.random.Generator,
    radii: Sequence[float],
    size: tuple[int, int],
    kinds: Sequence[str] = KINDS,
) -> list[Placed]:
    """One object of a random kind per radius, largest silhouette first, so the small are seen."""
    height, width = size
    objects = []
    for radius in radii:
        margin = 0.8 * radius
        center = (
            rng.uniform(min(margin, width / 2), max(width - margin, width / 2)),
            rng.uniform(min(margin, height / 2), max(height - margin, height / 2)),
        )
        objects.append(place(rng, str(rng.choice(kinds)), center, radius, size))
    return sorted(objects, key=lambda entry: -int(entry.mask(height, width).sum()))


def background(rng: np.random.Generator, height: int, width: int) -> Picture:
    """Noise at several scales under plain blobs."""
    picture = noise(rng, height, width, rng.uniform(60, 195, 3), 40)
    for _ in range(int(rng.integers(3, 8))):
        center = rng.uniform((0, 0), (width, height))
        paint_blob(rng, picture, blob(rng, center, rng.uniform(0.05, 0.25) * height))
    return picture


def noise(
    rng: np.random.Generator, height: int, width: int, color: NDArray[np.float64], strength: float
) -> Picture:
    """A picture of `color` with coarse and fine noise of `strength` grey levels."""
    total = np.broadcast_to(color.astype(np.float32), (height, width, 3)).copy()
    for cell in (32, 8, 2):
        shape = (height // cell + 2, width // cell + 2, 3)
        coarse = rng.standard_normal(shape, dtype=np.float32)
        total += (
            strength * 0.6 * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
        )
    return np.clip(total, 0, 255).astype(np.uint8)


def blob(rng: np.random.Generator, center: NDArray[np.float64], radius: float) -> Points:
    """A random star-shaped polygon."""
    corners = int(rng.integers(4, 9))
    turns = np.sort(rng.uniform(0, 2 * np.pi, corners))
    reach = radius * rng.uniform(0.5, 1.2, (corners, 1))
    return np.rint(center + reach * np.stack([np.cos(turns), np.sin(turns)], 1)).astype(np.int32)


def paint_blob(rng: np.random.Generator, picture: Picture, polygon: Points) -> None:
    """Fill a polygon with one random colour."""
    cv2.fillPoly(picture, [polygon], [int(level) for level in rng.integers(0, 256, 3)])


def paint(rng: np.random.Generator, picture: Picture, placed: Placed) -> None:
    """Draw an object in its texture, in two random colours that differ well."""
    height, width = picture.shape[:2]
    mask = placed.mask(height, width)
    x, y, columns, rows = cv2.boundingRect(mask)
    if not columns:
        return
    period = max(4.0, placed.radius * rng.uniform(0.3, 0.45))
    angle = rng.uniform(0, np.pi)
    center = np.concatenate(placed.polygons).mean(0)
    u, v = np.meshgrid(
        (np.arange(x, x + columns, dtype=np.float32) - np.float32(center[0])) / np.float32(period),
        (np.arange(y, y + rows, dtype=np.float32) - np.float32(center[1])) / np.float32(period),
    )
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    share = _TEXTURES[placed.kind](rng, cos * u - sin * v, sin * u + cos * v)[..., None]
    first, second = _two_colors(rng)
    colors = first + (second - first) * share + rng.normal(0, 6, share.shape).astype(np.float32)
    window = picture[y : y + rows, x : x + columns]
    inside = mask[y : y + rows, x : x + columns, None] > 0
    np.copyto(window, np.clip(colors, 0, 255).astype(np.uint8), where=inside)


def draw(rng: np.random.Generator, size: tuple[int, int], objects: Sequence[Placed]) -> Picture:
    """A cluttered picture of `size` (height, width) with `objects`, the last one in front."""
    picture = background(rng, *size)
    for entry in objects:
        paint(rng, picture, entry)
    return picture


def _two_colors(rng: np.random.Generator) -> tuple[_Grid, _Grid]:
    """Every channel differs by about half its range; which of them is the lighter is random."""
    low = rng.uniform(10, 110, 3)
    high = low + rng.uniform(90, 140, 3)
    swap = rng.random(3) < 0.5
    first, second = np.where(swap, high, low), np.where(swap, low, high)
    return first.astype(np.float32), second.astype(np.float32)


# One family of textures per kind: (random source, u, v) -> share of the second colour, where
# u and v count periods in the frame of the texture.
def _stripes(rng: np.random.Generator, u: _Grid, v: _Grid) -> _Grid:
    return (u % 1 < 0.5).astype(np.float32)


def _checker(rng: np.random.Generator, u: _Grid, v: _Grid) -> _Grid:
    return ((np.floor(u) + np.floor(v)) % 2).astype(np.float32)


def _dots(rng: np.random.Generator, u: _Grid, v: _Grid) -> _Grid:
    return (np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.3).astype(np.float32)


def _rings(rng: np.random.Generator, u: _Grid, v: _Grid) -> _Grid:
    return (np.hypot(u, v) % 1 < 0.5).astype(np.float32)


def _gradient(rng: np.random.Generator, u: _Grid, v: _Grid) -> _Grid:
    span = max(float(u.max() - u.min()), 1e-3)
    return (u - u.min()) / np.float32(span)


def _grid(rng: np.random.Generator, u: _Grid, v: _Grid) -> _Grid:
    return ((u % 1 < 0.25) | (v % 1 < 0.25)).astype(np.float32)


def _speckle(rng: np.random.Generator, u: _Grid, v: _Grid) -> _Grid:
    rows, columns = u.shape
    cells = rng.random((rows // 3 + 1, columns // 3 + 1), dtype=np.float32)
    grid: _Grid = cv2.resize(cells, (columns, rows), interpolation=cv2.INTER_NEAREST)
    return grid


def _zigzag(rng: np.random.Generator, u: _Grid, v: _Grid) -> _Grid:
    return ((u + np.abs(v % 2 - 1)) % 1 < 0.5).astype(np.float32)


_TEXTURES: Mapping[str, Callable[[np.random.Generator, _Grid, _Grid], _Grid]] = {
    "aeroplane": _stripes,
    "bicycle": _checker,
    "bird": _dots,
    "boat": _rings,
    "bottle": _gradient,
    "bus": _grid,
    "car": _speckle,
    "person": _zigzag,
}
