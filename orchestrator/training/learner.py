"""One optimizer step of the whole global batch, each worker with its part of it."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from data_pipeline.loader import Batch
from model.build import freeze_batch_norm
from model.compilation import compile_blocks
from orchestrator.errors import NonFiniteError
from orchestrator.job.config import StageSettings
from orchestrator.runs.record import Metrics
from orchestrator.runs.stop import Wish
from orchestrator.training.meters import Meters
from orchestrator.training.passes import num_passes
from orchestrator.training.place import Place
from orchestrator.training.task import Loss
from orchestrator.training.train_state import TrainState

# float16: at this loss scale gradients are as they come, so it is not the scale that overflows.
_SMALLEST_SCALE = 1.0


class Learner:
    """Forward, backward and optimizer step of a network.

    `asked_to_stop` is this worker's own wish; `must_save` and `must_stop` become true on all
    workers, after the same step, once one of them has it.
    """

    def __init__(
        self,
        state: TrainState,
        stage: StageSettings,
        place: Place,
        loss: Loss,
        meters: Meters,
        asked_to_stop: Callable[[], Wish],
    ) -> None:
        self._state = state
        self._stage = stage
        self._place = place
        self._loss = loss
        self._meters = meters
        self._asked_to_stop = asked_to_stop
        self._ready_to_train()
        self._distributed = place.distribute(state.network)
        groups = state.optimizer.param_groups
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        # A GPU is read a step later: it has long computed it by then and never waits for the host.
        self._lag = int(place.device.type == "cuda")
        self._unread: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self.must_save = self.must_stop = False

    def update(self, step: int, batch: Batch, rate: float) -> None:
        """Train on one step's batch at a learning rate.

        The gradient is that of the loss summed over the global batch and divided by its global
        count, so a sample weighs the same on whichever worker and in whichever pass it lands.

        Raises:
            NonFiniteError: on every worker, the loss or gradient of this or the step before is
                not finite. In float16 a gradient that overflows passes over the step instead and
                lowers the loss scale, as long as that can be the reason.
        """
        place, state = self._place, self._state
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group["lr_multiplier"]
        images, labels = place.bring(batch.images), place.bring(batch.labels)
        # Near the count, which is known only afterwards: keeps gradients in float16's range.
        expected = labels[0].numel() * self._stage.global_batch
        total, count = self._backward(images, labels, step, place.world / expected)

        bad_here = ~total.isfinite()
        # One wish to stop outweighs one of every worker to save.
        wish = {Wish.NONE: 0, Wish.SAVE: 1, Wish.STOP: place.world + 1}[self._asked_to_stop()]
        own = torch.stack([total, count, bad_here, total.new_full((), wish)])
        total, count, bad, wishes = place.sum(own)
        norm = self._scale_gradients(expected / count.clamp(min=1))
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if state.average:
            state.average.update(step)
        self._meters.add(total, count, norm)
        self._note(step, torch.stack([bad, wishes, norm, bad_here]))

    def _backward(
        self, images: Tensor, labels: Tensor, step: int, factor: float
    ) -> tuple[Tensor, Tensor]:
        """Accumulate factor * gradient of the summed loss; this worker's sum and count, float64."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._place.device)
        passes = num_passes(self._stage, self._place.world, len(images))
        parts = zip(images.tensor_split(passes), labels.tensor_split(passes), strict=True)
        for i, (some_images, some_labels) in enumerate(parts):
            with self._communicating(last=i == passes - 1):
                with self._place.autocast():
                    outputs = self._distributed(some_images)
                total, count = self._loss(outputs, some_labels, step)
                self._state.scaler.scale(total * factor).backward()
            sums += torch.stack([total.detach().double(), count.detach().double()])
        return sums[0], sums[1]

    def _communicating(self, *, last: bool) -> AbstractContextManager[None]:
        """DDP sums gradients over workers in the last pass only."""
        if last or not isinstance(self._distributed, DistributedDataParallel):
            return nullcontext()
        return self._distributed.no_sync()

    def _scale_gradients(self, factor: Tensor) -> Tensor:
        """Norm of the gradients times `factor`, by which the optimizer will multiply and clip."""
        self._state.scaler.unscale_(self._state.optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = get_total_norm(gradients).double() * factor
        clip_norm = self._stage.optimizer.clip_norm
        if clip_norm is not None:
            factor = factor * (clip_norm / norm).clamp(max=1.0)
        # It divides by this as it reads them, which spares a pass over all of them.
        self._state.optimizer.grad_scale = (1 / factor).float()  # type: ignore[attr-defined]
        return norm

    def _note(self, step: int, agreed: Tensor) -> None:
        """Remember what was agreed, and read what is due."""
        event = None
        if agreed.is_cuda:
            agreed = agreed.to("cpu", non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # waiting leaves the processor to the loader
            event.record()
        self._unread.append((step, agreed, event))
        while len(self._unread) > self._lag:
            self._read_one()

    def _read_one(self) -> None:
        step, agreed, event = self._unread.popleft()
        if event is not None:
            event.synchronize()
        bad, wishes, norm, bad_here = agreed.tolist()
        if bad:
            raise NonFiniteError(step, "loss", here=bad_here > 0)
        if not math.isfinite(norm):
            if not self._state.scaler.is_enabled():
                raise NonFiniteError(step, "gradient")
            if self._state.scaler.get_scale() < _SMALLEST_SCALE:
                raise NonFiniteError(step, "gradient, whatever the loss scale of float16,")
        self.must_save |= wishes > 0
        self.must_stop |= wishes > self._place.world

    def take_must_save(self) -> bool:
        """Whether a checkpoint is due; it is not any more after this."""
        due, self.must_save = self.must_save, False
        return due

    def settle(self) -> None:
        """Make sure that the steps so far were finite; every worker calls it before it tells.

        Raises:
            NonFiniteError: as `update`.
        """
        while self._unread:
            self._read_one()

    def read(self) -> Metrics:
        """Metrics of the numerics themselves, float16's loss scale, after `settle`."""
        self.settle()
        scaler = self._state.scaler
        return {"train/loss_scale": scaler.get_scale()} if scaler.is_enabled() else {}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it the network is the one to evaluate: averaged if asked for, and not compiled.

        Images of many sizes would each compile anew.
        """
        self.settle()
        with ExitStack() as stack:
            if self._stage.compile:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self._state.average:
                stack.enter_context(self._state.average.in_the_network())
            yield
        self._ready_to_train()

    def _ready_to_train(self) -> None:
        """Set modes and compile; again after an evaluation, for which timm's may be built anew."""
        network = self._state.network
        network.train()
        if self._stage.model.batch_norm.frozen:
            freeze_batch_norm(network)
        if self._stage.compile:
            compile_blocks(network)
