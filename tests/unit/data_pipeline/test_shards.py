import hashlib
import subprocess
import tarfile
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
import webdataset as wds

from data_pipeline.formats.sample import Sample
from data_pipeline.shards import write_shard
from data_pipeline.storage import LocalStorage


def make(key: str, width: int = 8, label: bytes = b"3", extension: str = "cls") -> Sample:
    picture = np.random.default_rng(width).integers(0, 256, (7, width, 3), dtype=np.uint8)
    return Sample(
        key=key,
        image=simplejpeg.encode_jpeg(picture),
        image_extension="jpg",
        label=label,
        label_extension=extension,
        width=width,
        height=7,
        labels=(3,),
    )


# The last two need a PAX header: longer than ustar's field, and not ASCII.
KEYS = ["a", "b_c", "x" * 150, "straße"]


def test_rows_point_at_the_payloads_and_spans_are_contiguous(tmp_path):
    samples = [make(key, 8 + 3 * i, b"3" * (i + 1)) for i, key in enumerate(KEYS)]
    shard, rows = write_shard(LocalStorage(tmp_path), "shard-000000.tar", samples)
    data = (tmp_path / shard.name).read_bytes()
    end = 0
    for sample, row in zip(samples, rows.to_pylist(), strict=True):
        assert row["offset"] == end
        end += row["size"]
        assert zlib.crc32(data[row["offset"] : end]) == row["crc32"]
        assert data[row["image_offset"] :][: row["image_size"]] == sample.image
        assert data[row["label_offset"] :][: row["label_size"]] == sample.label
        assert row["offset"] < row["image_offset"] < row["label_offset"] < end
        assert (row["key"], row["width"], row["height"], row["labels"]) == (
            sample.key,
            sample.width,
            7,
            [3],
        )
    assert not data[end:].strip(b"\0")
    assert shard.num_samples == len(samples)
    assert shard.size == len(data)
    assert shard.sha256 == hashlib.sha256(data).hexdigest()


def test_headers_are_plain_and_other_readers_agree(tmp_path):
    shard, _ = write_shard(LocalStorage(tmp_path), "s.tar", [make(key) for key in KEYS])
    names = [f"{key}.{extension}" for key in KEYS for extension in ("jpg", "cls")]
    with tarfile.open(tmp_path / "s.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == names
        for member in members:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert (member.uname, member.gname) == ("", "")
    listed = subprocess.run(
        ["tar", "tf", tmp_path / "s.tar"], capture_output=True, check=True
    ).stdout
    assert len(listed.splitlines()) == len(names)
    assert shard.size % tarfile.RECORDSIZE == 0


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_shard(LocalStorage(tmp_path / name), "s.tar", [make(key) for key in KEYS])
    assert (tmp_path / "a/s.tar").read_bytes() == (tmp_path / "b/s.tar").read_bytes()


def test_webdataset_reads_it(tmp_path):
    mask = np.arange(77, dtype=np.uint8).reshape(7, 11)
    png = cv2.imencode(".png", mask)[1].tobytes()
    write_shard(
        LocalStorage(tmp_path),
        "s.tar",
        [
            make("a", 8),
            make("b", 9, b"12"),
            make("c", 10, b"[1, 5]", "json"),
            make("d", 11, png, "seg.png"),
        ],
    )
    read = list(wds.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False).decode("pil"))
    assert [entry["__key__"] for entry in read] == ["a", "b", "c", "d"]
    assert [entry["jpg"].size for entry in read] == [(8, 7), (9, 7), (10, 7), (11, 7)]
    assert (read[0]["cls"], read[1]["cls"], read[2]["json"]) == (3, 12, [1, 5])
    assert np.array_equal(np.asarray(read[3]["seg.png"])[..., 0], mask)


def test_a_failure_leaves_nothing_behind(tmp_path):
    def broken():
        yield make("a")
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        write_shard(LocalStorage(tmp_path), "s.tar", broken())
    assert list(tmp_path.iterdir()) == []
