import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
import webdataset as wds

from data_pipeline import parts
from data_pipeline.errors import DataError
from data_pipeline.formats.sample import Item
from data_pipeline.manifest import FILE_NAME, Manifest, read_manifest
from data_pipeline.prepare import Settings, prepare, shuffled

SMALL = Settings(samples_per_shard=4)


def make_source(source: Path, counts: dict[str, int], split: str = "train") -> Path:
    number = 0
    for name, count in counts.items():
        folder = source / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            picture = np.full((8, 9 + number, 3), 100, np.uint8)
            (folder / f"{i}.JPEG").write_bytes(simplejpeg.encode_jpeg(picture))
            number += 1
    return source


@pytest.fixture
def source(tmp_path) -> Path:
    return make_source(tmp_path / "raw", {"ant": 6, "bee": 5, "cow": 7})


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.tar")}


def keys(manifest: Manifest) -> list[str]:
    return [
        key for i in range(len(manifest.shards)) for key in manifest.read_rows(i)["key"].to_pylist()
    ]


def written(monkeypatch) -> list[str]:
    """The names of the shards written from now on, in this process."""
    names: list[str] = []
    original = parts.write_part

    def spy(task):
        names.append(task.name)
        return original(task)

    monkeypatch.setattr(parts, "write_part", spy)
    return names


def test_every_input_is_in_the_shards_once(tmp_path, source):
    result = prepare("imagenet", source, tmp_path / "out", SMALL, workers=1)
    manifest = result["train"]
    assert manifest == read_manifest(tmp_path / "out/train")
    assert (manifest.dataset, manifest.split, manifest.task) == ("out", "train", "classification")
    assert [shard.num_samples for shard in manifest.shards] == [4, 4, 4, 4, 2]
    wanted = [f"{name}_{i}" for name, n in (("ant", 6), ("bee", 5), ("cow", 7)) for i in range(n)]
    assert sorted(keys(manifest)) == wanted
    assert (manifest.source["items"], manifest.source["skipped"]) == (18, 0)
    assert sorted(path.name for path in (tmp_path / "out/train").iterdir()) == [
        FILE_NAME,
        *(f"shard-{i:06d}.tar" for i in range(5)),
    ]
    read = wds.WebDataset(
        [str(tmp_path / "out/train" / shard.name) for shard in manifest.shards], shardshuffle=False
    ).decode("pil")
    for entry in read:
        assert manifest.class_names[entry["cls"]] == entry["__key__"].split("_")[0]


def test_the_order_is_mixed_and_depends_on_the_seed_alone(tmp_path, source):
    first = prepare("imagenet", source, tmp_path / "a", SMALL, workers=1)["train"]
    again = prepare("imagenet", source, tmp_path / "b", SMALL, workers=1)["train"]
    other = prepare("imagenet", source, tmp_path / "c", replace(SMALL, seed=1), workers=1)["train"]
    assert contents(tmp_path / "a/train") == contents(tmp_path / "b/train")
    assert first.digest == again.digest != other.digest
    classes = [key.split("_")[0] for key in keys(first)]
    assert classes != sorted(classes)
    assert sorted(keys(first)) == sorted(keys(other))


def test_worker_processes_write_the_same_bytes(tmp_path, source):
    alone = prepare("imagenet", source, tmp_path / "a", SMALL, workers=1)["train"]
    seen: list[tuple[str, int, int]] = []
    together = prepare(
        "imagenet", source, tmp_path / "b", SMALL, workers=2, progress=lambda *now: seen.append(now)
    )["train"]
    assert contents(tmp_path / "a/train") == contents(tmp_path / "b/train")
    assert alone.digest == together.digest
    assert len(seen) == 5
    assert seen[-1] == ("train", 18, 18)
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})


def test_a_finished_split_is_left_as_it_is(tmp_path, source, monkeypatch):
    first = prepare("imagenet", source, tmp_path / "out", SMALL, workers=1)
    names = written(monkeypatch)
    seen: list[tuple[str, int, int]] = []
    again = prepare(
        "imagenet",
        source,
        tmp_path / "out",
        SMALL,
        workers=1,
        progress=lambda *now: seen.append(now),
    )
    assert again == first
    assert names == []
    assert seen == [("train", 18, 18)]


def test_a_lost_shard_is_written_again(tmp_path, source):
    before = prepare("imagenet", source, tmp_path / "out", SMALL, workers=1)
    (tmp_path / "out/train/shard-000002.tar").unlink()
    assert prepare("imagenet", source, tmp_path / "out", SMALL, workers=1) == before
    assert (tmp_path / "out/train/shard-000002.tar").exists()


def test_other_settings_do_not_replace_a_finished_split(tmp_path, source):
    prepare("imagenet", source, tmp_path / "out", SMALL, workers=1)
    before = contents(tmp_path / "out/train")
    with pytest.raises(DataError, match="prepared before from other inputs or settings"):
        prepare("imagenet", source, tmp_path / "out", replace(SMALL, seed=3), workers=1)
    assert contents(tmp_path / "out/train") == before


