"""Shards written by other machines, and what is said when they cannot be."""

import errno
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline import parts
from data_pipeline.archives import TarMember
from data_pipeline.errors import DataError, StorageUnavailable
from data_pipeline.formats.sample import Item, Sample
from data_pipeline.parts import (
    PARTS,
    ShardTask,
    in_processes,
    input_sizes,
    marker,
    run_tasks,
    write_part,
    write_part_on_node,
)
from data_pipeline.storage import LocalStorage


def load(item: Item) -> Sample:
    data = Path(item.files[0]).read_bytes()
    return Sample(key=item.key, image=data, image_extension="jpg", width=1, height=1)


@pytest.fixture
def task(tmp_path) -> ShardTask:
    files = [tmp_path / f"{name}.jpg" for name in "abc"]
    for number, file in enumerate(files):
        file.write_bytes(bytes(number + 1))
    (tmp_path / "list.txt").write_text("a b c")
    return ShardTask(
        place=str(tmp_path / "out"),
        name="shard-000000.tar",
        digest="1",
        items=[Item(key=file.stem, files=(str(file),)) for file in files],
        load=load,
        fetch=None,
        sources=(str(tmp_path / "list.txt"),),
        reuse_broken=True,
    )


def test_another_machine_that_sees_the_same_writes_the_same(task):
    wanted = write_part(task)
    with marker(task.place) as mark:
        assert write_part_on_node(task, mark, input_sizes(task)) == wanted
        assert (Path(task.place) / mark).is_file()
    assert not (Path(task.place) / mark).exists()


def test_another_destination_is_refused_before_anything_is_written(task):
    with pytest.raises(DataError, match=r"out: the destination is another one here; prepare"):
        write_part_on_node(task, f"{PARTS}/other.marker", input_sizes(task))
    assert not Path(task.place).exists()


@pytest.mark.parametrize("name", ["b.jpg", "list.txt"])
def test_another_source_is_refused_before_anything_is_written(task, tmp_path, name):
    sizes = input_sizes(task)
    with marker(task.place) as mark:
        (tmp_path / name).write_bytes(b"longer than before")
        with pytest.raises(DataError, match=rf"{name}: 18 bytes, but \d bytes for the driver"):
            write_part_on_node(task, mark, sizes)
        (tmp_path / name).unlink()
        with pytest.raises(DataError, match=rf"{name}: not there, but \d bytes for the driver"):
            write_part_on_node(task, mark, sizes)
    assert not list(Path(task.place).glob("shard-*"))


def test_an_archive_is_looked_at_once_and_a_bucket_not_at_all(task, tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(99))
    members = [TarMember(str(path), name, 0, 9) for name in "ab"]
    remote = TarMember("s3://bucket/x.tar", "a", 0, 9)
    items = [Item(key=m.name + m.archive, files=(m,)) for m in (*members, remote)]
    assert input_sizes(replace(task, items=items)) == [5, 99]


def test_what_the_driver_misses_too_is_a_broken_input(task, tmp_path):
    def broken(item: Item) -> Sample:
        raise DataError(f"{item.key} is missing")

    (tmp_path / "b.jpg").unlink()
    with marker(task.place) as mark:
        part = write_part_on_node(replace(task, load=broken), mark, input_sizes(task))
    assert [entry["key"] for entry in part.skipped] == ["a", "b", "c"]


def test_a_full_disk_is_said_and_leaves_nothing(task, monkeypatch):
    @contextmanager
    def full(self, name):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    monkeypatch.setattr(LocalStorage, "writing", full)
    with pytest.raises(DataError, match=r"shard-000000\.tar: cannot be written \(No space left"):
        write_part(task)


def test_a_store_that_is_down_is_no_fault_of_a_sample(task):
    def down(item: Item) -> Sample:
        raise StorageUnavailable("down")

    with pytest.raises(StorageUnavailable):
        write_part(replace(task, load=down))


def test_finished_parts_are_not_handed_over(task, monkeypatch):
    tasks = [replace(task, name=f"shard-{i:06d}.tar", digest=str(i)) for i in range(4)]
    for done in tasks[1:3]:
        write_part(done)
    changed = [tasks[0], replace(tasks[1], digest="new"), *tasks[2:]]
    handed: list[str] = []

    def run(todo):
        handed.extend(task.name for task in todo)
        yield from in_processes(1)(todo)

    assert len(list(run_tasks(changed, run))) == 4
    assert sorted(handed) == ["shard-000000.tar", "shard-000001.tar", "shard-000003.tar"]
    monkeypatch.setattr(parts, "write_part", None)
    assert len(list(run_tasks(changed, lambda todo: pytest.fail("nothing to do")))) == 4
