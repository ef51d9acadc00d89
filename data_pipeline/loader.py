"""Samples to tensors, on threads, in the order of the plan.

Reading, decoding and resizing release the GIL, so threads in the training process share blocks and
hand over tensors without pickling (docs/decisions/0002-threads-for-loading.md).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, tee
from random import Random
from time import perf_counter
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from data_pipeline.bad_samples import BadSample, first_good
from data_pipeline.blocks import BlockReader
from data_pipeline.config import Crop, EvalData, OnBadSample, TrainData, as_size
from data_pipeline.dataset import Dataset, RawSample
from data_pipeline.decode import Pixels
from data_pipeline.errors import DataError, StorageUnavailable
from data_pipeline.in_order import InOrder
from data_pipeline.kept_pixels import KeptPixels
from data_pipeline.plan import Plan, SampleIndex, eval_indices, sample_seed
from data_pipeline.samples import Buffers, Label, Write, evaluation_decoder, training_writer

_Read = Callable[[int, int], RawSample]
_Loaded = tuple[str, tuple[BadSample, ...]]  # the key, and what it replaced

_EVAL_BLOCK = 32  # neighbouring samples of a remote data set that evaluation reads together


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's part of a global batch.

    `images` is uint8 RGB `(B, 3, H, W)`, channels last in memory. `labels` is for segmentation
    uint8 `(B, H, W)`, for classification int64 `(B,)`, for multilabel float32 `(B, K)` of 0 and 1.
    `bad` are the samples that others in it replace, and the bad ones among those others.
    """

    images: Tensor
    labels: Tensor
    keys: tuple[str, ...]
    bad: tuple[BadSample, ...] = ()


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

    Where `on_bad_sample` is "skip", others replace samples that cannot be read or decoded; the
    batch says so, and how many are too many is up to the consumer.

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
    on_bad_sample: OnBadSample = "fail"
    mean_pixel: tuple[float, float, float] = (127.5, 127.5, 127.5)
    kept_pixels: KeptPixels | None = None  # of a segmentation data set
    wait_seconds: float = field(default=0.0, init=False)  # how long the consumer has waited so far
    _batches: InOrder[Buffers, list[_Loaded]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        plan = Plan(
            shard_samples=self.dataset.shard_samples,
            block_size=self.data.block_size,
            seed=self.seed,
            global_batch=self.global_batch,
        )
        steps = range(self.start_step, self.stop_step)
        reader = BlockReader(
            self.dataset,
            self.data.block_size,
            num_blocks=len(self.slots) + self.threads,
            # A plan of its own: the other one is still in the last epoch when this one is ahead.
            upcoming=_upcoming(replace(plan), steps, self.slots),
        )
        new_buffers = partial(
            Buffers.new, self.task, len(self.slots), as_size(self.data.crop), self.num_classes
        )
        source = _TrainSource(
            dataset=self.dataset,
            plan=plan,
            slots=self.slots,
            reader=reader,
            write=training_writer(
                self.task,
                self.dataset,
                self.data,
                self.num_classes,
                self.mean_pixel,
                self.kept_pixels,
            ),
            new_buffers=new_buffers,
            on_bad_sample=self.on_bad_sample,
        )
        # Nothing below refers to the loader, so dropping the loader ends its threads at once.
        groups = source.groups(steps, self.threads)
        self._batches = InOrder(groups, self.threads, self.prefetch)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        started = perf_counter()
        try:
            buffers, parts = next(self._batches)
        finally:
            self.wait_seconds += perf_counter() - started
        keys, bad = zip(*chain.from_iterable(parts), strict=True)
        return Batch(
            images=torch.from_numpy(buffers.images).permute(0, 3, 1, 2),
            labels=torch.from_numpy(buffers.labels),
            keys=keys,
            bad=tuple(chain.from_iterable(bad)),
        )

    def close(self) -> None:
        """End the threads, from any thread; nothing more is yielded."""
        self._batches.close()

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
        with closing(InOrder(self._groups(), self.threads, 2 * self.threads)) as groups:
            for _, (sample,) in groups:
                yield sample

    def _groups(self) -> Iterator[tuple[None, list[Callable[[], EvalSample]]]]:
        prepare = evaluation_decoder(
            self.task, self.dataset, self.num_classes, self.data.crop or self.crop
        )
        indices, ahead = tee(self.indices)
        upcoming = ((i, self.dataset.locate(int(index))) for i, index in enumerate(ahead))
        block_size = _EVAL_BLOCK if self.dataset.remote else 1
        with BlockReader(self.dataset, block_size, self.threads + 1, upcoming) as reader:
            for i, index in enumerate(indices):
                reader.advance(i)
                yield None, [partial(self._load, int(index), reader.read, prepare)]

    def _load(
        self, index: int, read: _Read, prepare: Callable[[RawSample], tuple[Pixels, Label]]
    ) -> EvalSample:
        place = self.dataset.locate(index)
        try:
            raw = read(*place)
            with _naming(raw.key, self.dataset.manifest.shards[place.shard].name):
                image, label = prepare(raw)
        except StorageUnavailable:
            raise
        except DataError as error:
            raise DataError(
                f"{error}; evaluation counts every sample, so on_bad_sample is not for it"
            ) from error
        return EvalSample(
            image=torch.from_numpy(image).permute(2, 0, 1),
            label=torch.as_tensor(label),
            key=raw.key,
            index=index,
        )


@dataclass(frozen=True, kw_only=True)
class _TrainSource:
    """Turns steps into buffers and the calls that fill them."""

    dataset: Dataset
    plan: Plan
    slots: range
    reader: BlockReader
    write: Write
    new_buffers: Callable[[], Buffers]
    on_bad_sample: OnBadSample

    def groups(
        self, steps: range, threads: int
    ) -> Iterator[tuple[Buffers, list[Callable[[], list[_Loaded]]]]]:
        # A call for each thread, not each sample: handing over costs up to a tenth of small images.
        calls = max(1, min(threads, len(self.slots)))
        parts = [eval_indices(len(self.slots), i, calls) for i in range(calls)]
        with self.reader:
            for step in steps:
                self.reader.advance(step)
                buffers = self.new_buffers()
                epoch = step // self.plan.steps_per_epoch
                samples = self.plan.samples(step, self.slots)
                yield buffers, [partial(self.fill, buffers, part, samples, epoch) for part in parts]

    def fill(
        self, buffers: Buffers, places: range, samples: list[SampleIndex], epoch: int
    ) -> list[_Loaded]:
        """Write the samples of some places of the batch."""
        return [self._fill(buffers, place, samples[place], epoch) for place in places]

    def _fill(self, buffers: Buffers, place: int, sample: SampleIndex, epoch: int) -> _Loaded:
        seed = sample_seed(self.plan.seed, epoch, *sample)

        def load(index: SampleIndex) -> str:
            # A substitute's whole block would push out one that a slot is still reading.
            raw = (self.reader if index == sample else self.dataset).read(*index)
            with _naming(raw.key, self.dataset.manifest.shards[index.shard].name):
                self.write(raw, Random(seed), buffers, place)
            return raw.key

        if self.on_bad_sample == "fail":
            return load(sample), ()
        return first_good(load, sample, seed, self.dataset)


def _upcoming(plan: Plan, steps: range, slots: range) -> Iterator[tuple[int, SampleIndex]]:
    return ((step, sample) for step in steps for sample in plan.samples(step, slots))


@contextmanager
def _naming(key: str, shard: str) -> Iterator[None]:
    """Say which sample it was in an exception that does not know, and where that lies."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{shard}: {error}") from error
    except Exception as error:
        error.add_note(f"while loading sample {key!r} of {shard}")
        raise
