"""Decoding: what comes in is what was encoded, and what cannot be decoded is named."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_pipeline.decode import (
    MAX_PIXELS,
    decode_class,
    decode_image,
    decode_image_scaled,
    decode_labels,
    decode_mask,
)
from data_pipeline.errors import DataError

NOISE = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (120, 160, 3), dtype=np.uint8)
SMOOTH = cv2.GaussianBlur(NOISE, (0, 0), 5)
IDS = NOISE[..., 0]


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_header(height: int, width: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
    )


def assert_close(decoded: np.ndarray, expected: np.ndarray, mean: float = 1.0) -> None:
    assert decoded.shape == expected.shape
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - expected).mean() < mean


def test_jpeg_is_rgb() -> None:
    data = encode(Image.fromarray(SMOOTH), "JPEG", quality=95)
    assert_close(decode_image(data, "k"), SMOOTH)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_jpegs_become_rgb(mode: str) -> None:
    image = Image.fromarray(SMOOTH).convert(mode)
    data = encode(image, "JPEG", quality=95)
    assert_close(decode_image(data, "k"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_pngs_become_rgb(mode: str) -> None:
    image = Image.fromarray(NOISE).convert(mode)
    decoded = decode_image(encode(image, "PNG"), "k")
    assert np.array_equal(decoded, np.asarray(image.convert("RGB")))


def test_sixteen_bits_become_eight() -> None:
    deep = (np.arange(256 * 256, dtype=np.uint32).reshape(256, 256)).astype(np.uint16)
    decoded = decode_image(cv2.imencode(".png", deep)[1].tobytes(), "k")
    assert np.abs(decoded[..., 1] - deep / 257).max() <= 1


def test_the_orientation_tag_is_not_applied() -> None:
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    image = Image.fromarray(SMOOTH)
    assert_close(decode_image(encode(image, "JPEG", quality=95, exif=exif), "k"), SMOOTH)
    assert_close(decode_image(encode(image, "PNG", exif=exif), "k"), SMOOTH)


def test_stray_bytes_are_read_as_pillow_reads_them() -> None:
    data = encode(Image.fromarray(SMOOTH), "JPEG", quality=95)
    marker = data.index(b"\xff\xc0")
    stray = data[:marker] + b"\x00\x00\x00" + data[marker:]
    with pytest.raises(ValueError, match="xtraneous"):
        simplejpeg.decode_jpeg(stray)
    assert_close(decode_image(stray, "k"), SMOOTH)


@pytest.mark.parametrize(
    ("minimum", "expected"),
    [
        ((0, 0), (120, 160)),
        ((60, 80), (60, 80)),
        ((50, 50), (60, 80)),
        ((61, 10), (75, 100)),
        ((500, 500), (120, 160)),
    ],
)
def test_scaled_decoding_is_no_smaller_than_asked(
    minimum: tuple[int, int], expected: tuple[int, int]
) -> None:
    data = encode(Image.fromarray(SMOOTH), "JPEG", quality=95)
    decoded = decode_image_scaled(data, "k", min_height=minimum[0], min_width=minimum[1])
    size = (expected[1], expected[0])
    assert_close(decoded, cv2.resize(SMOOTH, size, interpolation=cv2.INTER_AREA), mean=2.0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.9])
def test_truncated_images_are_named(kind: str, share: float) -> None:
    data = encode(Image.fromarray(SMOOTH), kind)
    with pytest.raises(DataError, match="bird17: cannot decode the image"):
        decode_image(data[: int(len(data) * share)], "bird17")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
@pytest.mark.parametrize("mode", ["L", "P"])
def test_truncated_masks_are_named(mode: str, share: float) -> None:
    data = encode(Image.fromarray(IDS).convert(mode), "PNG")
    with pytest.raises(DataError, match="bird17: cannot decode the mask"):
        decode_mask(data[: int(len(data) * share)], "bird17")


def test_bombs_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((simplejpeg, "decode_jpeg"), (cv2, "imdecode"), (Image.Image, "convert")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("decoded a bomb"))
    header = simplejpeg.encode_jpeg(SMOOTH)
    start = header.index(b"\xff\xc0") + 5
    bomb = header[:start] + struct.pack(">HH", 14_000, 14_000) + header[start + 4 :]
    assert MAX_PIXELS < 14_000**2
    for data in (bomb, png_header(14_000, 14_000)):
        with pytest.raises(DataError, match=r"k: .*(limit of|exceeds limit)"):
            decode_image(data, "k")
    with pytest.raises(DataError, match="limit of"):
        decode_mask(png_header(14_000, 14_000), "k")


@pytest.mark.parametrize("mode", ["L", "P"])
def test_masks_are_class_ids_whatever_the_palette(mode: str) -> None:
    image = Image.fromarray(IDS)
    if mode == "P":
        image = image.convert("P")
        image.putpalette([255 - i // 3 for i in range(768)])
    decoded = decode_mask(encode(image, "PNG"), "k")
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, IDS)


def test_small_palettes_keep_their_ids() -> None:
    ids = IDS % 4
    image = Image.fromarray(ids).convert("P")
    image.putpalette([9, 9, 9] * 4)
    assert np.array_equal(decode_mask(encode(image, "PNG", bits=2), "k"), ids)


def test_masks_of_another_kind_are_refused() -> None:
    with pytest.raises(DataError, match="8 bits, 1 channel"):
        decode_mask(encode(Image.fromarray(NOISE), "PNG"), "k")
    with pytest.raises(DataError, match="not a PNG"):
        decode_mask(encode(Image.fromarray(IDS), "JPEG"), "k")


def chunk(name: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + checksum


def unfiltered_png(ids: np.ndarray, parts: int = 1, first: int = 0) -> bytes:
    """A grey PNG without filters, its pixels in some chunks; `first`: of the first row's filter."""
    rows = np.pad(ids, ((0, 0), (1, 0)))
    rows[0, 0] = first
    packed = zlib.compress(rows.tobytes())
    size = len(packed) // parts + 1
    chunks = [chunk(b"IDAT", packed[i : i + size]) for i in range(0, len(packed), size)]
    text = chunk(b"tEXt", b"Comment\0none")
    return png_header(*ids.shape) + text + b"".join(chunks) + chunk(b"IEND", b"")


