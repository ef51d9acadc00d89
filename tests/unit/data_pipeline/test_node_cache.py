"""The node's cache: one download for all, bounded, safe against kills, never a reason to fail."""

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline import node_cache
from data_pipeline.node_cache import NodeCache, open_cache


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(tmp_path, 1000)


def fetched(cache: NodeCache, key: str, size: int = 200, whole: bool = True) -> bool:
    """Whether `key` had to be fetched; checks that the right bytes come."""
    calls = []

    def fetch() -> bytes:
        calls.append(key)
        return key.encode() * size

    assert cache.get(key, fetch, lambda data: whole) == key.encode() * size
    return bool(calls)


def entries(directory: Path) -> list[Path]:
    return list(directory.glob("??/*"))


def used(directory: Path) -> int:
    return sum(path.stat().st_size for path in entries(directory))


def test_what_is_there_is_not_fetched(cache: NodeCache, tmp_path: Path) -> None:
    assert fetched(cache, "a")
    assert not fetched(cache, "a")
    assert fetched(cache, "b")
    assert not fetched(NodeCache(tmp_path, 1000), "a")
    cache.discard("a")
    cache.discard("a")
    assert fetched(cache, "a")


def test_what_is_not_whole_is_not_kept(cache: NodeCache) -> None:
    assert fetched(cache, "a", whole=False)
    assert fetched(cache, "a")


def test_a_failed_fetch_leaves_nothing_and_no_lock(cache: NodeCache, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: bytes(1 // 0), lambda data: True)
    assert entries(tmp_path) == []
    assert fetched(cache, "a")


def test_it_stays_below_its_limit_and_keeps_what_was_used_last(
    cache: NodeCache, tmp_path: Path
) -> None:
    for key in "abcd":
        fetched(cache, key)
        time.sleep(0.02)  # a file's time is that of the kernel's last tick
    assert not fetched(cache, "a")  # used again, so b is the oldest
    fetched(cache, "e")
    fetched(cache, "f")
    assert used(tmp_path) <= 1000
    assert not fetched(cache, "a")
    assert fetched(cache, "b")
    for number in range(200):
        fetched(cache, f"{number:03d}")
        assert used(tmp_path) <= 1000


def test_what_is_larger_than_the_limit_is_not_kept(cache: NodeCache, tmp_path: Path) -> None:
    fetched(cache, "a")
    assert fetched(cache, "b", size=5000)
    assert fetched(cache, "b", size=5000)
    assert not fetched(cache, "a")
    assert NodeCache(tmp_path, 100)  # a smaller limit takes hold at once
    assert used(tmp_path) <= 100


def test_threads_fetch_once(cache: NodeCache) -> None:
    calls = []
    together = threading.Barrier(4)

    def fetch() -> bytes:
        calls.append(1)
        return b"data"

    def get(_: int) -> bytes:
        together.wait(10)
        return cache.get("a", fetch, lambda data: True)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(get, range(4))) == [b"data"] * 4
    assert len(calls) == 1


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from data_pipeline import node_cache

cache = node_cache.NodeCache(Path(sys.argv[1]), 10**6)

def slow_write(descriptor, data):
    if len(data) > 1:
        print("writing", flush=True)
        time.sleep(60)
    return 1

def fetch():
    print("fetching", flush=True)
    if sys.argv[2] == "fetch":
        sys.stdin.readline()
    return b"x" * 1000

if sys.argv[2] == "write":
    write = os.write
    os.write = lambda descriptor, data: write(descriptor, data[:500]) if len(data) == 1000 else (
        slow_write(descriptor, data))
print(len(cache.get("shared", fetch, lambda data: True)), flush=True)
"""


def start(directory: Path, stop_at: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(directory), stop_at],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path.cwd(),
    )


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []
    yield running
    for process in running:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_two_processes_download_once(tmp_path: Path, processes: list[Any]) -> None:
    first = start(tmp_path, "fetch")
    processes.append(first)
    assert line(first) == "fetching"
    second = start(tmp_path, "fetch")
    processes.append(second)
    first.stdin.write("go on\n")  # type: ignore[union-attr]
    first.stdin.flush()  # type: ignore[union-attr]
    assert line(first) == "1000"
    assert line(second) == "1000"  # not "fetching"


@pytest.mark.parametrize("moment", ["fetch", "write"])
def test_a_kill_frees_the_lock_and_its_leftovers_go(
    tmp_path: Path, processes: list[Any], moment: str
) -> None:
    process = start(tmp_path, moment)
    processes.append(process)
    assert line(process) == "fetching"
    if moment == "write":
        assert line(process) == "writing"
        NodeCache(tmp_path, 10**6)
        assert len(entries(tmp_path)) == 1  # the writer lives
    process.send_signal(signal.SIGKILL)
    process.wait()
    cache = NodeCache(tmp_path, 10**6)
    assert entries(tmp_path) == []
    assert fetched(cache, "shared")
    assert not fetched(cache, "shared")


def test_a_full_disk_costs_the_cache_and_one_warning(
    cache: NodeCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    fetched(cache, "a")
    monkeypatch.setattr(os, "write", full)
    with caplog.at_level(logging.WARNING):
        for key in ("b", "c", "b"):
            assert fetched(cache, key)
        assert not fetched(cache, "a")
    assert len(caplog.records) == 1
    assert "No space left on device; reading on without it" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(node_cache, "_PAUSE", 0.0)
    cache._paused_until = 0.0
    assert fetched(cache, "b")
    assert not fetched(cache, "b")


def test_a_directory_that_cannot_be_is_no_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert open_cache(tmp_path / "file/cache", 1000) is None
        assert open_cache(tmp_path / "file/cache", 1000) is None
    assert len(caplog.records) == 1
    assert "reading without it" in caplog.text


def test_a_directory_of_somebody_else_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    assert open_cache(tmp_path / "cache", 1000) is None
    assert "belongs to another user" in caplog.text


def test_its_place_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATROUS_CACHE", str(tmp_path / "here"))
    cache = open_cache()
    assert cache is not None
    assert open_cache() is cache
    fetched(cache, "a")
    assert len(entries(tmp_path / "here")) == 1
    assert (tmp_path / "here").stat().st_mode & 0o077 == 0


def test_a_limit_from_the_free_room_stays_as_the_cache_fills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def room(free: int) -> int:
        monkeypatch.setattr(node_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        node_cache._open.cache_clear()
        cache = open_cache(tmp_path)
        assert cache is not None
        return cache.room

    before = room(4000)
    fetched(NodeCache(tmp_path, 1000), "a", size=600)
    assert room(3400) == before == 900
    assert room(1000) == 360
