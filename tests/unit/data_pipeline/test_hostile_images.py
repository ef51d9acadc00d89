"""Images that no data set should have: read as what they are or refused, never quietly wrong."""

import contextlib
import io
import os
import random
import struct
import subprocess
import sys
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_pipeline.decode import MAX_PIXELS, Pixels, decode_image, decode_image_scaled, decode_mask
from data_pipeline.errors import DataError

NOISE = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (120, 160, 3), dtype=np.uint8)
SMOOTH = cv2.GaussianBlur(NOISE, (0, 0), 5)
IDS = NOISE[..., 0]


def encode(pixels: Pixels | Image.Image, kind: str, **options: Any) -> bytes:
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def half(data: bytes) -> Pixels:
    return decode_image_scaled(data, "k", min_height=60, min_width=80)


def assert_close(decoded: Pixels, expected: Pixels, mean: float = 1.0) -> None:
    assert decoded.dtype == np.uint8
    assert decoded.shape == expected.shape
    assert np.abs(decoded.astype(int) - expected).mean() < mean


# What is odd and yet read.


def test_a_progressive_jpeg_is_read_as_a_sequential_one() -> None:
    data = encode(SMOOTH, "JPEG", quality=95, progressive=True)
    assert np.array_equal(
        decode_image(data, "k"), decode_image(encode(SMOOTH, "JPEG", quality=95), "k")
    )
    assert half(data).shape == (60, 80, 3)


def test_cmyk_and_ycck_are_read_as_pillow_reads_them() -> None:
    inks = Image.fromarray(SMOOTH).convert("CMYK")
    cmyk = encode(inks, "JPEG", quality=95)
    ycck = _with_adobe_transform(cmyk, 2)
    assert simplejpeg.decode_jpeg_header(ycck)[2] == "YCCK"
    for data in (cmyk, ycck):
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(decode_image(data, "k"), expected)
        assert np.array_equal(half(data), expected)


def _with_adobe_transform(data: bytes, transform: int) -> bytes:
    end = data.index(b"Adobe") + 12
    return data[: end - 1] + bytes([transform]) + data[end:]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA"])
def test_png_modes_become_rgb_without_alpha(mode: str) -> None:
    image = Image.fromarray(SMOOTH).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(IDS))
    decoded = decode_image(encode(image, "PNG"), "k")
    opaque = image.convert("RGBA").convert("RGB")  # drops alpha, blends nothing
    assert np.array_equal(decoded, np.asarray(opaque))


def test_a_transparent_colour_of_a_palette_stays_itself() -> None:
    image = Image.fromarray(SMOOTH).convert("P")
    data = encode(image, "PNG", transparency=int(np.asarray(image)[0, 0]))
    assert np.array_equal(decode_image(data, "k"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_become_eight(channels: int) -> None:
    deep = np.repeat(np.arange(0, 65536, 7, dtype=np.uint16)[None, :, None], channels, axis=2)
    decoded = decode_image(cv2.imencode(".png", np.tile(deep, (3, 1, 1)))[1].tobytes(), "k")
    assert np.abs(decoded[0] - deep[0, :, :1] / 257).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_stay_as_stored_whatever_exif_says(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    for kind, decode in (("JPEG", decode_image), ("PNG", decode_image), ("WEBP", decode_image)):
        data = encode(SMOOTH, kind, quality=95, exif=exif)
        assert_close(decode(data, "k"), SMOOTH, mean=3)
    assert np.array_equal(decode_mask(encode(IDS, "PNG", exif=exif), "k"), IDS)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_the_content_decides_not_the_name(kind: str) -> None:
    data = encode(SMOOTH, kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_image(data, "named.jpg"), expected)
    assert np.array_equal(half(data), expected)
    with pytest.raises(DataError, match=r"bird17: cannot decode the mask \(not a PNG"):
        decode_mask(data, "bird17")


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1)])
def test_thin_images(shape: tuple[int, int]) -> None:
    pixels = np.full((*shape, 3), 77, np.uint8)
    for kind in ("JPEG", "PNG"):
        data = encode(pixels, kind)
        assert_close(decode_image(data, "k"), pixels)
        assert_close(
            decode_image_scaled(data, "k", min_height=1, min_width=1)[:1, :1], pixels[:1, :1]
        )
    assert decode_mask(encode(pixels[..., 0], "PNG"), "k").shape == shape


