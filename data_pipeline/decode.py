"""Encoded bytes to arrays. The decoders release the GIL, so threads are enough.

An EXIF orientation is not applied: masks and sizes in the manifest describe the pixels as stored,
and a turned image would no longer lie under its mask.
"""

import io
import json
import struct
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from data_pipeline.errors import DataError

Pixels = NDArray[np.uint8]

MAX_PIXELS = 178_956_970  # Pillow's own limit; 0.5 GB of RGB
_JPEG = b"\xff\xd8"
_PNG = b"\x89PNG\r\n\x1a\n"


def decode_image(data: bytes, key: str) -> Pixels:
    """Decode an image to RGB `(H, W, 3)`.

    Sixteen bits are reduced to eight, grey becomes three equal channels, alpha is dropped.

    Raises:
        DataError: damaged, of an unknown format, or larger than MAX_PIXELS.
    """
    return decode_image_scaled(data, key, min_height=0, min_width=0)


def decode_image_scaled(data: bytes, key: str, *, min_height: int, min_width: int) -> Pixels:
    """Decode an image to RGB `(H, W, 3)`, no smaller than the given size (as far as the image is).

    A JPEG that is far larger is reduced while decoding, which costs less than decoding it whole.
    0 asks for the full size.

    Raises:
        DataError: damaged, of an unknown format, or larger than MAX_PIXELS.
    """
    try:
        if data.startswith(_JPEG):
            return _decode_jpeg(data, min_height, min_width)
        if data.startswith(_PNG):
            return cv2.cvtColor(_decode_png(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        return _decode_other(data)
    except (ValueError, OSError, SyntaxError, cv2.error, Image.DecompressionBombError) as error:
        raise DataError(f"{key}: cannot decode the image ({error}); prepare it again") from error


def decode_mask(data: bytes, key: str) -> Pixels:
    """Decode a PNG of class ids, grey or palette, to `(H, W)`.

    Raises:
        DataError: no PNG, damaged, larger than MAX_PIXELS, or not eight bits of one channel.
    """
    try:
        if not data.startswith(_PNG) or len(data) < 26:
            raise ValueError("not a PNG")
        depth, color = data[24], data[25]
        if color == 3:  # OpenCV would replace the ids by their colours
            with _open_with_pillow(data) as image:
                return np.array(image)
        if (depth, color) != (8, 0):
            raise ValueError(
                f"bit depth {depth}, colour type {color}; a mask has 8 bits, 1 channel"
            )
        return _decode_png(data, cv2.IMREAD_UNCHANGED)
    except (ValueError, OSError, SyntaxError, cv2.error) as error:
        raise DataError(f"{key}: cannot decode the mask ({error}); prepare it again") from error


def decode_class(data: bytes, key: str) -> int:
    """The class id of a classification sample, stored as ASCII digits.

    Raises:
        DataError: anything else than digits.
    """
    if not data.isdigit():
        raise DataError(f"{key}: class {data[:40]!r} is not a number; prepare it again")
    return int(data)


def decode_labels(data: bytes, key: str) -> list[int]:
    """The class ids of a multi-label sample, stored as a JSON list.

    Raises:
        DataError: anything else than a list of numbers from 0.
    """
    try:
        labels: Any = json.loads(data)
    except ValueError as error:
        raise DataError(f"{key}: labels are not JSON ({error}); prepare it again") from None
    if not isinstance(labels, list) or not all(type(i) is int and i >= 0 for i in labels):
        raise DataError(f"{key}: labels {data[:40]!r} are no list of class ids; prepare it again")
    return labels


def _decode_jpeg(data: bytes, min_height: int, min_width: int) -> Pixels:
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(height, width)
        if colorspace in ("CMYK", "YCCK"):  # libjpeg-turbo does not turn these into RGB
            return _decode_other(data)
        return simplejpeg.decode_jpeg(data, "RGB", min_height=min_height, min_width=min_width)
    except (ValueError, KeyError):
        # libjpeg-turbo refuses what it can only warn about, stray bytes like missing halves of
        # images; Pillow tells them apart: it reads the first and raises on the second.
        return _decode_other(data)


def _decode_png(data: bytes, mode: int) -> Pixels:
    _check_size(*_png_size(data))
    array = cv2.imdecode(np.frombuffer(data, np.uint8), mode | cv2.IMREAD_IGNORE_ORIENTATION)
    if array is None:
        raise ValueError("damaged PNG")
    return array


def _decode_other(data: bytes) -> Pixels:
    """Whatever else Pillow reads."""
    with _open_with_pillow(data) as image:
        return np.array(image.convert("RGB"))


def _open_with_pillow(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError("not an image, or its header is damaged") from None
    _check_size(image.height, image.width)
    return image


def _png_size(data: bytes) -> tuple[int, int]:
    if len(data) < 26:
        raise ValueError("damaged PNG")
    width, height = struct.unpack(">II", data[16:24])
    return height, width


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"{height} x {width} pixels, more than the limit of {MAX_PIXELS}")
