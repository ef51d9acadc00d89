import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg

from data_pipeline.errors import DataError
from data_pipeline.formats import multilabel
from data_pipeline.formats.sample import Sample, Split


def picture(width: int) -> bytes:
    return simplejpeg.encode_jpeg(np.zeros((8, width, 3), np.uint8))


def write(path: Path, columns: dict, row_group_size: int = 3) -> None:
    columns["labels"] = pa.array(columns["labels"], pa.list_(pa.string()))
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)


def load_all(split: Split) -> list[Sample]:
    items = split.fetch(split.items) if split.fetch else split.items
    return [split.load(item) for item in items]


def test_embedded_pictures_come_from_their_own_rows(tmp_path):
    labels = [["cat"], ["dog", "ant", "dog"], [], ["cat"], ["ant"], ["dog"], ["cat", "dog"]]
    write(
        tmp_path / "train.parquet", {"image": [picture(10 + i) for i in range(7)], "labels": labels}
    )
    split = multilabel.read_split(tmp_path, "train")
    assert split.class_names == ("ant", "cat", "dog")
    assert [item.group for item in split.items] == [0, 0, 0, 1, 1, 1, 2]
    order = [5, 0, 6, 3]
    fetched = split.fetch([split.items[i] for i in order])
    loaded = [split.load(item) for item in fetched]
    assert [sample.width for sample in loaded] == [10 + i for i in order]
    assert [sample.key for sample in loaded] == [f"{i:09d}" for i in order]
    assert [json.loads(sample.label) for sample in loaded] == [[2], [1], [1, 2], [1]]
    assert load_all(split)[1].labels == (0, 2)
    assert load_all(split)[2].labels == ()


