"""The loader's promises: order, resume, any number of ranks and threads, errors, and clean ends."""

import gc
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline import samples as samples_module
from data_pipeline.config import EvalData, TrainData
from data_pipeline.dataset import Dataset
from data_pipeline.decode import decode_image, decode_mask
from data_pipeline.errors import DataError
from data_pipeline.loader import Batch, EvalLoader, TrainLoader
from data_pipeline.plan import Plan, eval_indices, slots_of_rank

SHARDS = (9, 4, 14)
GLOBAL_BATCH = 4
STEPS = 15  # two and a half epochs of six steps
TASKS = ("segmentation", "classification", "multilabel")


@pytest.fixture(params=TASKS)
def dataset(request: pytest.FixtureRequest, make_dataset: Any) -> Dataset:
    return make_dataset(request.param, SHARDS)


@pytest.fixture
def pictures(make_dataset: Any) -> Dataset:
    return make_dataset("classification", SHARDS)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert loader_threads() == []


def loader_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("atrous-loader")]


def train_loader(dataset: Dataset, **changes: Any) -> TrainLoader:
    data = {"dataset": "tiny", "crop": 17, "block_size": changes.pop("block_size", 1)}
    values = {
        "dataset": dataset,
        "task": dataset.manifest.task,
        "data": TrainData(**data),
        "seed": 5,
        "global_batch": GLOBAL_BATCH,
        "slots": range(GLOBAL_BATCH),
        "num_classes": 5,
        "stop_step": STEPS,
        "threads": 2,
        "prefetch": 2,
    }
    return TrainLoader(**values | changes)


def batches(dataset: Dataset, **changes: Any) -> list[Batch]:
    with train_loader(dataset, **changes) as loader:
        return list(loader)