def break_pictures(source: Path, names: list[str]) -> None:
    for name in names:
        path = source / "train" / name
        path.write_bytes(path.read_bytes()[:-20])


def test_broken_inputs_fail_with_their_names_and_nothing_is_published(tmp_path, source):
    break_pictures(source, ["ant/1.JPEG", "cow/3.JPEG"])
    with pytest.raises(DataError, match=r"train: 2 broken inputs") as caught:
        prepare("imagenet", source, tmp_path / "out", SMALL, workers=1)
    assert "ant/1.JPEG: does not decode" in str(caught.value)
    assert "cow/3.JPEG: does not decode" in str(caught.value)
    assert not (tmp_path / "out/train" / FILE_NAME).exists()


def test_a_long_list_of_broken_inputs_is_cut_but_counted(tmp_path, source):
    break_pictures(
        source, [f"{name}/{i}.JPEG" for name in ("ant", "bee") for i in range(5)] + ["cow/0.JPEG"]
    )
    with pytest.raises(DataError, match="train: 11 broken inputs") as caught:
        prepare("imagenet", source, tmp_path / "out", SMALL, workers=1)
    assert str(caught.value).count("does not decode") == 10
    assert "and 1 more" in str(caught.value)


def test_broken_inputs_can_be_left_out_and_are_counted(tmp_path, source):
    break_pictures(source, ["ant/1.JPEG", "cow/3.JPEG"])
    settings = replace(SMALL, on_broken="skip")
    manifest = prepare("imagenet", source, tmp_path / "out", settings, workers=1)["train"]
    assert manifest.num_samples == 16
    assert (manifest.source["items"], manifest.source["skipped"]) == (18, 2)
    assert {entry["key"] for entry in manifest.source["skipped_items"]} == {"ant_1", "cow_3"}
    assert "ant_1" not in keys(manifest)
    # Whoever asks for no broken inputs is told, also when the split is there already.
    with pytest.raises(DataError, match="2 broken inputs"):
        prepare("imagenet", source, tmp_path / "out", SMALL, workers=1)


def test_a_shard_of_broken_inputs_only_is_left_out(tmp_path):
    source = make_source(tmp_path / "raw", {"ant": 3})
    break_pictures(source, ["ant/1.JPEG"])
    settings = Settings(samples_per_shard=1, on_broken="skip")
    manifest = prepare("imagenet", source, tmp_path / "out", settings, workers=1)["train"]
    assert [shard.num_samples for shard in manifest.shards] == [1, 1]
    assert len(contents(tmp_path / "out/train")) == 2
    break_pictures(source, ["ant/0.JPEG", "ant/2.JPEG"])
    with pytest.raises(DataError, match="all 3 inputs of 'train' are broken"):
        prepare("imagenet", source, tmp_path / "new", settings, workers=1)


def test_after_mending_an_input_only_its_shard_is_written_again(tmp_path, source, monkeypatch):
    path = source / "train/bee/2.JPEG"
    whole = path.read_bytes()
    break_pictures(source, ["bee/2.JPEG"])
    with pytest.raises(DataError, match="1 broken inputs"):
        prepare("imagenet", source, tmp_path / "out", SMALL, workers=1)
    path.write_bytes(whole)
    names = written(monkeypatch)
    manifest = prepare("imagenet", source, tmp_path / "out", SMALL, workers=1)["train"]
    assert len(names) == 1
    fresh = prepare("imagenet", source, tmp_path / "fresh", SMALL, workers=1)["train"]
    assert manifest.digest == fresh.digest


def test_unfinished_work_for_another_plan_is_written_again(tmp_path, source, monkeypatch):
    break_pictures(source, ["bee/2.JPEG"])
    with pytest.raises(DataError, match="1 broken"):
        prepare("imagenet", source, tmp_path / "out", SMALL, workers=1)
    names = written(monkeypatch)
    settings = replace(SMALL, samples_per_shard=9, on_broken="skip")
    manifest = prepare("imagenet", source, tmp_path / "out", settings, workers=1)["train"]
    assert len(names) == 2
    assert set(contents(tmp_path / "out/train")) == {shard.name for shard in manifest.shards}


def test_a_part_cut_short_is_no_part(tmp_path, source, monkeypatch):
    break_pictures(source, ["bee/2.JPEG"])
    settings = replace(SMALL, on_broken="skip")
    with pytest.raises(DataError, match="1 broken"):
        prepare("imagenet", source, tmp_path / "out", SMALL, workers=1)
    found = sorted((tmp_path / "out/train/.parts").iterdir())
    found[0].write_bytes(found[0].read_bytes()[:-9])
    found[1].write_bytes(b"")
    names = written(monkeypatch)
    prepare("imagenet", source, tmp_path / "out", settings, workers=1)
    assert names == ["shard-000000.tar", "shard-000001.tar"]


def test_limit_takes_a_mixed_subset(tmp_path, source):
    manifest = prepare("imagenet", source, tmp_path / "out", replace(SMALL, limit=10), workers=1)[
        "train"
    ]
    assert manifest.num_samples == 10
    assert set(manifest.class_names) == {key.split("_")[0] for key in keys(manifest)}
    whole = prepare("imagenet", source, tmp_path / "whole", SMALL, workers=1)["train"]
    assert keys(manifest) == keys(whole)[:10]


