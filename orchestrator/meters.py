"""Training metrics between two readings, and what a checkpoint keeps of them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from data_pipeline.loader import TrainLoader
from orchestrator.loop import Metrics


class Meters:
    """Sums over steps of what all workers agreed on, and this worker's times.

    A run that goes on from a checkpoint logs the losses of one that was never stopped.
    """

    def __init__(self, loader: TrainLoader, global_batch: int, device: torch.device) -> None:
        self._loader = loader
        self._global_batch = global_batch
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._start_clock()

    def _start_clock(self) -> None:
        self._timed_steps = 0
        self._began = time.perf_counter()
        self._waited = self._loader.wait_seconds

    def add(self, total: Tensor, count: Tensor, norm: Tensor) -> None:
        """One step's sum and count of the loss and norm of the gradient, over all workers."""
        self._sums += torch.stack([total, count, norm, torch.ones_like(norm)])
        self._timed_steps += 1

    def read(self) -> Metrics:
        """Mean loss and gradient norm since the last reading; speed of training without evaluation;
        share of that time spent waiting for data."""
        total, count, norm, steps = self._sums.tolist()
        seconds = time.perf_counter() - self._began
        waited = self._loader.wait_seconds - self._waited
        metrics = {
            "train/loss": total / max(count, 1),
            "train/gradient_norm": norm / steps,
            "train/images_per_second": self._timed_steps * self._global_batch / seconds,
            "train/data_wait_share": waited / seconds,
        }
        self._sums.zero_()
        self._start_clock()
        return metrics

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of what happens inside out of the speed: evaluation, checkpoints."""
        began, waited = time.perf_counter(), self._loader.wait_seconds
        yield
        self._began += time.perf_counter() - began
        self._waited += self._loader.wait_seconds - waited

    def state(self) -> list[float]:
        """The sums since the last reading, for a checkpoint."""
        return self._sums.tolist()

    def go_on_from(self, state: list[float]) -> None:
        """Take over what a checkpoint of the run summed."""
        self._sums += torch.tensor(state, dtype=torch.float64, device=self._sums.device)
