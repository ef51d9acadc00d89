"""The bad samples of a run: counted over all workers, logged, and too many of them stop it."""

import logging
from collections.abc import Sequence

import torch

from data_pipeline.bad_samples import BadSample
from data_pipeline.config import DataConfig
from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from orchestrator.runs.record import Metrics
from orchestrator.training.place import Place

log = logging.getLogger(__name__)

_FEW = 8  # of an epoch never stop a run, however small the data set
_NAMED = 5


class BadSampleMeter:
    """Counts the samples that others replaced, where `on_bad_sample` is "skip".

    `total` covers all workers and the whole run up to the last reading. It counts occurrences: a
    bad sample that comes once in every epoch counts in each.
    """

    def __init__(
        self, data: DataConfig, train_set: Dataset, steps_per_epoch: int, place: Place
    ) -> None:
        self.total = 0
        self._skips = data.on_bad_sample == "skip"
        self._share = data.max_bad_share
        self._allowed = max(_FEW, int(data.max_bad_share * train_set.num_samples))
        self._steps_per_epoch = steps_per_epoch
        self._place = place
        self._epochs = 1
        self._new = 0
        self._first: dict[tuple[str, int], str] = {}  # every one that this worker has logged

    def go_on_from(self, total: int) -> None:
        """Take over what a checkpoint of the run counted.

        Raises:
            DataError: it replaced samples, which the policy of the job no longer allows.
        """
        if total and not self._skips:
            raise DataError(
                f"this run has replaced {total} bad samples so far, and data.on_bad_sample is now "
                "fail; set it to skip, or give the stage another name to start again"
            )
        self.total = total

    def add(self, step: int, bad: Sequence[BadSample]) -> None:
        """Count those of this worker's batch of `step`; log each that is met the first time."""
        self._epochs = step // self._steps_per_epoch + 1
        self._new += len(bad)
        for sample in bad:
            place = (sample.shard, sample.row)
            if place not in self._first:
                self._first[place] = sample.reason
                log.warning(
                    "worker %d: bad sample, row %d of %s, replaced by another: %s",
                    self._place.rank,
                    sample.row,
                    sample.shard,
                    sample.reason,
                )

    def read(self) -> Metrics:
        """The number so far; every worker must call it. Nothing where the policy is "fail".

        Raises:
            DataError: on every worker, more than allowed in the epochs begun so far.
        """
        if not self._skips:
            return {}
        new = torch.tensor([self._new], dtype=torch.float64, device=self._place.device)
        self.total += int(self._place.sum(new))
        self._new = 0
        allowed = self._allowed * self._epochs
        if self.total > allowed:
            parts = self._place.gather(list(self._first.values())[:_NAMED])
            reasons = [reason for part in parts for reason in part]
            raise DataError(
                f"{self.total} bad samples in {self._epochs} epochs; data.max_bad_share: "
                f"{self._share:g} allows {allowed}. Repair the data set (atrous data verify) or "
                f"raise it. The first: {'; '.join(reasons[:_NAMED])}"
            )
        return {"train/bad_samples": float(self.total)}
