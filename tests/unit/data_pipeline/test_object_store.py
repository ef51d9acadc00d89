"""A real object store, behind a proxy that loses, delays and damages what passes."""

import pickle
import threading
import time
from typing import Any

import pytest

from data_pipeline import object_store
from data_pipeline.errors import DataError, StorageUnavailable
from data_pipeline.object_store import ObjectStore
from data_pipeline.storage import open_storage
from tests.object_store import SECRET_KEY, Proxy

CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_FIRST_WAIT", 0.005)


def put(store: Any, name: str, data: bytes) -> None:
    with store.writing(name) as file:
        file.write(data)


def test_objects_are_written_read_and_deleted(bucket: str) -> None:
    store = open_storage(f"s3://{bucket}/a/b/")
    assert store.place == f"s3://{bucket}/a/b"
    assert store.size("x/one") is None
    put(store, "x/one", CONTENT)
    put(store, "x/two", b"")
    assert (store.size("x/one"), store.size("x/two")) == (len(CONTENT), 0)
    assert store.read("x/one", 300, 50) == CONTENT[300:350]
    assert store.read("x/one", 5, 0) == b""
    assert store.read_whole("x/one") == CONTENT
    assert store.names("x/") == ["x/one", "x/two"]
    assert open_storage(f"s3://{bucket}").read("a/b/x/one", 0, 3) == CONTENT[:3]
    assert pickle.loads(pickle.dumps(store)).read_whole("x/two") == b""
    store.delete("x/one")
    store.delete("x/one")
    assert store.size("x/one") is None


def test_an_object_appears_whole_or_not_at_all(bucket: str) -> None:
    store = open_storage(f"s3://{bucket}")

    def fail() -> None:
        with store.writing("x") as file:
            file.write(CONTENT)
            raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        fail()
    assert store.size("x") is None


def test_large_objects_go_in_parts(
    bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_PART_BYTES", 5 << 20)
    data = CONTENT * 1200  # 12 MB
    proxy.faults.extend([None, None, "slowdown", None, "error"])
    store = open_storage(f"s3://{bucket}")
    put(store, "large", data)
    assert len(proxy.paths("PUT", "large")) == 3 + 2
    assert store.read_whole("large") == data


@pytest.mark.parametrize("fault", ["slowdown", "error", "reset", "truncate", "silence"])
def test_passing_trouble_is_survived(bucket: str, proxy: Proxy, fault: str) -> None:
    store = ObjectStore(bucket, timeout=1.0)
    put(store, "x", CONTENT)
    proxy.faults.extend([fault, fault])
    assert store.read("x", 100, 5000) == CONTENT[100:5100]
    assert len(proxy.paths("GET", "x")) == 3
    proxy.faults.append(fault)
    assert store.read_whole("x") == CONTENT


def test_a_store_that_is_down_for_a_while_is_waited_for(bucket: str, proxy: Proxy) -> None:
    store = open_storage(f"s3://{bucket}")
    put(store, "x", CONTENT)
    proxy.down = True

    def repair() -> None:
        while len(proxy.paths("GET", "x")) < 3:
            time.sleep(0.01)
        proxy.down = False

    threading.Thread(target=repair, daemon=True).start()
    assert store.read("x", 0, 10) == CONTENT[:10]
    assert len(proxy.paths("GET", "x")) >= 3  # the third may come just after the repair


def test_patience_ends_with_what_was_tried(bucket: str, proxy: Proxy) -> None:
    store = ObjectStore(f"{bucket}/data", patience=1.5)
    assert store.size("x") is None
    proxy.faults.extend(["slowdown"] * 100)
    with pytest.raises(StorageUnavailable, match=r"data/x: .*SlowDown.*tried \d+ times in") as info:
        store.read("x", 0, 10)
    assert SECRET_KEY not in str(info.value)
    assert len(proxy.requests) > 2


def test_nobody_listens(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageUnavailable, match="Could not connect"):
        ObjectStore(bucket, patience=0.2).size("x")


def test_what_does_not_pass_by_waiting_fails_at_once(
    bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_storage(f"s3://{bucket}/data")
    put(store, "short", CONTENT)
    with pytest.raises(DataError, match=rf"s3://{bucket}/data/gone: not there \(404\)"):
        store.read("gone", 0, 5)
    with pytest.raises(
        DataError, match=r"short: has 10240 bytes, bytes 10000 to 11000 were wanted"
    ):
        store.read("short", 10_000, 1000)
    with pytest.raises(DataError, match=r"short: has fewer bytes"):
        store.read("short", 20_000, 1000)
    with pytest.raises(StorageUnavailable, match="no such bucket"):
        open_storage("s3://there-is-none/data").read("x", 0, 5)
    assert len(proxy.paths("GET", "")) == 4
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageUnavailable, match=r"access denied \(SignatureDoesNotMatch\)"):
        open_storage(f"s3://{bucket}").read("x", 0, 5)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    with pytest.raises(StorageUnavailable, match="set AWS_ACCESS_KEY_ID"):
        open_storage(f"s3://{bucket}").read("x", 0, 5)


@pytest.mark.parametrize("place", ["s3://", "s3://UPPER/x", "s3://key:hidden@bucket/x"])
def test_a_place_is_a_bucket_and_never_credentials(place: str) -> None:
    with pytest.raises(DataError, match=r"not the name of a bucket; write s3://") as info:
        open_storage(place)
    assert "hidden" not in str(info.value)