# Warnings of libjpeg about headers.


def test_warnings_about_headers_do_not_matter() -> None:
    data = encode(SMOOTH, "JPEG", quality=95)
    whole = decode_image(data, "k")
    scan = data.index(b"\xff\xda")
    for odd in (
        data.replace(b"JFIF\x00\x01\x01", b"JFIF\x00\x07\x07", 1),
        data[: scan + 11]
        + b"\x05"
        + data[scan + 12 :],  # the spectral selection, of no meaning here
        *(
            data[:at] + b"\x00\x00" + data[at:]
            for at in (data.index(b"\xff\xdb"), data.index(b"\xff\xc0"))
        ),
    ):
        with pytest.raises(ValueError, match=r"JFIF revision|SOS parameters|extraneous bytes"):
            simplejpeg.decode_jpeg(odd)
        assert np.array_equal(decode_image(odd, "k"), whole)
        assert half(odd).shape in ((60, 80, 3), (120, 160, 3))


# What is refused.


@pytest.mark.parametrize("progressive", [False, True])
def test_damage_inside_the_pixels_of_a_jpeg_is_refused(progressive: bool) -> None:
    data = encode(NOISE, "JPEG", quality=90, progressive=progressive)
    middle = len(data) // 2
    zeros = data[:middle] + bytes(200) + data[middle + 200 :]
    with Image.open(io.BytesIO(zeros)) as image:
        image.load()  # Pillow sees nothing wrong
    with pytest.raises(DataError, match=r"bird17: cannot decode the image .*[Cc]orrupt JPEG data"):
        decode_image(zeros, "bird17")
    with pytest.raises(DataError, match="bird17: cannot decode the image"):
        decode_image_scaled(zeros, "bird17", min_height=60, min_width=80)


def test_damage_inside_a_cmyk_jpeg_is_refused() -> None:
    data = encode(Image.fromarray(NOISE).convert("CMYK"), "JPEG", quality=90)
    middle = len(data) // 2
    with pytest.raises(DataError, match=r"cannot decode the image .*orrupt JPEG data"):
        decode_image(data[:middle] + bytes(200) + data[middle + 200 :], "k")


@pytest.mark.parametrize("mode", ["L", "P"])
def test_one_flipped_bit_of_a_mask_is_refused(mode: str) -> None:
    areas = np.kron(IDS[:20, :20] % 21, np.ones((16, 16), np.uint8))
    data = encode(Image.fromarray(areas).convert(mode), "PNG")
    rng = random.Random(0)
    start, overlooked = data.index(b"IDAT") + 4, 0
    for _ in range(60):
        at = rng.randrange(start, len(data) - 20)
        flipped = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        with contextlib.suppress(OSError, SyntaxError), Image.open(io.BytesIO(flipped)) as image:
            image.load()
            overlooked += 1
        with pytest.raises(DataError, match="bird17: cannot decode the mask"):
            decode_mask(flipped, "bird17")
    assert overlooked > 0  # by Pillow left to itself


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"<html><body>404 Not Found</body></html>", "begins with b'<html>"),
        (b"\xff\xd8", "begins with"),
        (b"\xff\xd8\xff\xe0", "begins with"),
        (b"\x89PNG\r\n\x1a\n", "damaged PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (bytes(100), "not an image"),
    ],
)
def test_what_is_no_image_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"bird17: cannot decode the image .*{message}"):
        decode_image(data, "bird17")
    with pytest.raises(DataError, match="bird17: cannot decode the mask"):
        decode_mask(data, "bird17")


def test_deep_tiffs_are_refused_as_their_values_would_be_cut_off() -> None:
    data = encode(np.full((4, 4), 40_000, np.uint16), "TIFF")
    with pytest.raises(DataError, match="TIFF of mode I;16"):
        decode_image(data, "k")


