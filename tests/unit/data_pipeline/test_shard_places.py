"""What WebDataset users write for the places of their shards."""

import gzip
import shutil

import pytest

from data_pipeline import shard_places
from data_pipeline.errors import DataError
from data_pipeline.shard_places import find_shards
from tests.unit.data_pipeline.foreign import (
    index,
    labelled,
    pack,
)


def test_places_are_what_webdataset_users_write(tmp_path, monkeypatch):
    for name in ("a-000", "a-001", "a-002", "b-000"):
        pack(tmp_path / f"raw/{name}.tar", labelled())
    (tmp_path / "raw/readme.txt").write_text("")

    def names(*places: str) -> list[str]:
        return list(find_shards([f"{tmp_path}/{place}" for place in places]).stamps)

    assert names("raw/a-{000..002}.tar") == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert names("raw/{b-000,a-001}.tar") == ["b-000.tar", "a-001.tar"]
    assert names("raw/a-*.tar", "raw/b-000.tar")[2:] == ["a-002.tar", "b-000.tar"]
    assert len(names("raw")) == len(names("raw/")) == 4
    assert find_shards([tmp_path / "raw"]).place == str(tmp_path / "raw")
    monkeypatch.chdir(tmp_path)
    assert find_shards(["raw/b-000.tar"]).place == str(tmp_path / "raw")
    pack(tmp_path / "other/c.tar", labelled())
    both = find_shards(["raw", "other"])
    assert both.place == str(tmp_path)
    assert [*both.stamps][-2:] == ["raw/b-000.tar", "other/c.tar"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("pipe:cat x.tar", "commands are never run"),
        ("pipe:/bin/cat x.tar", "not pipe:"),
        ("{raw,pipe:cat}/x.tar", "no such shard|commands are never run"),
        ("http://host/x-{000..002}.tar", "not http:"),
        ("raw/{000..00.tar", "braces do not match"),
        ("raw/{000..002}.tar", r"001\.tar: no such shard"),
        ("raw/{0..99}.tar", "50 shards or more"),
        ("raw/{000,000}.tar", "named twice"),
        ("gone", "gone: no shards"),
        ("raw/b*.tar", "no shards"),
        ("packed", "samples of a compressed archive cannot be read"),
        ("raw/x.tar.gz", "compressed"),
        ("raw/gz.tar", "is compressed"),
        ("raw/html.tar", "not a whole tar archive"),
        ("raw/folder.tar", "no such shard"),
        ("s3://B/x.tar", "not the name of a bucket"),
    ],
)
def test_places_that_hold_no_shards(tmp_path, monkeypatch, place, message):
    pack(tmp_path / "raw/000.tar", labelled())
    (tmp_path / "packed").mkdir()
    (tmp_path / "raw/folder.tar").mkdir()
    with gzip.open(tmp_path / "packed/x.tar.gz", "w") as file:
        file.write((tmp_path / "raw/000.tar").read_bytes())
    shutil.copy(tmp_path / "packed/x.tar.gz", tmp_path / "raw/gz.tar")
    (tmp_path / "raw/html.tar").write_text("<html>" * 200)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shard_places, "_MAX_SHARDS", 50)
    with pytest.raises(DataError, match=message):
        index(place, tmp_path / "data")
