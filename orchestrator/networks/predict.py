"""`atrous predict`: images through a segmentation network, to files."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.decode import Pixels, decode_image
from data_pipeline.errors import DataError
from data_pipeline.palette import voc_palette
from model.allocator import keep_freed_memory
from model.deeplab import DeepLab
from model.fold import fold_batch_norm
from model.inference import Inference, infer
from orchestrator.errors import RunError
from orchestrator.networks.images import ImageFile, check_outputs, find_images, output_paths
from orchestrator.networks.network import open_network
from orchestrator.training.place import Place, set_precision

_LABELS, _PROBABILITIES = ".png", ".npy"
_OVERLAY, _LONG_OVERLAY = "_overlay.jpg", "_overlay.png"
_JPEG_SIDE = 65_500  # the longest that JPEG can store
_BAND = 256  # rows coloured at once


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is predicted how; device None is a GPU where there is one."""

    inference: Inference
    out: Path
    overlay: bool = True
    probabilities: bool = False
    output_stride: int | None = None
    device: str | None = None
    fold: bool = True

    @property
    def endings(self) -> list[str]:
        """What the names of written files may end with."""
        overlays = [_OVERLAY, _LONG_OVERLAY] if self.overlay else []
        return [_LABELS, *overlays, *([_PROBABILITIES] if self.probabilities else [])]


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A network where it computes."""

    network: DeepLab
    class_names: tuple[str, ...]
    place: Place


def predict(checkpoint: str, places: Sequence[str], settings: Settings) -> tuple[int, list[str]]:
    """Predict all images; returns how many were and, for each that was not, its place and why.

    Labels go to NAME.png (class ids, VOC's colours as palette), the image in these colours to
    NAME_overlay.jpg (.png where it is too long for JPEG), probabilities (K, H, W) to NAME.npy as
    float16. Pixels are those stored in the file: no EXIF orientation is applied, as in training.

    Raises:
        CheckpointError: no valid checkpoint.
        RunError: no images, outputs that collide, no such device, no segmentation network.
    """
    images = find_images(places)
    check_outputs(images, places, settings.out, settings.endings)
    predictor = open_predictor(checkpoint, settings)
    if predictor.place.device.type == "cpu":
        keep_freed_memory()
    failures = []
    with _progress(len(images)) as advance:
        for image, pixels in _decoded(images):
            try:
                _predict_image(predictor, image, pixels.result(), settings, advance)
            except DataError as error:
                # Its own text says how to prepare a data set again.
                failures.append(f"{image.place}: cannot decode it ({error.__cause__ or error})")
            except (OSError, MemoryError) as error:
                failures.append(f"{image.place}: {error or 'not enough memory'}")
            except torch.OutOfMemoryError:
                failures.append(f"{image.place}: not enough GPU memory; take a smaller --tile")
    return len(images) - len(failures), failures


def open_predictor(checkpoint: str, settings: Settings) -> Predictor:
    """A checkpoint's network, ready on its device.

    Raises:
        CheckpointError: no valid checkpoint.
        RunError: not a segmentation network, too many classes for a PNG, or no such device.
    """
    place = _find_place(settings.device)
    opened = open_network(checkpoint, output_stride=settings.output_stride)
    network = opened.network
    if not isinstance(network, DeepLab):
        raise RunError(f"{checkpoint}: is a {opened.task} network; predict takes segmentation")
    if len(opened.class_names) > 256:
        raise RunError(f"{checkpoint}: {len(opened.class_names)} classes; a PNG of ids holds 256")
    if settings.fold:
        network = cast(DeepLab, fold_batch_norm(network))
    network.to(device=place.device).to(memory_format=torch.channels_last)
    return Predictor(network=network, class_names=opened.class_names, place=place)


def _find_place(device: str | None) -> Place:
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise RunError(f"--device {name}: no such device; choose cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise RunError(f"--device {name}: not supported; choose cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise RunError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here")
    return Place(rank=0, world=1, device=chosen, autocast_dtype=set_precision("auto", chosen))


def _decoded(images: Sequence[ImageFile]) -> Iterator[tuple[ImageFile, Future[Pixels]]]:
    """Every image and its pixels; while one is predicted the next is read and decoded."""
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for image in images:
            following = (image, pool.submit(_decode, image))
            if ahead is not None:
                yield ahead
            ahead = following
        if ahead is not None:
            yield ahead


def _decode(image: ImageFile) -> Pixels:
    return decode_image(image.read(), image.place)


def _predict_image(
    predictor: Predictor,
    image: ImageFile,
    pixels: Pixels,
    settings: Settings,
    advance: Callable[[float], None],
) -> None:
    """Predict and write one image; `advance` hears which share of it is done."""
    height, width = pixels.shape[:2]
    overlay = _OVERLAY if max(height, width) <= _JPEG_SIDE else _LONG_OVERLAY
    endings = (_LABELS, overlay, _PROBABILITIES)
    of_labels, of_overlay, of_probabilities = output_paths(image, settings.out, endings)
    of_labels.parent.mkdir(parents=True, exist_ok=True)
    regions = infer(
        predictor.network,
        torch.from_numpy(pixels).permute(2, 0, 1),
        settings.inference,
        probabilities=settings.probabilities,
    )
    labels = np.empty((height, width), np.uint8)
    shape = (len(predictor.class_names), height, width)
    with (
        _probabilities(of_probabilities, shape, settings.probabilities) as probabilities,
        predictor.place.autocast(),
    ):
        for region in regions:
            labels[region.rows, region.columns] = region.labels.cpu().numpy()
            if probabilities is not None and region.probabilities is not None:
                shares = region.probabilities.to(torch.float16).cpu().numpy()
                probabilities[:, region.rows, region.columns] = shares
            advance(region.labels.numel() / labels.size)
    with _whole(of_labels) as temporary:
        picture = Image.fromarray(labels)
        picture.putpalette(voc_palette().tobytes())
        picture.save(temporary, "PNG")
    if settings.overlay:
        paint(pixels, labels, predictor.class_names)
        with _whole(of_overlay) as temporary:
            kind = "JPEG" if overlay == _OVERLAY else "PNG"
            Image.fromarray(pixels).save(temporary, kind, quality=90)


def paint(pixels: Pixels, labels: Pixels, class_names: Sequence[str]) -> None:
    """Mix an image (H, W, 3) half and half, in place, with the colours of its classes (H, W).

    A class named background stays as it is.
    """
    palette = voc_palette()
    for top in range(0, len(labels), _BAND):
        part, ids = pixels[top : top + _BAND], labels[top : top + _BAND]
        mixed = cv2.addWeighted(part, 0.5, palette[ids], 0.5, 0)
        plain = np.isin(ids, [i for i, name in enumerate(class_names) if name == "background"])
        pixels[top : top + _BAND] = np.where(plain[..., None], part, mixed)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal, nothing elsewhere; the callable takes what share of an image is done."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{total} images", total=total)
        yield partial(progress.advance, task)


@contextmanager
def _probabilities(
    path: Path, shape: tuple[int, int, int], wanted: bool
) -> Iterator[np.memmap | None]:
    """A float16 array in a file, which has its name once it is complete; None if not wanted."""
    if not wanted:
        yield None
        return
    with _whole(path) as temporary:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
        yield array
        array.flush()


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary file to write, which gets its name when it is complete and goes if it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
