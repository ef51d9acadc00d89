"""Optimizer and learning-rate schedules: a rate is a pure function of the step."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.duration import to_steps
from orchestrator.sections import Poly, Sgd, StepExponential

if TYPE_CHECKING:
    import torch

Schedule = Callable[[int], float]


def make_schedule(
    config: Poly | StepExponential, base: float, steps: int, steps_per_epoch: int
) -> Schedule:
    """Learning rate of each step, counted from 0."""
    warmup = to_steps(config.warmup, steps_per_epoch) if config.warmup is not None else 0
    if isinstance(config, Poly):

        def decayed(step: int) -> float:
            return base * (1 - step / steps) ** config.power

    else:
        every = to_steps(config.every, steps_per_epoch)

        def decayed(step: int) -> float:
            return base * config.decay ** (step // every)

    return lambda step: decayed(step) * min(1.0, (step + 1) / (warmup + 1))


def make_optimizer(config: Sgd, groups: list[dict[str, object]]) -> "torch.optim.Optimizer":
    """SGD over parameter groups that carry their own weight decay."""
    import torch

    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