def assert_same(some: list[Batch], others: list[Batch]) -> None:
    assert len(some) == len(others)
    for a, b in zip(some, others, strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def joined(ranks: tuple[Batch, ...]) -> Batch:
    return Batch(
        images=torch.cat([batch.images for batch in ranks]),
        labels=torch.cat([batch.labels for batch in ranks]),
        keys=sum((batch.keys for batch in ranks), ()),
    )


def test_shapes_and_types(dataset: Dataset) -> None:
    shapes = {
        "segmentation": (torch.uint8, (4, 17, 17)),
        "classification": (torch.int64, (4,)),
        "multilabel": (torch.float32, (4, 5)),
    }
    for batch in batches(dataset):
        assert batch.images.shape == (4, 3, 17, 17)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert (batch.labels.dtype, batch.labels.shape) == shapes[dataset.manifest.task]


def test_labels_belong_to_their_keys(dataset: Dataset) -> None:
    for batch in batches(dataset):
        for key, label in zip(batch.keys, batch.labels, strict=True):
            index = int(key.removeprefix("picture"))
            if dataset.manifest.task == "classification":
                assert label == index % 5
            elif dataset.manifest.task == "multilabel":
                assert label.nonzero().flatten().tolist() == sorted({index % 4, 4})
            else:
                assert set(label.unique().tolist()) <= {0, 1, 2, 3, 4, 255}


@pytest.mark.parametrize("block_size", [1, 4])
def test_keys_follow_the_plan(pictures: Dataset, block_size: int) -> None:
    plan = Plan(shard_samples=SHARDS, block_size=block_size, seed=5, global_batch=GLOBAL_BATCH)
    expected = [
        tuple(pictures.read(*sample).key for sample in plan.samples(step, range(GLOBAL_BATCH)))
        for step in range(STEPS)
    ]
    assert [batch.keys for batch in batches(pictures, block_size=block_size)] == expected


@pytest.mark.parametrize("block_size", [1, 4])
def test_threads_do_not_matter(
    dataset: Dataset, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = batches(dataset, block_size=block_size, threads=1, prefetch=1)
    read = Dataset.read

    def hesitant(self: Dataset, shard: int, row: int) -> Any:
        sleep(0.01 * Random(17 * shard + row).random())  # lets later samples overtake
        return read(self, shard, row)

    monkeypatch.setattr(Dataset, "read", hesitant)
    assert_same(alone, batches(dataset, block_size=block_size, threads=4, prefetch=3))


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_world_size_does_not_matter(dataset: Dataset, world: int, block_size: int) -> None:
    slots = [slots_of_rank(GLOBAL_BATCH, rank, world) for rank in range(world)]
    ranks = [batches(dataset, slots=part, block_size=block_size) for part in slots]
    together = [joined(step) for step in zip(*ranks, strict=True)]
    assert_same(together, batches(dataset, block_size=block_size))


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_resumed_run_is_the_tail(dataset: Dataset, block_size: int) -> None:
    uninterrupted = batches(dataset, block_size=block_size)
    for step in range(STEPS + 1):
        tail = batches(dataset, block_size=block_size, start_step=step)
        assert_same(tail, uninterrupted[step:])


def test_seeds_and_epochs_augment_differently(make_dataset: Any) -> None:
    dataset = make_dataset("segmentation", (1,))
    data = TrainData(dataset="tiny", crop=17, scale=(1, 2), scale_step=0)
    changes = {"data": data, "global_batch": 1, "slots": range(1)}
    runs = [batches(dataset, seed=seed, **changes) for seed in (0, 1)]
    images = [batch.images.numpy().tobytes() for run in runs for batch in run]
    assert len(set(images)) == len(images) == 2 * STEPS


def test_mean_pixel_and_ignore_label_fill_the_padding(make_dataset: Any) -> None:
    dataset = make_dataset("segmentation", SHARDS)
    data = TrainData(dataset="tiny", crop=64, scale=(1, 1), flip=False)
    batch = batches(dataset, data=data, mean_pixel=(10.0, 20.0, 30.0))[0]
    corner = batch.images[:, :, -1, -1]
    assert corner.tolist() == [[10, 20, 30]] * GLOBAL_BATCH
    assert (batch.labels[:, -1] == 255).all()
    assert (batch.labels[:, 0, 0] < 5).all()


def test_no_steps_no_batches(pictures: Dataset) -> None:
    assert batches(pictures, start_step=3, stop_step=3) == []


def break_sample(dataset: Dataset, index: int) -> None:
    """Overwrite the image of one sample in its shard with zeros."""
    shard, row = dataset.locate(index)
    rows = dataset.manifest.read_rows(shard)
    assert dataset.manifest.path is not None
    path = dataset.manifest.path.parent / dataset.manifest.shards[shard].name
    content = bytearray(path.read_bytes())
    offset, size = rows["image_offset"][row].as_py(), rows["image_size"][row].as_py()
    content[offset : offset + size] = bytes(size)
    path.write_bytes(content)


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_broken_sample_is_named_at_its_turn(dataset: Dataset, block_size: int) -> None:
    whole = batches(dataset, block_size=block_size)
    turn, key = 4, whole[4].keys[2]
    if any(key in batch.keys for batch in whole[:turn]):
        pytest.fail("the sample should appear first in step 4: epochs have six steps")
    break_sample(dataset, int(key.removeprefix("picture")))
    with train_loader(dataset, block_size=block_size) as loader:
        assert_same([next(loader) for _ in range(turn)], whole[:turn])
        with pytest.raises(DataError, match=rf"\.tar: sample '{key}'.*checksum"):
            next(loader)
        assert list(loader) == []


def test_an_unforeseen_error_names_the_sample(
    pictures: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(samples_module, "augment_classification", fail)
    with train_loader(pictures) as loader, pytest.raises(RuntimeError, match="luck") as caught:
        next(loader)
    assert re.match(
        r"while loading sample 'picture0\d\d' of 0000\d\.tar", caught.value.__notes__[0]
    )


def test_a_class_out_of_range_is_named(pictures: Dataset) -> None:
    with pytest.raises(DataError, match=r"picture\d+: class 4 in a data set of 4 classes"):
        batches(pictures, num_classes=4)


def test_sizes_that_differ_are_named(make_dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset("segmentation", SHARDS)
    monkeypatch.setattr(samples_module, "decode_mask", lambda *_: np.zeros((3, 3), np.uint8))
    with pytest.raises(DataError, match=r"picture\d+: the image has .* its mask \(3, 3\)"):
        batches(dataset)


def test_an_unknown_task_is_refused(pictures: Dataset) -> None:
    with pytest.raises(ValueError, match="task 'detection'"):
        train_loader(pictures, task="detection")


def test_close_ends_the_threads_and_the_batches(pictures: Dataset) -> None:
    loader = train_loader(pictures)
    next(loader)
    assert len(loader_threads()) > 0
    loader.close()
    assert loader_threads() == []
    assert list(loader) == []


def test_leaving_by_exception_ends_the_threads(pictures: Dataset) -> None:
    def fail() -> None:
        with train_loader(pictures) as loader:
            next(loader)
            raise KeyError("the consumer's own")

    with pytest.raises(KeyError):
        fail()
    assert loader_threads() == []


def test_dropping_the_loader_ends_the_threads_without_the_collector(pictures: Dataset) -> None:
    gc.disable()
    try:
        loader = train_loader(pictures)
        next(loader)
        del loader
        assert loader_threads() == []
    finally:
        gc.enable()


def test_no_more_than_prefetch_batches_are_begun(
    pictures: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []
    new = samples_module.Buffers.new.__func__  # type: ignore[attr-defined]

    def counted(cls: type, *arguments: Any) -> Any:
        begun.append(arguments)
        return new(cls, *arguments)

    monkeypatch.setattr(samples_module.Buffers, "new", classmethod(counted))
    with train_loader(pictures, prefetch=3) as loader:
        for taken in range(1, 6):
            next(loader)
            assert len(begun) == taken + 3


def test_wait_seconds_is_the_time_waited(
    pictures: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Dataset.read

    def slow(self: Dataset, shard: int, row: int) -> Any:
        sleep(0.02)
        return read(self, shard, row)

    monkeypatch.setattr(Dataset, "read", slow)
    with train_loader(pictures, threads=1, stop_step=3) as loader:
        started = monotonic()
        for _ in loader:
            pass
        elapsed = monotonic() - started
    assert 3 * GLOBAL_BATCH * 0.02 <= loader.wait_seconds <= elapsed


def eval_loader(dataset: Dataset, **changes: Any) -> EvalLoader:
    values = {
        "dataset": dataset,
        "task": dataset.manifest.task,
        "data": EvalData(dataset="tiny"),
        "indices": range(dataset.num_samples),
        "num_classes": 5,
        "crop": 16,
        "threads": 3,
    }
    return EvalLoader(**values | changes)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_evaluation_sees_each_sample_once_in_order(dataset: Dataset, world: int) -> None:
    total = dataset.num_samples
    ranks = [eval_loader(dataset, indices=eval_indices(total, r, world)) for r in range(world)]
    samples = [sample for rank in ranks for sample in rank]
    assert [sample.index for sample in samples] == list(range(total))
    assert [sample.key for sample in samples] == [f"picture{i:03d}" for i in range(total)]


def test_evaluation_of_segmentation_keeps_sizes(make_dataset: Any) -> None:
    dataset = make_dataset("segmentation", SHARDS)
    for sample in eval_loader(dataset):
        raw = dataset.read(*dataset.locate(sample.index))
        assert sample.image.shape == (3, raw.height, raw.width)
        assert sample.label.shape == (raw.height, raw.width)
        assert sample.image.dtype == sample.label.dtype == torch.uint8
        image, mask = decode_image(raw.image, raw.key), decode_mask(raw.label, raw.key)
        assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), image)
        assert np.array_equal(sample.label.numpy(), mask)


@pytest.mark.parametrize(("crop", "expected"), [(None, (16, 16)), ((8, 12), (8, 12))])
def test_evaluation_of_classes_crops(
    pictures: Dataset, crop: Any, expected: tuple[int, int]
) -> None:
    for sample in eval_loader(pictures, data=EvalData(dataset="tiny", crop=crop)):
        assert sample.image.shape == (3, *expected)
        assert sample.label.dtype == torch.int64
        assert sample.label == sample.index % 5


def test_evaluation_without_a_crop_says_so(pictures: Dataset) -> None:
    with pytest.raises(ValueError, match="set crop in the evaluation data"):
        list(eval_loader(pictures, crop=None))


def test_evaluation_may_stop_early_and_start_again(pictures: Dataset) -> None:
    loader = eval_loader(pictures)
    for sample in loader:
        if sample.index == 3:
            break
    del sample
    assert len(list(loader)) == pictures.num_samples


def test_evaluation_names_a_broken_sample(pictures: Dataset, tmp_path: Path) -> None:
    break_sample(pictures, 7)
    with pytest.raises(DataError, match=r"sample 'picture007'.*checksum.*counts every sample"):
        list(eval_loader(pictures))
