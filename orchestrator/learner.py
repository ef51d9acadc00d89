"""One training step over all workers, and the meters of it."""

import time

import torch

from data_pipeline.loader import Batch, TrainLoader
from model.build import freeze_batch_norm
from orchestrator.bad_samples import BadSampleMeter
from orchestrator.config import StageSettings
from orchestrator.loop import Metrics
from orchestrator.place import Place
from orchestrator.task import Loss


class Learner:
    """Forward and backward of a network on its part of every global batch."""

    def __init__(
        self,
        network: torch.nn.Module,
        stage: StageSettings,
        place: Place,
        loss: Loss,
        loader: TrainLoader,
        bad_samples: BadSampleMeter,
    ) -> None:
        self._network = network
        self._distributed = place.distribute(network)
        self._global_batch = stage.global_batch
        self._frozen = stage.model.batch_norm.frozen
        self._place = place
        self._loss = loss
        self._loader = loader
        self._bad_samples = bad_samples
        self._clear()

    def _clear(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=self._place.device)
        self._steps = 0
        self._waited = self._loader.wait_seconds
        self._began: float | None = None

    def backward(self, step: int, batch: Batch) -> None:
        """Gradients of the loss summed over the global batch and divided by its global count.

        DDP averages gradients over workers; the factor `world` turns that into their sum, so a
        sample weighs the same on whichever worker it landed.
        """
        if self._began is None:  # the wait for this batch came before
            self._began = time.perf_counter() + self._waited - self._loader.wait_seconds
        self._bad_samples.add(step, batch.bad)
        place = self._place
        self._network.train()
        if self._frozen:
            freeze_batch_norm(self._network)
        images = batch.images.to(place.device, non_blocking=True)
        labels = batch.labels.to(place.device, non_blocking=True)
        with place.autocast():
            outputs = self._distributed(images)
        total, count = self._loss(outputs, labels, step)
        sums = torch.stack([total.detach().double(), count.detach().double()])
        self._sums += sums
        global_count = place.sum(sums[1].clone()).clamp(min=1)
        (total * (place.world / global_count).to(total.dtype)).backward()
        self._steps += 1

    def read_meters(self) -> Metrics:
        """Mean loss over the samples since the last reading; speed of training without evaluation;
        share of that time spent waiting for data; bad samples so far where they are skipped.

        Raises:
            DataError: on every worker, too many bad samples.
        """
        total, count = self._place.sum(self._sums.clone()).tolist()
        waited = self._loader.wait_seconds - self._waited
        seconds = time.perf_counter() - (self._began or 0.0)
        metrics = {
            "train/loss": total / max(count, 1),
            "train/images_per_second": self._steps * self._global_batch / seconds,
            "train/data_wait_share": waited / seconds,
        }
        self._clear()
        return metrics | self._bad_samples.read()
