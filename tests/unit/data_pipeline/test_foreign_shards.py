"""What is found in a shard that others wrote, and what is wrong with it."""

import tarfile
import tempfile
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dataset import open_dataset
from data_pipeline.errors import DataError
from data_pipeline.manifest import FILE_NAME
from tests.unit.data_pipeline.foreign import (
    index,
    jpeg,
    labelled,
    mask,
    pack,
    picture,
    png,
    tiff,
    write,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["jpg", "CLS", "x.cls", "txt"]))))
def test_any_order_of_members_is_grouped_as_webdataset_does(members):
    content = {"jpg": jpeg(1), "CLS": b"1"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "raw/x.tar")
        pack(path, [(f"d/{key}.{kind}", content.get(kind, b"?")) for key, kind in members])
        try:
            theirs = [
                entry["__key__"]
                for entry in wds.WebDataset(str(path), shardshuffle=False, empty_check=False)
                if {"jpg", "cls"} <= entry.keys()
            ]
        except ValueError as error:  # it stops at a sample with two members of one extension
            if "duplicate" not in str(error):
                raise
            return
        if not theirs:
            with pytest.raises(DataError):
                index(path, folder, on_broken="skip")
            return
        manifest = index(path, folder, on_broken="skip")
        assert manifest.read_rows(0)["key"].to_pylist() == theirs


JPEG, CLASS, MASK = ("a.jpg", jpeg(1)), ("a.cls", b"1"), ("a.png", png(mask(1)))
BROKEN: Mapping[str, tuple[str, list[tuple[str, bytes]], str]] = {
    "no picture": ("classification", [CLASS], r"a: no picture \(jpg, jpeg, png, webp\); .*cls"),
    "no label": ("classification", [JPEG], r"a: no label \(cls\); it has jpg"),
    "no mask": ("segmentation", [MASK], "a: no label"),
    "twice": ("classification", [JPEG, CLASS, ("a.JPG", jpeg(2))], r"two members \.jpg"),
    "apart": ("classification", [JPEG, ("b.txt", b""), CLASS], "no label"),
    "picture": ("classification", labelled(image=b"<html>"), "a: no image: it begins"),
    "empty": ("classification", labelled(image=b""), "a: no image: it is empty"),
    "turned": ("classification", labelled(image=tiff(orientation=3)), "a: no image: TIFF of orien"),
    "unknown": ("classification", labelled(b"5"), r"a\.cls: unknown labels 5; there are 5 classes"),
    "name": ("classification", labelled(b"yak"), "unknown labels yak"),
    "two": ("classification", labelled(b"1,2"), "2 labels; classification takes exactly one"),
    "none": ("classification", labelled(b""), "0 labels; classification"),
    "binary": ("classification", labelled(b"\x80\x04\xff"), r"a\.cls: labels cannot be read"),
    "json": ("multilabel", [JPEG, ("a.json", b"{")], r"a\.json: labels cannot"),
    "ids": ("segmentation", [JPEG, ("a.png", png(mask(1, 9)))], r"ids \[5, 6, 7, 8\]"),
    "size": ("segmentation", [("a.jpg", jpeg(1, width=9)), MASK], "9x24, but its mask is 33x24"),
    "colours": ("segmentation", [JPEG, ("a.png", png(picture(1)))], "a mask has 8 bits"),
}  # fmt: skip


@pytest.mark.parametrize(("task", "members", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_samples_are_named_or_left_out(tmp_path, task, members, message):
    whole = [(f"z/{name}", data) for name, data in _whole(task)]
    pack(tmp_path / "raw/x.tar", [*members, *whole])
    with pytest.raises(DataError, match=rf"train: \d broken(.|\n)*x\.tar: {message}|{message}"):
        index(tmp_path / "raw", tmp_path / "data", task)
    assert not (tmp_path / "data/foreign/train" / FILE_NAME).exists()
    manifest = index(tmp_path / "raw", tmp_path / "data", task, on_broken="skip")
    assert manifest.num_samples == 1
    assert manifest.source["skipped"] == len(manifest.source["skipped_items"]) > 0
    assert open_dataset(tmp_path / "data", "foreign", "train").read(0, 0).key == "z/a"


def _whole(task: str) -> Iterator[tuple[str, bytes]]:
    yield "a.jpg", jpeg(1)
    if task == "segmentation":
        yield "a.seg.png", png(mask(1))
    yield ("a.cls", b"1") if task == "classification" else ("a.json", b'["bee"]')


@pytest.mark.parametrize("damage", ["cut", "header", "no end"])
def test_damaged_tars_are_errors_or_end_at_the_damage(tmp_path, damage):
    write(tmp_path / "raw", "classification", (6, 3))
    path = tmp_path / "raw/000.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        fourth = next(info for info in tar if info.name.startswith("part0/0003"))
        last = tar.getmembers()[-1]
    if damage == "cut":
        data = data[: fourth.offset_data + 700]
    elif damage == "header":
        data[fourth.offset + 10 : fourth.offset + 300] = b"?" * 290
    else:
        data = data[: last.offset_data + last.size + -last.size % 512]
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"000\.tar: not a whole tar archive .*copy it again"):
        index(tmp_path / "raw", tmp_path / "data")
    manifest = index(tmp_path / "raw", tmp_path / "data", on_broken="skip")
    assert manifest.source["skipped"] == 1
    assert [shard.num_samples for shard in manifest.shards] == [5 if damage == "no end" else 2, 3]
    dataset = open_dataset(tmp_path / "data", "foreign", "train")
    assert dataset.read(0, 1).key == "part1/0001"


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    pack(tmp_path / "raw/x.tar", [*labelled(), (name, jpeg(1))])
    with pytest.raises(DataError, match="would lie outside of it"):
        index(tmp_path / "raw", tmp_path / "data", on_broken="skip")


def test_odd_members_are_passed_over_as_webdataset_does(tmp_path):
    path = tmp_path / "raw/x.tar"
    pack(
        path,
        [
            ("__meta__/about.json", b"{}"), ("__info__", b""), ("LICENSE", b"free"),
            ("./d.1/a.JPEG", jpeg(1)), ("./d.1/._a.jpg", b"mac"), ("./d.1/a.cls", b"1\n"),
            ("b.v2.jpg", jpeg(3)), ("b.jpg", jpeg(2)), ("b.cls", b"ant"),
            (f"{'long' * 40}/ü.png", png(picture(3))), (f"{'long' * 40}/ü.cls", b"2"),
        ],
    )  # fmt: skip
    with tarfile.open(path, "a") as tar:
        folder, link = tarfile.TarInfo("folder.jpg"), tarfile.TarInfo("link.jpg")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(folder)
        tar.addfile(link)
    index(tmp_path / "raw", tmp_path / "data")
    dataset = open_dataset(tmp_path / "data", "foreign", "train")
    found = {(raw.key, raw.label) for raw in (dataset.read(0, row) for row in range(3))}
    assert found == {("./d.1/a", b"1"), ("b", b"0"), (f"{'long' * 40}/ü", b"2")}
    assert dataset.read(0, 1).image == jpeg(2)


def test_members_that_nobody_asked_for_take_no_memory(tmp_path):
    pack(tmp_path / "raw/x.tar", [("z.bin", bytes(100 << 20)), *labelled()])
    tracemalloc.start()
    index(tmp_path / "raw", tmp_path / "data", on_broken="skip")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 << 20
