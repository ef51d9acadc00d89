"""Samples to tensors, on threads, in the order of the plan.

Reading, decoding and resizing release the GIL, so threads in the training process share blocks and
hand over tensors without pickling (docs/decisions/0002-threads-for-loading.md).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from random import Random
from time import perf_counter
from types import TracebackType
from typing import Any, Self, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.config import Crop, EvalData, TrainData, as_size
from data_pipeline.dataset import BlockReader, Dataset, RawSample
from data_pipeline.decode import (
    Pixels,
    decode_class,
    decode_image,
    decode_image_scaled,
    decode_labels,
    decode_mask,
)
from data_pipeline.errors import DataError
from data_pipeline.plan import Plan, SampleIndex, eval_indices, sample_seed
from data_pipeline.transforms import (
    SegmentationAugmentation,
    Size,
    augment_classification,
    augment_segmentation,
    center_crop,
)

_Group = TypeVar("_Group")
_Result = TypeVar("_Result")

_Label = Pixels | NDArray[np.float32] | int
_Prepare = Callable[[RawSample, Random], tuple[Pixels, _Label]]
_Read = Callable[[int, int], RawSample]

_AREA = (0.08, 1.0)
_SCALE = (0.5, 2.0)
_IGNORE_LABEL = 255


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's part of a global batch.

    `images` is uint8 RGB `(B, 3, H, W)`, channels last in memory. `labels` is for segmentation
    uint8 `(B, H, W)`, for classification int64 `(B,)`, for multilabel float32 `(B, K)` of 0 and 1.
    """

    images: Tensor
    labels: Tensor
    keys: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EvalSample:
    """Sample `index` of a split: uint8 RGB `(3, H, W)`, its label as in `Batch` without the B."""

    image: Tensor
    label: Tensor
    key: str
    index: int


