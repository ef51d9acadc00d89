"""Training metrics between two readings, what a checkpoint keeps of them, and where time goes."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from data_pipeline.loader import TrainLoader
from orchestrator.runs.record import Metrics

Pause = Literal["evaluation", "checkpoint stall"]


class Meters:
    """Sums over steps of what all workers agreed on, and this worker's times.

    A run that goes on from a checkpoint logs the losses of one that was never stopped. Times are
    the host's: on a GPU it is at most two steps ahead, so that over a window they are the device's.

    Args:
        ideal_step: seconds of a step at the devices' peak, for MFU; None: not metered.
        began: `time.perf_counter()` when this worker began with its start-up; None: now.
    """

    def __init__(
        self,
        loader: TrainLoader,
        global_batch: int,
        device: torch.device,
        *,
        ideal_step: float | None = None,
        began: float | None = None,
    ) -> None:
        self._loader = loader
        self._global_batch = global_batch
        self._ideal_step = ideal_step
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._came_up = time.perf_counter() if began is None else began
        self._start_up: float | None = None
        self._waited_in_pauses = 0.0
        self.first_wait = 0.0  # seconds for the first batch
        self._pauses: dict[str, float] = {"evaluation": 0.0, "checkpoint stall": 0.0}
        self._start_window()

    def _start_window(self) -> None:
        self._began = self._last = time.perf_counter()
        self._waited = self._loader.wait_seconds
        self._evaluated = self._pauses["evaluation"]
        self._step_seconds: list[float] = []

    def add(self, total: Tensor, count: Tensor, norm: Tensor) -> None:
        """One step's sum and count of the loss and norm of the gradient, over all workers."""
        finite = norm.isfinite()  # else float16 passed over the step
        self._sums += torch.stack([total, count, norm.where(finite, 0.0), finite])
        now = time.perf_counter()
        self._step_seconds.append(now - self._last)
        self._last = now
        if self._start_up is None:
            self._start_up = now - self._came_up
            self.first_wait = self._loader.wait_seconds

    def read(self) -> Metrics:
        """Means since the last reading: loss, gradient norm, speed, MFU, steps' times, data wait.

        All but the first two leave evaluations and checkpoints out.
        """
        total, count, norm, steps = self._sums.tolist()
        seconds = time.perf_counter() - self._began
        num_steps, ordered = len(self._step_seconds), sorted(self._step_seconds)
        metrics = {
            "train/loss": total / max(count, 1),
            "train/gradient_norm": norm / max(steps, 1),
            "train/images_per_second": num_steps * self._global_batch / seconds,
            "train/data_wait_share": (self._loader.wait_seconds - self._waited) / seconds,
        }
        if ordered:
            for name, share in (("p50", 0.5), ("p95", 0.95), ("max", 1.0)):
                metrics[f"train/step_seconds_{name}"] = ordered[round(share * (num_steps - 1))]
        if self._ideal_step is not None:
            metrics["train/mfu"] = num_steps * self._ideal_step / seconds
        if (evaluated := self._pauses["evaluation"] - self._evaluated) > 0:
            metrics["train/evaluation_seconds"] = evaluated
        self._sums.zero_()
        self._start_window()
        return metrics

    @contextmanager
    def paused(self, cause: Pause) -> Iterator[None]:
        """Leave the time of what happens inside out of the speed."""
        began, waited = time.perf_counter(), self._loader.wait_seconds
        try:
            yield
        finally:
            seconds, waited = time.perf_counter() - began, self._loader.wait_seconds - waited
            self._pauses[cause] += seconds
            self._began += seconds
            self._last += seconds
            self._waited += waited
            self._waited_in_pauses += waited

    def not_trained(self) -> Mapping[str, float]:
        """Seconds since this worker came up that were no training, by cause (`runs.bill`).

        Start-up lasts until the end of the first step.
        """
        if self._start_up is None:
            return {"start-up": time.perf_counter() - self._came_up}
        waited = self._loader.wait_seconds - self.first_wait - self._waited_in_pauses
        return {"start-up": self._start_up, "data wait": waited} | self._pauses

    def state(self) -> list[float]:
        """The sums since the last reading, for a checkpoint."""
        return self._sums.tolist()

    def go_on_from(self, state: list[float]) -> None:
        """Take over what a checkpoint of the run summed."""
        self._sums += torch.tensor(state, dtype=torch.float64, device=self._sums.device)
