"""Samples that cannot be read or decoded: the job fails, or others take their place.

Which others is a pure function of (seed, epoch, sample), as everything else about a sample is: it
depends on no rank, number of workers or threads, and a run that goes on replaces the same.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError, StorageUnavailable
from data_pipeline.plan import SampleIndex, hash_words

_Result = TypeVar("_Result")

_SUBSTITUTE = 4  # what a hash is for; the plan has 1, 2 and 3
_ATTEMPTS = 16  # with every second sample bad, one of 65,000 replacements fails


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that another one replaced: where it lies, and what is wrong with it."""

    shard: str
    row: int
    reason: str


def substitutes(seed: int, dataset: Dataset) -> Iterator[SampleIndex]:
    """The samples to try in place of the one whose `sample_seed` is `seed`, each once."""
    tried = set()
    for attempt in range(_ATTEMPTS):
        index = hash_words(_SUBSTITUTE, seed, attempt) % dataset.num_samples
        if index not in tried:
            tried.add(index)
            yield dataset.locate(index)


def first_good(
    load: Callable[[SampleIndex], _Result],
    sample: SampleIndex,
    seed: int,
    dataset: Dataset,
) -> tuple[_Result, tuple[BadSample, ...]]:
    """What `load` makes of `sample` or, where that is bad, of its first good substitute.

    Raises:
        StorageUnavailable: as `load` does; no sample is bad because a store is down.
        DataError: the substitutes are bad too.
    """
    bad: dict[SampleIndex, BadSample] = {}
    try:
        return load(sample), ()
    except StorageUnavailable:
        raise
    except DataError as error:
        bad[sample] = _bad_sample(dataset, sample, error)
    for other in substitutes(seed, dataset):
        if other in bad:
            continue
        try:
            return load(other), tuple(bad.values())
        except StorageUnavailable:
            raise
        except DataError as error:
            bad[other] = _bad_sample(dataset, other, error)
    raise DataError(
        f"{bad[sample].reason}; {len(bad) - 1} others that were to replace it are bad too, the "
        f"last: {bad[other].reason}"
    )


def _bad_sample(dataset: Dataset, sample: SampleIndex, error: DataError) -> BadSample:
    shard = dataset.manifest.shards[sample.shard].name
    return BadSample(shard=shard, row=sample.row, reason=str(error))
