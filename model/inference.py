"""Inference as in the reference: scales and mirror images averaged, large images in tiles."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.blocks import resize, scaled_side
from model.deeplab import DeepLab

Size = tuple[int, int]

# Tiles begin at multiples of it: a quarter of it is still a multiple of output stride 32, so at
# every scale of k/4 the pixels and features of a tile lie where those of the whole image lie.
TILE_GRID = 128

# Pixels from which the widest branch of ASPP takes its input, to each side, at any output stride.
_ASPP_REACH = 288


class View(NamedTuple):
    """One of the ways in which the network looks at an image."""

    scale: float
    flip: bool


class Region(NamedTuple):
    """What was found in a part of an image: labels (h, w) uint8, probabilities (K, h, w)."""

    rows: slice
    columns: slice
    labels: Tensor
    probabilities: Tensor | None


class _Span(NamedTuple):
    """A tile along one axis, and the core of it that is kept; in pixels of the padded image."""

    start: int
    stop: int
    core_start: int
    core_stop: int

    @property
    def core(self) -> slice:
        """The core within the tile."""
        return slice(self.core_start - self.start, self.core_stop - self.start)

    def core_at(self, stride: float) -> slice:
        """The core within the tile's features, which lie `stride` pixels apart."""
        # Cores end between two features, except the last: there both images and features end.
        last = self.core_stop == self.stop
        stop = None if last else round((self.core_stop - self.start) / stride)
        return slice(round((self.core_start - self.start) / stride), stop)


_Tile = tuple[_Span, _Span]


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How images of any size are predicted.

    An image with a side longer than `tile` pixels is cut into tiles that share `overlap` pixels, of
    which each gives up half: the result is the whole image's wherever half the overlap covers the
    receptive field, at the smallest scale.

    Raises:
        ValueError: a scale is no multiple of 0.25 (tiles would not meet), or tile and overlap do
            not fit on the grid.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    tile: int = 2049
    overlap: int = 1024

    def __post_init__(self) -> None:
        if not self.scales or any(scale <= 0 or scale * 4 % 1 for scale in self.scales):
            raise ValueError(
                f"scales: {list(self.scales)}; give multiples of 0.25 above 0, such as 0.5, 1, 1.75"
            )
        if self.tile <= 1 or (self.tile - 1) % TILE_GRID:
            near = max(round((self.tile - 1) / TILE_GRID), 1) * TILE_GRID + 1
            raise ValueError(
                f"tile: {self.tile} is not a multiple of {TILE_GRID} plus 1; take {near}"
            )
        if self.overlap < 0 or self.overlap % (2 * TILE_GRID) or self.overlap >= self.tile - 1:
            raise ValueError(
                f"overlap: {self.overlap} is not a multiple of {2 * TILE_GRID} from 0 to below "
                f"tile ({self.tile}) - 1"
            )

    @property
    def views(self) -> tuple[View, ...]:
        """All views of an image."""
        return make_views(self.scales, self.flip)


def make_views(scales: Sequence[float], flip: bool) -> tuple[View, ...]:
    """The image at each scale and, with flip, its mirror image too."""
    return tuple(View(scale, flipped) for scale in scales for flipped in (False, True)[: 1 + flip])


