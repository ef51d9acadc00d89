import json
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
    with pytest.raises(DataError, match=r"neither classes\.txt nor train\.parquet"):
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
