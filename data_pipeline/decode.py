"""Encoded bytes to arrays. The decoders release the GIL, so threads are enough.

An EXIF orientation is not applied, neither here nor in preparation: masks and sizes in the manifest
describe the pixels as stored, and a turned image would no longer lie under its mask.

Damage is an error, also where a decoder could go on: libjpeg fills what it cannot read with grey or
with what it takes the rest of the data for, and only warns (docs/log.md).
"""

import io
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from zlib_ng import zlib_ng

from data_pipeline.errors import DataError

Pixels = NDArray[np.uint8]

MAX_PIXELS = 178_956_970  # Pillow's own limit; 0.5 GB of RGB
_JPEG = b"\xff\xd8"
_PNG = b"\x89PNG\r\n\x1a\n"
# Few and harmless ones only: others of Pillow's start programs (EPS) or are hardly ever read.
_PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
_ORIENTATION = 274  # the tag, in EXIF and TIFF


def decode_image(data: bytes, key: str) -> Pixels:
    """Decode an image to RGB `(H, W, 3)`.

    JPEG and PNG, and what Pillow reads of BMP, GIF (first frame), PPM, TIFF and WebP; the content
    decides, not the name. Sixteen bits of a PNG are reduced to eight, grey becomes three equal
    channels, alpha is dropped.

    Raises:
        DataError: damaged, of an unknown format, or larger than MAX_PIXELS.
    """
    return decode_image_scaled(data, key, min_height=0, min_width=0)


def decode_image_scaled(data: bytes, key: str, *, min_height: int, min_width: int) -> Pixels:
    """Decode an image to RGB `(H, W, 3)`, no smaller than the given size (as far as the image is).

    A JPEG that is larger is reduced while decoding to a number of eighths, which spares resampling
    it. 0 asks for the full size.

    Raises:
        DataError: damaged, of an unknown format, or larger than MAX_PIXELS.
    """
    with _naming("image", key):
        if data.startswith(_JPEG):
            return _decode_jpeg(data, min_height, min_width)
        if data.startswith(_PNG):
            return cv2.cvtColor(_decode_png(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        return _decode_other(data)


def decode_mask(data: bytes, key: str) -> Pixels:
    """Decode a PNG of class ids, grey or palette, to `(H, W)`.

    Raises:
        DataError: no PNG, damaged, larger than MAX_PIXELS, or not eight bits of one channel.
    """
    with _naming("mask", key):
        if not data.startswith(_PNG):
            raise ValueError(f"not a PNG, it {_beginning(data)}")
        _check_size(*_png_size(data))
        depth, color = data[24], data[25]
        if color == 3:  # OpenCV would replace the ids by their colours
            return _decode_palette(data)
        if (depth, color) != (8, 0):
            raise ValueError(
                f"bit depth {depth}, colour type {color}; a mask has 8 bits, 1 channel"
            )
        mask = _decode_unfiltered(data)
        return _decode_png(data, cv2.IMREAD_UNCHANGED) if mask is None else mask


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


@contextmanager
def _naming(what: str, key: str) -> Iterator[None]:
    """Say of which sample it was that a decoder complained."""
    try:
        yield
    except (ValueError, cv2.error) as error:
        raise DataError(f"{key}: cannot decode the {what} ({error}); prepare it again") from error


def _decode_jpeg(data: bytes, min_height: int, min_width: int) -> Pixels:
    try:
        height, width, stored, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):
        # Warnings about a header leave the pixels as they are, and some kinds of subsampling are
        # just unknown to TurboJPEG; Pillow raises where a header is really damaged.
        return _decode_other(data)
    _check_size(height, width)
    if stored in ("CMYK", "YCCK"):
        simplejpeg.decode_jpeg(data, "CMYK")  # for its errors: Pillow does not see all damage
        return _decode_other(data)  # libjpeg-turbo does not turn these into RGB
    how = {"min_height": min_height, "min_width": min_width}
    try:
        return simplejpeg.decode_jpeg(data, **how)
    except ValueError as error:
        if "Invalid SOS parameters" not in str(error):  # they have no meaning outside progressive
            raise
        return simplejpeg.decode_jpeg(data, **how, strict=False)


def _decode_png(data: bytes, mode: int) -> Pixels:
    _check_size(*_png_size(data))
    array = cv2.imdecode(np.frombuffer(data, np.uint8), mode | cv2.IMREAD_IGNORE_ORIENTATION)
    if array is None:
        raise ValueError("damaged PNG")
    return array


def _decode_unfiltered(data: bytes) -> Pixels | None:
    """The pixels of a grey PNG as preparation writes masks, in a tenth of libpng's time.

    None: rows are filtered or interlaced, or a check fails; libpng then decides.
    """
    height, width = _png_size(data)
    pixels = zlib_ng.decompressobj()
    try:
        raw = pixels.decompress(b"".join(_png_pixels(data)), height * (width + 1) + 1)
    except zlib_ng.error:  # type: ignore[misc]  # a class; its stub says otherwise
        return None
    if data[28] != 0 or not pixels.eof or len(raw) != height * (width + 1):
        return None
    rows = np.frombuffer(raw, np.uint8).reshape(height, width + 1)  # the first byte: the filter
    return None if rows[:, 0].any() else np.ascontiguousarray(rows[:, 1:])


def _png_pixels(data: bytes) -> Iterator[bytes]:
    """The compressed pixels, chunk by chunk; nothing more from one that is damaged on."""
    position = len(_PNG)
    while position + 12 <= len(data):
        end = position + 8 + struct.unpack_from(">I", data, position)[0]
        chunk = data[position + 4 : end]  # its name and content; four bytes of checksum follow
        if zlib_ng.crc32(chunk).to_bytes(4, "big") != data[end : end + 4]:
            return
        if chunk.startswith(b"IDAT"):
            yield chunk[4:]
        position = end + 4


def _decode_palette(data: bytes) -> Pixels:
    """The palette's indices. Pillow compares checksums only when it is asked to."""
    with _pillow_errors():
        _open_with_pillow(data).verify()
        return np.array(_open_with_pillow(data))


def _decode_other(data: bytes) -> Pixels:
    """What only Pillow reads."""
    with _pillow_errors():
        image = _open_with_pillow(data)
        if image.mode.startswith(("I", "F")):  # its conversion would cut off what is above 255
            raise ValueError(f"{image.format} of mode {image.mode}; 8 bits a channel are read")
        return np.array(image.convert("RGB"))


def _open_with_pillow(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"not an image, or its header is damaged; it {_beginning(data)}") from None
    _check_size(image.height, image.width)
    require_upright(image)
    return image


def require_upright(image: Image.Image) -> None:
    """Refuse a TIFF that says it is turned: Pillow turns the pixels, which no mask follows.

    Raises:
        ValueError: it has an orientation other than 1.
    """
    turned = image.getexif().get(_ORIENTATION, 1) if image.format == "TIFF" else 1
    if turned != 1:
        raise ValueError(f"TIFF of orientation {turned}; store its pixels upright")


@contextmanager
def _pillow_errors() -> Iterator[None]:
    """Pillow's parsers raise OSError, SyntaxError, struct.error and more on damaged files."""
    try:
        yield
    except (MemoryError, ValueError):
        raise
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _beginning(data: bytes) -> str:
    return f"begins with {data[:16]!r}" if data else "is empty"


def _png_size(data: bytes) -> tuple[int, int]:
    if len(data) < 26:
        raise ValueError("damaged PNG")
    width, height = struct.unpack(">II", data[16:24])
    return height, width


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"{height} x {width} pixels, more than the limit of {MAX_PIXELS}")