def aligned_side(side: int, network: DeepLab, views: Sequence[View]) -> int:
    """The next side from `side` on at which corners stay aligned at all strides and scales.

    That is 16k+1 (32k+1 at output stride 32). Where images are also scaled it is four times as
    coarse, 64k+1, so that a quarter of it, and thus every scale of k/4, is of this form again.
    """
    multiple = max(16, network.output_stride)
    if any(view.scale != 1 for view in views):
        multiple *= 4
    return -(-(side - 1) // multiple) * multiple + 1


def pad_image(image: Tensor, size: Size, mean_pixel: Tensor) -> Tensor:
    """Pad (3, H, W) at the bottom and right with the mean colour, as the reference does.

    Returns float32: the mean colour is no whole number, and after normalisation it must be zero.
    """
    height, width = image.shape[-2:]
    padded = mean_pixel.view(3, 1, 1).expand(3, *size).clone()
    padded[:, :height, :width] = image
    return padded


@torch.no_grad()
def predict_labels(network: DeepLab, images: Tensor, views: Sequence[View]) -> Tensor:
    """The most probable class (B, H, W) of each pixel of padded images (B, 3, H, W), uint8."""
    return _scores(network, images, views, [None] * len(views)).argmax(dim=1).to(torch.uint8)


@torch.no_grad()
def predict_probabilities(
    network: DeepLab,
    images: Tensor,
    views: Sequence[View],
    image_means: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Class probabilities (B, K, H, W) of padded images (B, 3, H, W), their mean over the views.

    `image_means` are, for each view, what `DeepLab.forward_low_resolution` takes as image_mean.
    """
    total: Tensor | None = None
    for view, mean in zip(views, image_means or [None] * len(views), strict=True):
        probabilities = _softmax_(_logits(network, images, view, mean))
        total = probabilities if total is None else total.add_(probabilities)
    assert total is not None
    return total.div_(len(views))


@torch.inference_mode()
def infer(
    network: DeepLab, image: Tensor, how: Inference, *, probabilities: bool = False
) -> Iterator[Region]:
    """Predict one image (3, H, W), uint8 RGB of any size, in regions that cover it without overlap.

    Memory beyond the image is that of a tile. Image-level features are those of the whole image:
    tiles go through the backbone once more before, to sum them up.

    The default overlap gives every pixel 512 pixels of context at least. ASPP reaches 288, and with
    the layers before it X-65 1270 (output stride 16), but hardly anything comes from that far: with
    random weights, whose reach is wide, and a cut every 640 pixels, 16 % of the labels of a strip
    differed from the whole image's at overlap 512, 3.2 % at 768, 0.4 % at 1024 and none at 2560
    (probabilities by 0.05, 0.016, 0.002 and 2e-7 in the mean over pixels of the largest
    difference). timm backbones that pool over the image in every block (squeeze-and-excitation) see
    the pool of a tile instead.
    """
    views = how.views
    height, width = (aligned_side(side, network, views) for side in image.shape[1:])
    tiles = _tiles((height, width), how.tile, how.overlap)
    means: Sequence[Tensor | None] = [None] * len(views)
    if network.aspp.image_pooling is not None and len(tiles) > 1:
        # Features need less context than what ASPP makes of them.
        spared = 2 * _ASPP_REACH / max(how.scales)
        overlap = max(math.ceil((how.overlap - spared) / (2 * TILE_GRID)), 0) * 2 * TILE_GRID
        means = _image_means(network, image, _tiles((height, width), how.tile, overlap), views)
    for rows, columns in tiles:
        images = _cut(network, image, (rows, columns))
        scores = _scores(network, images, views, means)[0, :, rows.core, columns.core]
        # The last cores end with the padding, the image before it.
        rows_kept = slice(rows.core_start, min(rows.core_stop, image.shape[1]))
        columns_kept = slice(columns.core_start, min(columns.core_stop, image.shape[2]))
        scores = scores[
            :, : rows_kept.stop - rows_kept.start, : columns_kept.stop - columns_kept.start
        ]
        labels = scores.argmax(dim=0).to(torch.uint8)
        if not probabilities:
            yield Region(rows_kept, columns_kept, labels, None)
        else:
            shares = scores.softmax(dim=0) if len(views) == 1 else scores
            yield Region(rows_kept, columns_kept, labels, shares)


def _scores(
    network: DeepLab, images: Tensor, views: Sequence[View], means: Sequence[Tensor | None]
) -> Tensor:
    """Logits where there is one view (softmax would round some to ties), else probabilities."""
    if len(views) == 1:
        return _logits(network, images, views[0], means[0])
    return predict_probabilities(network, images, views, means)


def _logits(network: DeepLab, images: Tensor, view: View, image_mean: Tensor | None) -> Tensor:
    """Logits (B, K, H, W) of images (B, 3, H, W) seen in one view."""
    height, width = images.shape[2:]
    logits = network.forward_low_resolution(_seen(images, view), image_mean).float()
    # The reference joins scales at the resolution of the logits, which enlarged images raise.
    stride = network.output_stride if network.decoder is None else 4
    scale = max(1.0, view.scale) / stride
    logits = _resized(logits, (scaled_side(height, scale), scaled_side(width, scale)))
    if view.flip:
        logits = logits.flip(3)
    return resize(logits, (height, width))


def _seen(images: Tensor, view: View) -> Tensor:
    height, width = (scaled_side(side, view.scale) for side in images.shape[2:])
    images = _resized(images.flip(3) if view.flip else images, (height, width))
    return images.contiguous(memory_format=torch.channels_last)


def _resized(x: Tensor, size: Size) -> Tensor:
    return x if tuple(x.shape[2:]) == size else resize(x, size)


def _softmax_(logits: Tensor) -> Tensor:
    """Softmax over classes in the memory of the logits, which for large images are large."""
    logits.sub_(logits.amax(dim=1, keepdim=True)).exp_()
    return logits.div_(logits.sum(dim=1, keepdim=True))


def _tiles(size: Size, tile: int, overlap: int) -> list[_Tile]:
    rows, columns = (_spans(side, tile, overlap) for side in size)
    return list(itertools.product(rows, columns))


def _spans(side: int, tile: int, overlap: int) -> list[_Span]:
    """Tiles along one axis, as few and then as equal in length as the grid allows."""
    if side <= tile:
        return [_Span(0, side, 0, side)]
    length = side - 1 - overlap
    count = math.ceil(length / (tile - 1 - overlap))
    step = math.ceil(length / count / TILE_GRID) * TILE_GRID
    starts = range(0, length, step)
    return [
        _Span(
            start,
            min(start + step + overlap + 1, side),
            start + overlap // 2 if start else 0,
            start + step + overlap // 2 if start != starts[-1] else side,
        )
        for start in starts
    ]


def _cut(network: DeepLab, image: Tensor, tile: _Tile) -> Tensor:
    """A tile (1, 3, h, w) of an image, on the network's device, padded where the image ends."""
    rows, columns = tile
    part = image[:, rows.start : rows.stop, columns.start : columns.stop]
    device = network.logits.weight.device
    mean_pixel = torch.tensor(network.mean_pixel, dtype=torch.float32, device=device)
    size = (rows.stop - rows.start, columns.stop - columns.start)
    return pad_image(part.to(device), size, mean_pixel)[None]


def _image_means(
    network: DeepLab, image: Tensor, tiles: Sequence[_Tile], views: Sequence[View]
) -> list[Tensor | None]:
    """The mean (1, C, 1, 1) over the whole image of the high-level features, for each view."""
    sums: list[Tensor | float] = [0.0] * len(views)
    counts = [0] * len(views)
    for rows, columns in tiles:
        images = _cut(network, image, (rows, columns))
        for index, view in enumerate(views):
            features = network.features(_seen(images, view)).high_level
            features = features.flip(3) if view.flip else features
            stride = network.output_stride / view.scale
            core = features[:, :, rows.core_at(stride), columns.core_at(stride)]
            sums[index] = sums[index] + core.sum(dim=(2, 3), keepdim=True, dtype=torch.float64)
            counts[index] += core.shape[2] * core.shape[3]
    dtype = features.dtype
    return [torch.as_tensor(s / n).to(dtype) for s, n in zip(sums, counts, strict=True)]