@pytest.mark.parametrize("parts", [1, 5])
def test_masks_without_filters_are_read(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = unfiltered_png(IDS, parts)
    assert np.array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED), IDS)
    monkeypatch.setattr(cv2, "imdecode", None)  # libpng is not asked
    decoded = decode_mask(data, "k")
    assert np.array_equal(decoded, IDS)
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable


@pytest.mark.parametrize("name", ["NONE", "SUB", "UP", "AVG", "PAETH"])
def test_masks_are_read_whatever_their_filter(name: str) -> None:
    how = [cv2.IMWRITE_PNG_FILTER, getattr(cv2, f"IMWRITE_PNG_FILTER_{name}")]
    assert np.array_equal(decode_mask(cv2.imencode(".png", IDS, how)[1].tobytes(), "k"), IDS)


def test_a_single_filtered_row_is_seen() -> None:
    undone = IDS.copy()
    undone[0] = np.cumsum(IDS[0], dtype=np.uint8)  # filter 1: each is a difference to its left
    assert np.array_equal(decode_mask(unfiltered_png(IDS, first=1), "k"), undone)


def test_flipped_bits_of_a_mask_without_filters_are_refused() -> None:
    data = bytearray(unfiltered_png(IDS))
    for position in (20, 60, len(data) // 2, len(data) - 20):
        data[position] ^= 4
        with pytest.raises(DataError, match="bird17: cannot decode the mask"):
            decode_mask(bytes(data), "bird17")
        data[position] ^= 4


def test_pixels_beyond_the_size_are_not_unpacked() -> None:
    """A bomb: a small header over a stream of a gigabyte, of which libpng takes what it needs."""
    packed = zlib.compressobj(9)
    zeros = b"".join(packed.compress(bytes(1 << 20)) for _ in range(64)) + packed.flush()
    data = png_header(4, 4) + chunk(b"IDAT", zeros) + chunk(b"IEND", b"")
    assert decode_mask(data, "k").shape == (4, 4)


def test_classes_and_labels() -> None:
    assert decode_class(b"207", "k") == 207
    assert decode_labels(b"[3, 0, 79]", "k") == [3, 0, 79]
    assert decode_labels(b"[]", "k") == []


@pytest.mark.parametrize("data", [b"", b"-1", b"cat", b"1.5", "²".encode("latin-1")])
def test_what_is_no_class_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"bird17: class .* is not a number"):
        decode_class(data, "bird17")


@pytest.mark.parametrize("data", [b"", b"{}", b"[-1]", b"[true]", b'["1"]', b"[1", b"\xff"])
def test_what_is_no_list_of_labels_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="bird17: labels"):
        decode_labels(data, "bird17")


@pytest.mark.data
def test_real_voc_pairs_decode_as_pillow_does() -> None:
    root = Path(os.environ.get("ATROUS_TEST_DATA", "")) / "VOCdevkit/VOC2012"
    if "ATROUS_TEST_DATA" not in os.environ or not root.is_dir():
        pytest.skip("ATROUS_TEST_DATA does not name a folder with VOCdevkit/VOC2012")
    for path in sorted((root / "SegmentationClass").glob("*.png"))[:20]:
        image = root / "JPEGImages" / f"{path.stem}.jpg"
        mask = decode_mask(path.read_bytes(), path.stem)
        assert np.array_equal(mask, np.asarray(Image.open(path)))
        assert_close(decode_image(image.read_bytes(), path.stem), np.asarray(Image.open(image)))
        assert mask.shape == np.asarray(Image.open(image)).shape[:2]