@dataclass(kw_only=True, eq=False)
class TrainLoader:
    """The batches of `slots` from `start_step` to before `stop_step`, once, in plan order.

    What it yields depends on the data, `seed`, `global_batch` and the step alone: not on `threads`,
    on `start_step` or on how slots are shared between ranks. Up to `prefetch` batches are in the
    works while the consumer holds one. Use it in a `with` statement: its threads end there.

    Raises:
        ValueError: the plan is impossible (see `Plan`).
        DataError: from the iteration, naming the sample that cannot be read or decoded.
    """

    dataset: Dataset
    task: str
    data: TrainData
    seed: int
    global_batch: int
    slots: range
    num_classes: int
    start_step: int = 0
    stop_step: int
    threads: int = 4
    prefetch: int = 4
    mean_pixel: tuple[float, float, float] = (127.5, 127.5, 127.5)
    wait_seconds: float = field(default=0.0, init=False)  # how long the consumer has waited so far
    _batches: Iterator[tuple["_Buffers", list[list[str]]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        plan = Plan(
            shard_samples=self.dataset.shard_samples,
            block_size=self.data.block_size,
            seed=self.seed,
            global_batch=self.global_batch,
        )
        read: _Read = self.dataset.read
        if self.data.block_size > 1:
            num_blocks = len(self.slots) + self.threads
            read = BlockReader(self.dataset, self.data.block_size, num_blocks).read
        new_buffers = partial(
            _Buffers.new, self.task, len(self.slots), as_size(self.data.crop), self.num_classes
        )
        source = _TrainSource(plan, self.slots, read, _train_preparation(self), new_buffers)
        # Nothing below refers to the loader, so dropping the loader ends its threads at once.
        groups = source.groups(range(self.start_step, self.stop_step), self.threads)
        self._batches = _run_in_order(groups, self.threads, self.prefetch)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        started = perf_counter()
        try:
            buffers, parts = next(self._batches)
        finally:
            self.wait_seconds += perf_counter() - started
        return Batch(
            images=torch.from_numpy(buffers.images).permute(0, 3, 1, 2),
            labels=torch.from_numpy(buffers.labels),
            keys=tuple(chain.from_iterable(parts)),
        )

    def close(self) -> None:
        """End the threads; nothing more is yielded."""
        self._batches.close()  # type: ignore[attr-defined]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class EvalLoader:
    """The samples `indices` of a split, each exactly once, in order.

    Segmentation: whole images of their own sizes. Other tasks: the central 0.875 of each, resized
    to `data.crop`, or to `crop` where that is None.

    Raises:
        ValueError: neither says how large the crop is.
        DataError: from the iteration, naming the sample that cannot be read or decoded.
    """

    dataset: Dataset
    task: str
    data: EvalData
    indices: Iterable[int]
    num_classes: int
    crop: Crop | None = None
    threads: int = 4

    def __iter__(self) -> Iterator[EvalSample]:
        """Start the threads; they end with the iterator."""
        for _, (sample,) in _run_in_order(self._groups(), self.threads, 2 * self.threads):
            yield sample

    def _groups(self) -> Iterator[tuple[None, list[Callable[[], EvalSample]]]]:
        prepare = _eval_preparation(self)
        for index in self.indices:
            yield None, [partial(self._load, int(index), prepare)]

    def _load(
        self, index: int, prepare: Callable[[RawSample], tuple[Pixels, _Label]]
    ) -> EvalSample:
        raw = self.dataset.read(*self.dataset.locate(index))
        with _naming(raw.key):
            image, label = prepare(raw)
            return EvalSample(
                image=torch.from_numpy(image).permute(2, 0, 1),
                label=torch.as_tensor(label),
                key=raw.key,
                index=index,
            )


@dataclass(frozen=True)
class _Buffers:
    """The memory of a batch, written in place by the threads."""

    images: Pixels  # (B, H, W, 3)
    labels: NDArray[Any]

    @classmethod
    def new(cls, task: str, batch: int, crop: Size, num_classes: int) -> "_Buffers":
        labels: NDArray[Any]
        if task == "segmentation":
            labels = np.empty((batch, *crop), np.uint8)
        elif task == "classification":
            labels = np.empty(batch, np.int64)
        else:
            labels = np.empty((batch, num_classes), np.float32)
        return cls(np.empty((batch, *crop, 3), np.uint8), labels)


@dataclass(frozen=True)
class _TrainSource:
    """Turns steps into buffers and the calls that fill them."""

    plan: Plan
    slots: range
    read: _Read
    prepare: _Prepare
    new_buffers: Callable[[], _Buffers]

    def groups(
        self, steps: range, threads: int
    ) -> Iterator[tuple[_Buffers, list[Callable[[], list[str]]]]]:
        # A call for each thread, not each sample: handing over costs up to a tenth of small images.
        calls = max(1, min(threads, len(self.slots)))
        parts = [eval_indices(len(self.slots), i, calls) for i in range(calls)]
        for step in steps:
            buffers = self.new_buffers()
            epoch = step // self.plan.steps_per_epoch
            samples = self.plan.samples(step, self.slots)
            yield buffers, [partial(self.fill, buffers, part, samples, epoch) for part in parts]

    def fill(
        self, buffers: _Buffers, places: range, samples: list[SampleIndex], epoch: int
    ) -> list[str]:
        """Write the samples of some places of the batch; gives their keys."""
        keys = []
        for place in places:
            raw = self.read(*samples[place])
            with _naming(raw.key):
                rng = Random(sample_seed(self.plan.seed, epoch, *samples[place]))
                buffers.images[place], buffers.labels[place] = self.prepare(raw, rng)
            keys.append(raw.key)
        return keys


def _run_in_order(
    groups: Iterable[tuple[_Group, list[Callable[[], _Result]]]], threads: int, ahead: int
) -> Iterator[tuple[_Group, list[_Result]]]:
    """Run the calls of each group on threads; yield groups with their results, in order.

    While the consumer holds a group, `ahead` more are running or done. Ends its threads when
    exhausted, closed or dropped; the first exception of a call is raised at its group's turn.
    """
    cv2.setNumThreads(0)  # ours are threads enough; OpenCV's own would compete with them
    running: deque[tuple[_Group, list[Future[_Result]]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="atrous-loader")

    def take_first() -> tuple[_Group, list[_Result]]:
        group, futures = running.popleft()
        return group, [future.result() for future in futures]

    try:
        for group, calls in groups:
            running.append((group, [pool.submit(call) for call in calls]))
            if len(running) > ahead:
                yield take_first()
        while running:
            yield take_first()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _naming(key: str) -> Iterator[None]:
    """Say which sample it was in an exception that does not know."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        error.add_note(f"while loading sample {key!r}")
        raise


def _train_preparation(loader: TrainLoader) -> _Prepare:
    """What turns a raw sample into the image and label of a training batch."""
    data, crop = loader.data, as_size(loader.data.crop)
    if loader.task == "segmentation":
        ignore = loader.dataset.manifest.ignore_label
        how = SegmentationAugmentation(
            crop=crop,
            scale=data.scale or _SCALE,
            scale_step=data.scale_step,
            flip=data.flip,
            mean_pixel=loader.mean_pixel,
            ignore_label=_IGNORE_LABEL if ignore is None else ignore,
        )
        return lambda raw, rng: augment_segmentation(*_image_and_mask(raw), rng, how)
    label = _label_decoder(loader.task, loader.num_classes)
    area, flip = data.area or _AREA, data.flip

    def prepare(raw: RawSample, rng: Random) -> tuple[Pixels, _Label]:
        size = (raw.height, raw.width)
        return augment_classification(_decoder(raw), size, rng, crop, area, flip), label(raw)

    return prepare


def _eval_preparation(loader: EvalLoader) -> Callable[[RawSample], tuple[Pixels, _Label]]:
    """What turns a raw sample into the image and label to evaluate."""
    if loader.task == "segmentation":
        return _image_and_mask
    crop = loader.data.crop or loader.crop
    if crop is None:
        raise ValueError(f"{loader.task}: set crop in the evaluation data, e.g. 224")
    size = as_size(crop)
    label = _label_decoder(loader.task, loader.num_classes)
    return lambda raw: (center_crop(_decoder(raw), (raw.height, raw.width), size), label(raw))


def _decoder(raw: RawSample) -> Callable[[int, int], Pixels]:
    return lambda height, width: decode_image_scaled(
        raw.image, raw.key, min_height=height, min_width=width
    )


def _image_and_mask(raw: RawSample) -> tuple[Pixels, Pixels]:
    image, mask = decode_image(raw.image, raw.key), decode_mask(raw.label, raw.key)
    if image.shape[:2] != mask.shape:
        raise DataError(
            f"{raw.key}: the image has {image.shape[:2]} pixels, its mask {mask.shape}; "
            "correct the pair and prepare the data set again"
        )
    return image, mask


def _label_decoder(task: str, num_classes: int) -> Callable[[RawSample], _Label]:
    def checked(labels: list[int], key: str) -> list[int]:
        if any(label >= num_classes for label in labels):
            raise DataError(f"{key}: class {max(labels)} in a data set of {num_classes} classes")
        return labels

    def one(raw: RawSample) -> int:
        return checked([decode_class(raw.label, raw.key)], raw.key)[0]

    def several(raw: RawSample) -> NDArray[np.float32]:
        target = np.zeros(num_classes, np.float32)
        target[checked(decode_labels(raw.label, raw.key), raw.key)] = 1
        return target

    if task not in ("classification", "multilabel"):
        raise ValueError(f"task {task!r}: know classification, multilabel and segmentation")
    return one if task == "classification" else several