def test_keys_that_clash_are_both_named(tmp_path):
    source = make_source(tmp_path / "raw", {"ant": 1})
    (source / "train/ant/0.png").write_bytes((source / "train/ant/0.JPEG").read_bytes())
    with pytest.raises(DataError, match=r"0\.JPEG and .*0\.png: both have the key 'ant_0'"):
        prepare("imagenet", source, tmp_path / "out", workers=1)


def test_wrong_requests_are_refused(tmp_path, source):
    with pytest.raises(DataError, match=r"did you mean coco\?"):
        prepare("cocoo", source, tmp_path / "out")
    with pytest.raises(DataError, match="imagenet has no option min_area; it has: none"):
        prepare("imagenet", source, tmp_path / "out", Settings(options={"min_area": 5}))
    with pytest.raises(DataError, match="nowhere: no such folder"):
        prepare("imagenet", tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(DataError, match="no split 'test'; found: train"):
        prepare("imagenet", source, tmp_path / "out", splits=["test"])
    with pytest.raises(DataError, match="choose fail or skip"):
        Settings(on_broken="ignore")
    with pytest.raises(DataError, match="must be at least 1"):
        Settings(limit=0)
    assert not (tmp_path / "out").exists()


def test_an_empty_split_is_refused(tmp_path, source):
    (source / "val/ant").mkdir(parents=True)
    with pytest.raises(DataError, match="split 'val' is empty"):
        prepare("imagenet", source, tmp_path / "out", splits=["val"], workers=1)


def test_pictures_in_parquet_arrive_whole(tmp_path):
    (tmp_path / "raw").mkdir()
    images = [simplejpeg.encode_jpeg(np.zeros((8, 9 + i, 3), np.uint8)) for i in range(40)]
    labels = pa.array([["a"] if i % 2 else ["b", "a"] for i in range(40)], pa.list_(pa.string()))
    table = pa.table({"image": images, "labels": labels})
    pq.write_table(table, tmp_path / "raw/train.parquet", row_group_size=7)
    manifest = prepare("multilabel", tmp_path / "raw", tmp_path / "out", SMALL, workers=1)["train"]
    for i, shard in enumerate(manifest.shards):
        data = (tmp_path / "out/train" / shard.name).read_bytes()
        for row in manifest.read_rows(i).to_pylist():
            number = int(row["key"])
            assert data[row["image_offset"] :][: row["image_size"]] == images[number]
            assert row["labels"] == ([0] if number % 2 else [0, 1])
    assert manifest.num_samples == 40


def test_shuffling_keeps_groups_near_each_other():
    items = [Item(key=f"{i:03d}", group=i // 10) for i in range(200)]
    order = shuffled(items, seed=0, pool=40)
    assert sorted(item.key for item in order) == [item.key for item in items]
    for start in range(0, 200, 40):
        window = Counter(item.group for item in order[start : start + 40])
        assert set(window.values()) == {10}
    assert [item.group for item in order[:40]] != sorted(item.group for item in order[:40])
    assert shuffled(items[::-1], seed=0, pool=40) == order


SCRIPT = """
import sys
import time
from pathlib import Path
from data_pipeline.prepare import Settings, prepare

def report(split, done, total):
    print(split, done, flush=True)
    if done == 5:
        time.sleep(60)  # the kill comes now

prepare("imagenet", Path(sys.argv[1]), Path(sys.argv[2]), Settings(samples_per_shard=1),
        workers=int(sys.argv[3]), progress=report)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_started_again_it_goes_on(tmp_path, workers, monkeypatch):
    source = make_source(tmp_path / "raw", {"ant": 20, "bee": 20})
    command = [sys.executable, "-c", SCRIPT, str(source), str(tmp_path / "out"), str(workers)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=Path.cwd()
    ) as process:
        for _ in range(5):
            assert process.stdout.readline().startswith("train ")
        os.kill(process.pid, signal.SIGKILL)
    wait_for_group_to_end(process.pid)
    assert not (tmp_path / "out/train" / FILE_NAME).exists()
    done = {path.stem for path in (tmp_path / "out/train/.parts").glob("*.parquet")}
    assert len(done) == 5 if workers == 1 else len(done) >= 5
    names = written(monkeypatch)
    settings = Settings(samples_per_shard=1)
    resumed = prepare("imagenet", source, tmp_path / "out", settings, workers=1)["train"]
    assert {Path(name).stem for name in names}.isdisjoint(done)
    assert len(names) == 40 - len(done)
    fresh = prepare("imagenet", source, tmp_path / "fresh", settings, workers=1)["train"]
    assert resumed.digest == fresh.digest
    assert contents(tmp_path / "out/train") == contents(tmp_path / "fresh/train")
    assert {path.name for path in (tmp_path / "out/train").iterdir()} == {
        FILE_NAME,
        *contents(tmp_path / "out/train"),
    }


def wait_for_group_to_end(group: int) -> None:
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("worker processes outlive their killed parent")
