"""Bad samples through the loader: named, or replaced by others that depend on nothing else."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
import torch

from data_pipeline.bad_samples import substitutes
from data_pipeline.config import EvalData, TrainData
from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError, StorageUnavailable
from data_pipeline.formats.sample import Sample
from data_pipeline.loader import Batch, EvalLoader, TrainLoader
from data_pipeline.plan import sample_seed, slots_of_rank
from tests.unit.data_pipeline.conftest import tiny_sample

SHARDS = (9, 4, 14)
GLOBAL_BATCH = 4
STEPS = 15  # two and a half epochs of six steps
BAD = (3, 11, 20)


def broken(task: str, index: int) -> Sample:
    """As tiny_sample; the images of BAD are cut in half."""
    sample = tiny_sample(task, index)
    half = sample.image[: len(sample.image) // 2]
    return replace(sample, image=half) if index in BAD else sample


def train_loader(dataset: Dataset, **changes: Any) -> TrainLoader:
    block_size = changes.pop("block_size", 1)
    values = {
        "dataset": dataset,
        "task": dataset.manifest.task,
        "data": TrainData(dataset="tiny", crop=17, block_size=block_size),
        "seed": 5,
        "global_batch": GLOBAL_BATCH,
        "slots": range(GLOBAL_BATCH),
        "num_classes": 5,
        "stop_step": STEPS,
        "threads": 2,
        "on_bad_sample": "skip",
    }
    return TrainLoader(**values | changes)


def batches(dataset: Dataset, **changes: Any) -> list[Batch]:
    with train_loader(dataset, **changes) as loader:
        return list(loader)


def assert_same(some: list[Batch], others: list[Batch]) -> None:
    assert len(some) == len(others)
    for a, b in zip(some, others, strict=True):
        assert (a.keys, a.bad) == (b.keys, b.bad)
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def joined(ranks: tuple[Batch, ...]) -> Batch:
    return Batch(
        images=torch.cat([batch.images for batch in ranks]),
        labels=torch.cat([batch.labels for batch in ranks]),
        keys=sum((batch.keys for batch in ranks), ()),
        bad=sum((batch.bad for batch in ranks), ()),
    )


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("task", ["segmentation", "classification", "multilabel"])
def test_bad_samples_are_replaced_and_nothing_else_changes(
    make_dataset: Any, task: str, block_size: int, tmp_path: Any
) -> None:
    dataset = make_dataset(task, SHARDS, broken)
    found = batches(dataset, block_size=block_size)
    bad = [f"picture{index:03d}" for index in BAD]
    keys = [key for batch in found for key in batch.keys]
    assert len(keys) == STEPS * GLOBAL_BATCH
    assert not set(bad) & set(keys)
    reasons = [sample.reason for batch in found for sample in batch.bad]
    assert all(any(key in reason for reason in reasons) for key in bad)
    assert all("cannot decode the image" in reason and ".tar: " in reason for reason in reasons)
    rows = {(sample.shard, sample.row) for batch in found for sample in batch.bad}
    assert rows == {("00000.tar", 3), ("00001.tar", 2), ("00002.tar", 7)}


def test_only_the_bad_samples_slots_change(make_dataset: Any) -> None:
    dataset = make_dataset("classification", SHARDS, broken)
    plan = [
        [dataset.read(*sample).key for sample in samples]
        for samples in (_plan_samples(dataset, step) for step in range(STEPS))
    ]
    changed = 0
    for batch, keys in zip(batches(dataset), plan, strict=True):
        for key, planned in zip(batch.keys, keys, strict=True):
            if int(planned.removeprefix("picture")) in BAD:
                changed += 1
                assert key != planned
            else:
                assert key == planned
    assert changed >= 2 * len(BAD) - 2


def _plan_samples(dataset: Dataset, step: int) -> list[Any]:
    from data_pipeline.plan import Plan

    plan = Plan(
        shard_samples=dataset.shard_samples, block_size=1, seed=5, global_batch=GLOBAL_BATCH
    )
    return plan.samples(step, range(GLOBAL_BATCH))


@pytest.mark.parametrize("block_size", [1, 4])
def test_ranks_threads_and_resuming_do_not_matter(make_dataset: Any, block_size: int) -> None:
    dataset = make_dataset("segmentation", SHARDS, broken)
    alone = batches(dataset, block_size=block_size, threads=1)
    assert sum(len(batch.bad) for batch in alone) >= 2 * len(BAD) - 2
    assert_same(alone, batches(dataset, block_size=block_size, threads=4, prefetch=7))
    for world in (2, 3, 4):
        slots = [slots_of_rank(GLOBAL_BATCH, rank, world) for rank in range(world)]
        ranks = [batches(dataset, slots=part, block_size=block_size) for part in slots]
        assert_same(alone, [joined(step) for step in zip(*ranks, strict=True)])
    for step in (1, 6, 7, 13):
        tail = batches(dataset, block_size=block_size, start_step=step)
        assert_same(alone[step:], tail)


def test_substitutes_differ_by_seed_epoch_and_sample(make_dataset: Any) -> None:
    dataset = make_dataset("classification", (50, 50))
    seeds = [sample_seed(*words) for words in ((0, 0, 0, 1), (1, 0, 0, 1), (0, 1, 0, 1))]
    orders = [tuple(substitutes(seed, dataset)) for seed in seeds]
    assert len(set(orders)) == 3
    assert orders[0] == tuple(substitutes(seeds[0], dataset))
    assert all(len(set(order)) == len(order) > 10 for order in orders)


def test_where_all_are_bad_the_search_ends(make_dataset: Any) -> None:
    def all_broken(task: str, index: int) -> Sample:
        return replace(tiny_sample(task, index), image=b"")

    dataset = make_dataset("classification", SHARDS, all_broken)
    with (
        train_loader(dataset) as loader,
        pytest.raises(DataError, match=r"is empty.*\d+ others that were to replace it are bad too"),
    ):
        next(loader)


def test_a_store_that_is_down_is_no_bad_sample(
    make_dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset("classification", SHARDS)

    read, attempts = Dataset.read, iter(range(1000))

    def down_at_first(self: Dataset, shard: int, row: int) -> Any:
        if next(attempts) == 0:
            raise StorageUnavailable("s3://bucket: no answer for 120 s")
        return read(self, shard, row)

    monkeypatch.setattr(Dataset, "read", down_at_first)
    with train_loader(dataset) as loader, pytest.raises(StorageUnavailable, match="no answer"):
        next(loader)


def test_a_store_that_goes_down_while_substitutes_are_read(
    make_dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset("classification", SHARDS)
    answers = iter([DataError("picture: damaged"), StorageUnavailable("no answer for 120 s")])

    def read(*_: Any) -> None:
        raise next(answers)

    monkeypatch.setattr(Dataset, "read", read)
    with (
        train_loader(dataset, global_batch=1, slots=range(1), threads=1, prefetch=1) as loader,
        pytest.raises(StorageUnavailable, match="no answer"),
    ):
        next(loader)


def test_a_shard_that_vanished_is_named(make_dataset: Any) -> None:
    dataset = make_dataset("classification", SHARDS)
    directory = _directory(dataset)
    (directory / "00001.tar").unlink()
    with (
        train_loader(dataset, on_bad_sample="fail") as loader,
        pytest.raises(DataError, match=r"00001\.tar"),
    ):
        list(loader)
    replaced = [sample for batch in batches(dataset) for sample in batch.bad]
    assert {sample.shard for sample in replaced} == {"00001.tar"}
    assert {sample.row for sample in replaced} == {0, 1, 2, 3}


def test_a_shard_cut_short_is_named(make_dataset: Any) -> None:
    dataset = make_dataset("classification", SHARDS)
    path = _directory(dataset) / "00002.tar"
    end = dataset.manifest.read_rows(2)["image_offset"][12].as_py()
    path.write_bytes(path.read_bytes()[:end])
    with (
        train_loader(dataset, on_bad_sample="fail") as loader,
        pytest.raises(DataError, match=r"00002\.tar"),
    ):
        list(loader)
    replaced = [sample for batch in batches(dataset) for sample in batch.bad]
    assert {(sample.shard, sample.row) for sample in replaced} == {
        ("00002.tar", 12),
        ("00002.tar", 13),
    }


def _directory(dataset: Dataset) -> Any:
    from pathlib import Path

    return Path(str(dataset.manifest.path)).parent


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def jpeg(height: int, width: int) -> bytes:
    return simplejpeg.encode_jpeg(np.full((height, width, 3), 90, np.uint8))


Change = Callable[[Sample], dict[str, Any]]
IMAGES: dict[str, tuple[Change, str]] = {
    "empty": (lambda _: {"image": b""}, "cannot decode the image.*is empty"),
    "error page": (
        lambda _: {"image": b"<!DOCTYPE html><title>404</title>"},
        "cannot decode the image.*<!DOCTYPE",
    ),
    "truncated": (lambda s: {"image": s.image[:-40]}, "cannot decode the image"),
    "bomb": (
        lambda s: {"image": _claiming(s.image, 60_000)},
        "cannot decode the image.*(limit of|exceeds)",
    ),
}
MASKS: dict[str, tuple[Change, str]] = {
    "missing": (lambda _: {"label": b""}, "cannot decode the mask.*is empty"),
    "another size": (
        lambda _: {"label": png(np.zeros((9, 9), np.uint8))},
        r"the image has .* its mask \(9, 9\)",
    ),
    "sixteen bits": (
        lambda s: {"label": png(np.zeros((s.height, s.width), np.uint16))},
        "cannot decode the mask.*bit depth 16",
    ),
    "colours": (
        lambda s: {"label": png(np.zeros((s.height, s.width, 3), np.uint8))},
        "cannot decode the mask.*colour type 2",
    ),
    "an unknown id": (
        lambda s: {"label": png(np.full((s.height, s.width), 7, np.uint8))},
        r"the mask has ids \[7\] in a data set of 5 classes",
    ),
    "a JPEG": (lambda s: {"label": jpeg(s.height, s.width)}, "cannot decode the mask.*not a PNG"),
}
CLASSES: dict[str, tuple[Change, str]] = {
    "missing": (lambda _: {"label": b""}, "class b'' is not a number"),
    "too high": (lambda _: {"label": b"5"}, "class 5 in a data set of 5 classes"),
}
CASES = [
    pytest.param(task, change, message, id=f"{task}, {name}")
    for task, kind in (
        ("segmentation", IMAGES | MASKS),
        ("classification", IMAGES | CLASSES),
    )
    for name, (change, message) in kind.items()
]


def _claiming(image: bytes, side: int) -> bytes:
    """A JPEG whose header claims `side` x `side` pixels."""
    start = image.index(b"\xff\xc0") + 5
    return image[:start] + side.to_bytes(2, "big") * 2 + image[start + 4 :]


@pytest.mark.parametrize(("task", "change", "message"), CASES)
def test_every_fault_is_named_or_replaced(
    make_dataset: Any, task: str, change: Change, message: str
) -> None:
    def sample(task: str, index: int) -> Sample:
        whole = tiny_sample(task, index)
        return replace(whole, **change(whole)) if index == 5 else whole

    dataset = make_dataset(task, SHARDS, sample)
    with (
        train_loader(dataset, on_bad_sample="fail") as loader,
        pytest.raises(DataError, match=rf"00000\.tar: picture005: {message}"),
    ):
        list(loader)
    assert not [t for t in threading.enumerate() if t.name.startswith("atrous-loader")]
    replaced = {sample for batch in batches(dataset) for sample in batch.bad}
    assert {(sample.shard, sample.row) for sample in replaced} == {("00000.tar", 5)}


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (2, 2)])
@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_odd_shapes_are_no_faults(make_dataset: Any, task: str, shape: tuple[int, int]) -> None:
    def sample(task: str, index: int) -> Sample:
        whole = tiny_sample(task, index)
        label = png(np.ones(shape, np.uint8)) if task == "segmentation" else whole.label
        return replace(whole, image=jpeg(*shape), label=label, height=shape[0], width=shape[1])

    dataset = make_dataset(task, (4,), sample)
    found = batches(dataset, on_bad_sample="fail", stop_step=4)
    assert [batch.images.shape for batch in found] == [(4, 3, 17, 17)] * 4
    if task == "classification":
        assert all(abs(int(value) - 90) < 3 for value in found[0].images.unique())


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_evaluation_leaves_no_sample_out(make_dataset: Any, task: str) -> None:
    dataset = make_dataset(task, SHARDS, broken)
    loader = EvalLoader(
        dataset=dataset,
        task=task,
        data=EvalData(dataset="tiny", crop=16),
        indices=range(dataset.num_samples),
        num_classes=5,
    )
    with pytest.raises(DataError, match=r"00000.tar: picture003: .*evaluation counts every sample"):
        list(loader)
