"""One optimizer step of the whole global batch, each worker with its part of it."""

import math
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from data_pipeline.loader import Batch
from model.build import freeze_batch_norm
from orchestrator.config import StageSettings
from orchestrator.errors import NonFiniteError
from orchestrator.meters import Meters
from orchestrator.place import Place
from orchestrator.task import Loss


class Learner:
    """Forward, backward and optimizer step of a network.

    `asked_to_stop` is this worker's own wish; `must_stop` becomes true on all workers, after the
    same step, once one of them has it.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        stage: StageSettings,
        place: Place,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        meters: Meters,
        asked_to_stop: Callable[[], bool],
    ) -> None:
        self._network = network
        self._distributed = place.distribute(network)
        self._optimizer = optimizer
        self._place = place
        self._loss = loss
        self._meters = meters
        self._asked_to_stop = asked_to_stop
        self._frozen = stage.model.batch_norm.frozen
        self._clip_norm = stage.optimizer.clip_norm
        self._global_batch = stage.global_batch
        self._passes = num_passes(stage, place.world)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._unread: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self.must_stop = False

    def update(self, step: int, batch: Batch, rate: float) -> None:
        """Train on one step's batch at a learning rate.

        The gradient is that of the loss summed over the global batch and divided by its global
        count, so a sample weighs the same on whichever worker and in whichever pass it lands.

        Raises:
            NonFiniteError: on every worker, the loss or gradient of this or the step before is
                not finite.
        """
        place = self._place
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("lr_multiplier", 1.0)
        self._network.train()
        if self._frozen:
            freeze_batch_norm(self._network)
        images = batch.images.to(place.device, non_blocking=True)
        labels = batch.labels.to(place.device, non_blocking=True)
        # Near the count, which is known only afterwards: keeps gradients in float16's range.
        expected = labels[0].numel() * self._global_batch
        total, count = self._backward(images, labels, step, place.world / expected)

        own = torch.stack(
            [total, count, ~total.isfinite(), total.new_tensor(self._asked_to_stop())]
        )
        total, count, bad, stop = place.sum(own)
        norm = self._scale_gradients(expected / count.clamp(min=1))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._meters.add(total, count, norm)
        self._note(step, torch.stack([bad, stop, norm]))

    def _backward(
        self, images: Tensor, labels: Tensor, step: int, factor: float
    ) -> tuple[Tensor, Tensor]:
        """Accumulate factor * gradient of the summed loss; this worker's sum and count, float64."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._place.device)
        parts = zip(
            images.tensor_split(self._passes), labels.tensor_split(self._passes), strict=True
        )
        for i, (some_images, some_labels) in enumerate(parts):
            with self._communicating(last=i == self._passes - 1):
                with self._place.autocast():
                    outputs = self._distributed(some_images)
                total, count = self._loss(outputs, some_labels, step)
                (total * factor).backward()
            sums += torch.stack([total.detach().double(), count.detach().double()])
        return sums[0], sums[1]

    def _communicating(self, *, last: bool) -> AbstractContextManager[None]:
        """DDP sums gradients over workers in the last pass only."""
        if last or not isinstance(self._distributed, DistributedDataParallel):
            return nullcontext()
        return self._distributed.no_sync()

    def _scale_gradients(self, factor: Tensor) -> Tensor:
        """Multiply all gradients by `factor`, and clip them; their norm before clipping."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = get_total_norm(gradients).double() * factor
        if self._clip_norm is not None:
            factor = factor * (self._clip_norm / norm).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor.float())
        return norm

    def _note(self, step: int, agreed: Tensor) -> None:
        """Remember what was agreed; read it at once on a CPU, a step later on a GPU.

        A GPU has long computed it by then and never waits for the host.
        """
        event = None
        if agreed.is_cuda:
            agreed, event = agreed.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self._unread.append((step, agreed, event))
        while len(self._unread) > (event is not None):
            self._read_one()

    def _read_one(self) -> None:
        step, agreed, event = self._unread.popleft()
        if event is not None:
            event.synchronize()
        bad, stop, norm = agreed.tolist()
        if bad or not math.isfinite(norm):
            raise NonFiniteError(step, "loss" if bad else "gradient")
        self.must_stop |= stop > 0

    def settle(self) -> None:
        """Make sure that the steps so far were finite; every worker calls it before they are kept.

        Raises:
            NonFiniteError: as `update`.
        """
        while self._unread:
            self._read_one()


def num_passes(stage: StageSettings, world: int) -> int:
    """Passes through the network that each worker needs for its part of a global batch.

    The same on all workers, because collective operations in a pass wait for one another.
    """
    most = math.ceil(stage.global_batch / world)
    return math.ceil(most / stage.micro_batch) if isinstance(stage.micro_batch, int) else 1