def test_fetch_reads_a_row_group_once_and_only_those_wanted(tmp_path, monkeypatch):
    images = [picture(10 + i) for i in range(200)]
    write(tmp_path / "train.parquet", {"image": images, "labels": [["a"]] * 200}, 100)
    split = multilabel.read_split(tmp_path, "train")
    read = []
    original = pq.ParquetFile.iter_batches

    def spy(self, *args, **kwargs):
        read.append(kwargs["row_groups"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    items = split.fetch([split.items[i] for i in (199, 101, 165)])
    assert [item.image for item in items] == [images[i] for i in (199, 101, 165)]
    assert read == [[1]]


def test_paths_are_read_and_must_stay_inside(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.jpg").write_bytes(picture(10))
    paths = ["a/x.jpg", "../secret.jpg", None, "/etc/passwd"]
    write(tmp_path / "train.parquet", {"path": paths, "labels": [["c"]] * 4})
    split = multilabel.read_split(tmp_path, "train")
    assert split.fetch is None
    assert split.load(split.items[0]).image == picture(10)
    for row, message in (
        (1, "leaves the source"),
        (2, "neither an image nor"),
        (3, "leaves the source"),
    ):
        with pytest.raises(DataError, match=rf"train\.parquet row {row}: .*{message}"):
            split.load(split.items[row])


def test_classes_txt_gives_ids_and_an_unknown_label_is_broken(tmp_path):
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    write(
        tmp_path / "val.parquet",
        {"image": [picture(9)] * 3, "labels": [["cat"], ["cow"], None]},
    )
    split = multilabel.read_split(tmp_path, "val")
    items = split.fetch(split.items)
    assert split.class_names == ("dog", "cat")
    assert split.load(items[0]).labels == (1,)
    with pytest.raises(DataError, match="row 1: unknown labels cow"):
        split.load(items[1])
    with pytest.raises(DataError, match="row 2: labels is null"):
        split.load(items[2])


def test_class_names_come_from_train_only(tmp_path):
    write(tmp_path / "train.parquet", {"image": [picture(9)], "labels": [["b", "a"]]})
    write(tmp_path / "val.parquet", {"image": [picture(9)], "labels": [["c"]]})
    assert multilabel.splits(tmp_path) == ("train", "val")
    assert multilabel.read_split(tmp_path, "val").class_names == ("a", "b")
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(DataError, match=r"neither classes\.txt nor train\.parquet or train\.tsv"):
        multilabel.read_split(tmp_path, "val")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": ["text"], "labels": [["a"]]}, "image must be binary"),
        ({"labels": [["a"]]}, "expected a column image"),
    ],
)
def test_wrong_columns_are_named(tmp_path, columns, message):
    write(tmp_path / "train.parquet", columns)
    with pytest.raises(DataError, match=message):
        multilabel.read_split(tmp_path, "train")


def test_labels_must_be_lists_and_the_file_parquet(tmp_path):
    pq.write_table(pa.table({"image": [b"x"], "labels": ["a"]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"labels must be list<string>"):
        multilabel.read_split(tmp_path, "train")
    (tmp_path / "train.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="not a Parquet file"):
        multilabel.read_split(tmp_path, "train")


def test_a_class_listed_twice_is_an_error(tmp_path):
    (tmp_path / "classes.txt").write_text("dog\ncat\ndog\n")
    write(tmp_path / "train.parquet", {"image": [picture(9)], "labels": [["dog"]]})
    with pytest.raises(DataError, match="listed twice"):
        multilabel.read_split(tmp_path, "train")


def test_large_row_groups_are_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(multilabel, "_LARGE_GROUP", 2)
    write(tmp_path / "train.parquet", {"image": [picture(9)] * 3, "labels": [["a"]] * 3})
    assert "row groups of 3 rows" in multilabel.read_split(tmp_path, "train").warnings[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.tsv", "path\tlabels\na/x.jpg\tcat,dog\na/y.jpg\tant, cat\na/z.jpg\t\n"),
        ("train.csv", 'a/x.jpg,cat,dog\na/y.jpg,"ant,cat"\na/z.jpg\n\n'),
    ],
)
def test_a_list_has_paths_and_labels(tmp_path, name, text):
    (tmp_path / "a").mkdir()
    for width, stem in enumerate("xyz", start=9):
        (tmp_path / f"a/{stem}.jpg").write_bytes(picture(width))
    (tmp_path / name).write_text(text)
    assert multilabel.splits(tmp_path) == ("train",)
    split = multilabel.read_split(tmp_path, "train")
    assert split.class_names == ("ant", "cat", "dog")
    samples = load_all(split)
    assert [(s.key, s.width, s.labels) for s in samples] == [
        ("a_x", 9, (1, 2)),
        ("a_y", 10, (0, 1)),
        ("a_z", 11, ()),
    ]
    # A change of labels makes other shards.
    assert str(tmp_path / name) in split.sources


def test_a_list_names_its_broken_lines(tmp_path):
    (tmp_path / "x.jpg").write_bytes(picture(9))
    (tmp_path / "classes.txt").write_text("cat\n")
    (tmp_path / "val.tsv").write_text("x.jpg\tcat\nx2.jpg\tcat\nx.jpg\tdog\n")
    split = multilabel.read_split(tmp_path, "val")
    assert split.load(split.items[0]).labels == (0,)
    with pytest.raises(DataError, match=r"x2\.jpg: No such file"):
        split.load(split.items[1])
    with pytest.raises(DataError, match=r"\(line 3 of the list\): unknown labels dog"):
        split.load(split.items[2])
    (tmp_path / "val.tsv").write_text("../x.jpg\tcat\n")
    with pytest.raises(DataError, match=r"line 1: path '\.\./x\.jpg' leaves"):
        multilabel.read_split(tmp_path, "val")
    (tmp_path / "val.csv").write_text("x.jpg,cat\n")
    with pytest.raises(DataError, match="val is there in two forms"):
        multilabel.splits(tmp_path)


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("place", ["train-{:05d}.tar", "train/{}.tar"])
def test_webdataset_shards_have_names_or_ids(tmp_path, place):
    (tmp_path / "classes.txt").write_text("ant\ncat\ndog\n")
    write_shard(
        tmp_path / place.format(0),
        {
            "d/one.jpg": picture(9), "d/one.json": b'["dog", "cat", 2]', "d/one.txt": b"caption",
            "two.png": picture(10), "two.cls": b"1",
        },
    )  # fmt: skip
    write_shard(
        tmp_path / place.format(1),
        {
            "three.json": b'{"labels": ["ant"], "score": 3}', "three.jpeg": picture(11),
            "four.v2.jpg": picture(12), "four.jpg": picture(13), "four.cls": b"ant, 2",
        },
    )  # fmt: skip
    assert multilabel.splits(tmp_path) == ("train",)
    split = multilabel.read_split(tmp_path, "train")
    assert split.class_names == ("ant", "cat", "dog")
    assert [(s.key, s.width, s.labels, s.image_extension) for s in load_all(split)] == [
        ("d_one", 9, (1, 2), "jpg"),
        ("two", 10, (1,), "jpg"),
        ("three", 11, (0,), "jpg"),
        ("four", 13, (0, 2), "jpg"),
    ]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": picture(9)}, r"train-0\.tar: a has jpg only; a sample needs"),
        ({"a.cls": b"1"}, "a has cls only"),
        (
            {"a.jpg": picture(9), "a.cls": b"1", "b.txt": b"", "a.JPG": picture(10)},
            r"train-0\.tar: a has two members \.jpg",
        ),
        ({"a.jpg": picture(9), "a.cls": b"3"}, r"a\.jpg: unknown labels 3"),
        ({"a.jpg": picture(9), "a.json": b'["cow"]'}, "unknown labels cow"),
        ({"a.jpg": picture(9), "a.json": b"[-1]"}, "unknown labels -1"),
        ({"a.jpg": picture(9), "a.json": b"{}"}, r"a\.json: labels cannot be read"),
        ({"a.jpg": picture(9), "a.json": b"[true]"}, "no list of names or ids"),
        ({"a.jpg": picture(9), "a.json": b"\xff"}, "labels cannot be read"),
        ({"a.jpg": b"GIF89", "a.cls": b"1"}, r"train-0\.tar/a\.jpg: neither a JPEG"),
    ],
)
def test_broken_samples_of_shards_are_named(tmp_path, members, message):
    (tmp_path / "classes.txt").write_text("ant\ncat\n")
    write_shard(tmp_path / "train-0.tar", members)
    split = multilabel.read_split(tmp_path, "train")
    with pytest.raises(DataError, match=message):
        load_all(split)


def test_many_classes_are_no_matter(tmp_path):
    (tmp_path / "classes.txt").write_text("".join(f"class {i}\n" for i in range(18_000)))
    (tmp_path / "x.jpg").write_bytes(picture(9))
    (tmp_path / "train.tsv").write_text("x.jpg\tclass 17999,class 3\n")
    split = multilabel.read_split(tmp_path, "train")
    assert len(split.class_names) == 18_000
    assert load_all(split)[0].labels == (3, 17_999)
