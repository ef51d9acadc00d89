"""Paths in a bucket, against a real store and a network that breaks."""

import hashlib
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipeline import object_store
from orchestrator.bucket import BucketPath, StorageAway, hasty, on_disk, storage_path
from tests.object_store import Proxy, Server, bucket, proxy, store

__all__ = ["bucket", "proxy", "store"]  # fixtures


@pytest.fixture
def place(bucket: str) -> BucketPath:
    path = storage_path(f"s3://{bucket}")
    assert isinstance(path, BucketPath)
    return path


def test_a_path_is_one_of_a_bucket_whatever_is_made_of_it() -> None:
    path = storage_path("s3://bucket/prefix/") / "runs" / "a"
    assert str(path) == f"{path}" == "s3://bucket/prefix/runs/a"
    assert str(path.parent) == "s3://bucket/prefix/runs"
    assert str(path.parents[2]) == "s3://bucket"
    assert str(path.with_name("b")) == "s3://bucket/prefix/runs/b"
    assert str(path.relative_to(storage_path("s3://bucket/prefix"))) == "runs/a"
    for same in (pickle.loads(pickle.dumps(path)), storage_path(str(path)), hasty(path)):
        assert isinstance(same, BucketPath)
        assert same == path
    assert hasty(path).patience < path.patience  # type: ignore[attr-defined]


def test_nothing_lands_on_a_disk_by_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = storage_path("s3://bucket/prefix")
    for write in (lambda: path.open("w"), lambda: os.mkdir(path), lambda: path.touch()):
        with pytest.raises(TypeError, match="is no file of this machine"):
            write()
    assert list(tmp_path.iterdir()) == []


def test_other_places_are_those_of_this_machine(tmp_path: Path) -> None:
    assert storage_path("~/x") == Path("~/x").expanduser()
    assert storage_path(tmp_path) == hasty(tmp_path) == on_disk(tmp_path) == tmp_path


def test_objects_come_and_go(place: BucketPath) -> None:
    assert not place.exists()
    assert list(place.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"s3://tests/\d+/a/x.txt"):
        (place / "a" / "x.txt").read_text()
    (place / "a" / "x.txt").write_text("one")
    (place / "a" / "y.txt").write_bytes(b"two!")
    assert place.is_dir()
    assert not place.is_file()
    assert (place / "a" / "x.txt").is_file()
    assert [path.name for path in place.iterdir()] == ["a"]
    assert [path.name for path in (place / "a").glob("x*")] == ["x.txt"]
    assert sorted(path.name for path in place.glob("*/*.txt")) == ["x.txt", "y.txt"]
    assert {path.name: size for path, size in place.below()} == {"x.txt": 3, "y.txt": 4}
    (place / "a" / "x.txt").copy_to(place / "b")
    (place / "a" / "x.txt").unlink()
    (place / "a" / "x.txt").unlink()
    assert [path.name for path in place.iterdir()] == ["a", "b"]
    assert (place / "b").read_text() == "one"


def test_what_has_not_changed_is_not_transferred_again(place: BucketPath, proxy: Proxy) -> None:
    path = place / "x"
    path.write_bytes(b"1")
    assert [path.read_bytes() for _ in range(3)] == [b"1"] * 3
    path.write_bytes(b"2")
    assert path.read_bytes() == b"2"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        path.read_bytes()


def test_of_two_writers_one_is_refused(place: BucketPath) -> None:
    path = place / "x"
    first = path.write_if(b"1", None)
    assert first
    assert path.write_if(b"2", None) is None
    second = path.write_if(b"2", first)
    assert second
    assert path.write_if(b"3", first) is None
    assert path.read_version() == (b"2", second)


def test_a_write_whose_answer_is_lost_is_not_taken_for_that_of_another(
    place: BucketPath, proxy: Proxy
) -> None:
    proxy.matching = "/x"
    proxy.faults.append("lost")
    tag = (place / "x").write_if(b"1", None)
    assert tag
    proxy.faults.append("lost")
    assert (place / "x").write_if(b"2", tag)
    assert len(proxy.paths("PUT", "/x")) == 4


def test_lines_of_several_writers_all_arrive_once(place: BucketPath, proxy: Proxy) -> None:
    proxy.matching = "/lines"
    proxy.faults.extend([None, "lost", None, None, "lost", "slowdown", "lost", "lost"])
    lines = [b"%d\n" % number for number in range(10, 34)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda line: (place / "lines").append([line]), lines))
    assert sorted((place / "lines").read_bytes().splitlines(keepends=True)) == lines


def test_a_copy_on_this_machine_is_what_it_should_be(
    place: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATROUS_CACHE", str(tmp_path))
    source, path = tmp_path / "source", place / "x"
    source.write_bytes(b"content")
    digest = hashlib.sha256(b"content").hexdigest()
    path.upload(source, lambda: None)
    copy = path.download(digest)
    assert copy.read_bytes() == b"content"
    copy.write_bytes(b"Content")  # a bad disk
    assert path.download(digest).read_bytes() == b"content"
    os.utime(copy, (0, 0))
    path.write_bytes(b"another")  # as long as the first
    with pytest.raises(ValueError, match="differs"):
        path.download("0" * 64)
    assert list((tmp_path / "objects").iterdir()) == []  # nor is what was not used for long


def test_a_large_file_goes_and_comes_in_parts(
    place: BucketPath,
    proxy: Proxy,
    store: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ATROUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(object_store, "_PART_BYTES", 5 << 20)
    source, path, asked = tmp_path / "source", place / "x", []
    for content in (os.urandom(6 << 20), os.urandom(6 << 20)):
        source.write_bytes(content)
        proxy.faults.extend([None, "lost", None, "slowdown", None, "lost"])
        path.upload(source, lambda: asked.append(1))
        copy = path.download(hashlib.sha256(content).hexdigest())
        assert copy.read_bytes() == content
    assert asked  # before what was there was replaced
    with pytest.raises(KeyboardInterrupt):
        path.upload(source, die)
    client = store.client
    begun = client.create_multipart_upload(Bucket="tests", Key=f"{place.name}/left/y")
    assert begun["UploadId"]
    (place / "left").abort_uploads()
    assert not client.list_multipart_uploads(Bucket="tests").get("Uploads")


def die() -> None:
    raise KeyboardInterrupt


def test_a_store_that_is_away_is_a_disk_that_is_away(
    place: BucketPath, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.down = True
    monkeypatch.setattr(BucketPath, "patience", 0.2)
    with pytest.raises(StorageAway, match=r"s3://tests/\d+/x: .*tried"):
        (place / "x").read_bytes()
    with pytest.raises(OSError, match="tried"):
        (place / "x").write_text("1")


def test_access_that_is_denied_says_so(place: BucketPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageAway, match="access denied") as raised:
        place.exists()
    assert "wrong" not in str(raised.value)