@pytest.mark.parametrize("orientation", range(2, 9))
def test_turned_tiffs_are_refused_as_pillow_would_turn_them_off_their_masks(
    orientation: int,
) -> None:
    data = encode(NOISE, "TIFF", tiffinfo={274: orientation})
    with pytest.raises(DataError, match=f"TIFF of orientation {orientation}; store"):
        decode_image(data, "k")
    upright = encode(NOISE, "TIFF", tiffinfo={274: 1})
    assert np.array_equal(decode_image(upright, "k"), NOISE)


def _png_claiming(height: int, width: int, color: int = 0) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
    )


def _jpeg_claiming(height: int, width: int) -> bytes:
    data = encode(SMOOTH, "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def _claiming(kind: str, side: int) -> bytes:
    """An image whose header claims `side` x `side` pixels: little-endian in all three formats."""
    offset = {"BMP": 18, "GIF": 6, "TIFF": None}[kind]
    data = encode(SMOOTH, kind)
    if offset is None:
        small = {256: 160, 257: 120}
        for tag, value in small.items():
            old, new = (struct.pack("<HHIHH", tag, 3, 1, v, 0) for v in (value, side))
            old4, new4 = (struct.pack("<HHII", tag, 4, 1, v) for v in (value, side))
            data = data.replace(old, new).replace(old4, new4)
        return data
    form = "<ii" if kind == "BMP" else "<HH"
    size = struct.pack(form, side, side)
    return data[:offset] + size + data[offset + len(size) :]


BOMBS = {
    "PNG": _png_claiming(100_000, 100_000),
    "palette PNG": _png_claiming(100_000, 100_000, 3),
    "JPEG": _jpeg_claiming(65_000, 65_000),
    "BMP": _claiming("BMP", 100_000),
    "small BMP": _claiming("BMP", 15_000),
    "GIF": _claiming("GIF", 60_000),
    "TIFF": _claiming("TIFF", 60_000),
}


@pytest.mark.parametrize("limit_of_pillow", [Image.MAX_IMAGE_PIXELS, None])
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_by_their_header(
    name: str, limit_of_pillow: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit_of_pillow)
    assert MAX_PIXELS < 60_000**2
    for module, function in (
        (simplejpeg, "decode_jpeg"),
        (cv2, "imdecode"),
        (Image.Image, "convert"),
        (Image.Image, "load"),
    ):
        monkeypatch.setattr(module, function, lambda *_, **__: pytest.fail("decoded a bomb"))
    with pytest.raises(DataError, match=r"k: .*(limit of|exceeds limit|larger than)"):
        decode_image(BOMBS[name], "k")
    with pytest.raises(DataError, match=r"cannot decode the mask"):
        decode_mask(BOMBS[name], "k")


_FUZZ = """
import random, sys
from pathlib import Path
from data_pipeline.decode import decode_image, decode_image_scaled, decode_mask
from data_pipeline.errors import DataError
rng = random.Random(0)
refused = 0
for path in sorted(Path(sys.argv[1]).iterdir()):
    whole = path.read_bytes()
    for _ in range(60):
        data = bytearray(whole)
        if rng.random() < 0.7:
            for _ in range(rng.choice([1, 4, 50])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            at = rng.randrange(len(data))
            data[at : at + rng.choice([1, 300, len(data)])] = b""
        data = bytes(data)
        for decode in (decode_image, decode_mask):
            try:
                decode(data, "k")
            except DataError:
                refused += 1
        try:
            decode_image_scaled(data, "k", min_height=100, min_width=100)
        except DataError:
            refused += 1
print(refused)
"""


def test_no_damage_crashes_or_raises_anything_else(tmp_path: Any) -> None:
    """In a process of its own, as a crash would be one of the decoders'."""
    pixels = cv2.resize(SMOOTH, (500, 375))
    folder = tmp_path / "images"
    folder.mkdir()
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"):
        (folder / kind).write_bytes(encode(pixels, kind))
    (folder / "progressive").write_bytes(encode(pixels, "JPEG", progressive=True))
    (folder / "cmyk").write_bytes(encode(Image.fromarray(pixels).convert("CMYK"), "JPEG"))
    (folder / "palette").write_bytes(encode(Image.fromarray(pixels).convert("P"), "PNG"))
    (folder / "mask").write_bytes(encode(pixels[..., 0], "PNG"))
    done = subprocess.run(
        [sys.executable, "-c", _FUZZ, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 600
