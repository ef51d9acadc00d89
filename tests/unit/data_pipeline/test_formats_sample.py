import io

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_pipeline.archives import is_inside
from data_pipeline.errors import DataError
from data_pipeline.formats import sample
from data_pipeline.formats.sample import (
    check_image,
    make_key,
    read_mask,
    require_layout,
    segmentation_sample,
)
from data_pipeline.source_tree import SourceTree

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(format: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).convert(mode).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_every_colour_space_pass(mode: str):
    assert check_image(encoded("JPEG", mode), "x") == ("jpg", 30, 20)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16"])
def test_pngs_pass_and_are_told_by_content(mode: str):
    assert check_image(encoded("PNG", mode), "picture.jpg") == ("png", 30, 20)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_truncated_picture_is_found_though_its_header_is_whole(format: str):
    data = encoded(format)
    with pytest.raises(DataError, match=r"dir/x\.jpg: does not decode"):
        check_image(data[: len(data) * 2 // 3], "dir/x.jpg")


@pytest.mark.parametrize("data", [b"", b"GIF89a....", b"<html>"])
def test_other_content_is_refused(data: bytes):
    with pytest.raises(DataError, match="neither a JPEG nor a PNG"):
        check_image(data, "x.jpg")


def test_a_bomb_is_refused_before_it_unpacks(monkeypatch):
    data = encoded("PNG")
    unpacked = []
    monkeypatch.setattr(sample, "decode_image", lambda *_: unpacked.append(True))
    check_image(data, "x")
    assert len(unpacked) == 1
    monkeypatch.setattr(sample, "MAX_PIXELS", 599)
    with pytest.raises(DataError, match="30x20 is over the limit of 599 pixels"):
        check_image(data, "x")
    assert len(unpacked) == 1


def test_damage_that_pillow_overlooks_is_found():
    data = simplejpeg.encode_jpeg(np.kron(PICTURE, np.ones((8, 8, 1), np.uint8)))
    middle = len(data) // 2
    damaged = data[:middle] + bytes(200) + data[middle + 200 :]
    with Image.open(io.BytesIO(damaged)) as image:
        image.load()
    with pytest.raises(DataError, match=r"x\.jpg: does not decode: .*[Cc]orrupt JPEG data"):
        check_image(damaged, "x.jpg")


def test_pillows_own_bomb_limit_is_a_data_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="does not decode"):
        check_image(encoded("JPEG"), "x")


def test_a_palette_mask_is_read_as_indices_not_as_colours(tmp_path):
    ids = np.arange(64, dtype=np.uint8).reshape(8, 8)
    image = Image.fromarray(ids)
    image.putpalette(list(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8)))
    image.save(tmp_path / "m.png")
    assert np.array_equal(read_mask(str(tmp_path / "m.png")), ids)


def test_a_palette_of_four_bits_is_unpacked(tmp_path):
    ids = np.arange(16, dtype=np.uint8).reshape(2, 8)
    image = Image.fromarray(ids)
    image.putpalette(list(range(48)))
    image.save(tmp_path / "m.png", bits=4)
    assert np.array_equal(read_mask(str(tmp_path / "m.png")), ids)


def test_a_coloured_mask_is_refused(tmp_path):
    (tmp_path / "m.png").write_bytes(encoded("PNG"))
    with pytest.raises(DataError, match="mode RGB holds no class ids"):
        read_mask(str(tmp_path / "m.png"))


def test_a_jpeg_mask_is_refused(tmp_path):
    (tmp_path / "m.png").write_bytes(encoded("JPEG", "L"))
    with pytest.raises(DataError, match="JPEG of mode L"):
        read_mask(str(tmp_path / "m.png"))


def test_segmentation_sample_keeps_the_bytes_and_lists_the_labels(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(simplejpeg.encode_jpeg(PICTURE))
    mask = np.zeros((20, 30), np.uint8)
    mask[3:6], mask[10:] = 255, 7
    made = segmentation_sample("a", str(path), mask, 21)
    assert made.image == path.read_bytes()
    assert (made.width, made.height, made.labels) == (30, 20, (0, 7))
    decoded = cv2.imdecode(np.frombuffer(made.label, np.uint8), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(decoded, mask)


def test_segmentation_sample_refuses_other_sizes_and_unknown_ids(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(simplejpeg.encode_jpeg(PICTURE))
    with pytest.raises(DataError, match="30x20, but its mask is 20x30"):
        segmentation_sample("a", str(path), np.zeros((30, 20), np.uint8), 21)
    mask = np.zeros((20, 30), np.uint8)
    mask[0, :3] = 21, 254, 255
    with pytest.raises(DataError, match=r"unknown ids \[21, 254\]"):
        segmentation_sample("a", str(path), mask, 21)


def test_keys_have_no_dot_and_no_slash():
    assert make_key("a.b/c.d\\e") == "a_b_c_d_e"


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("a/b.jpg", True),
        ("a/../b.jpg", True),
        ("../b.jpg", False),
        ("a/../../b", False),
        ("/b", False),
    ],
)
def test_is_inside(path: str, inside: bool):
    assert is_inside(path) is inside


def test_a_wrong_layout_says_what_was_expected_and_found(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError, match=r"expected a, b; missing a, b; found: pictures"):
        require_layout(SourceTree(tmp_path), ["a", "b"])
    with pytest.raises(DataError, match="no such folder"):
        require_layout(SourceTree(tmp_path / "nowhere"), ["a"])
