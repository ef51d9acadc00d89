"""Optimizer and learning-rate schedules: a rate is a pure function of the step."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from orchestrator.job.duration import to_steps
from orchestrator.job.sections import AdamW, Cosine, Poly, Sgd, StepExponential, Steps

if TYPE_CHECKING:
    import torch

Schedule = Callable[[int], float]


def base_rate(config: Sgd | AdamW, global_batch: int) -> float:
    """The rate before any schedule: in proportion to the batch where lr_for_batch is given."""
    if config.lr_for_batch is None:
        return config.lr
    return config.lr * global_batch / config.lr_for_batch


def make_schedule(
    config: Poly | Cosine | StepExponential | Steps, base: float, steps: int, steps_per_epoch: int
) -> Schedule:
    """Learning rate of each step, counted from 0."""
    warmup = to_steps(config.warmup, steps_per_epoch) if config.warmup is not None else 0
    factor = _factor(config, steps, steps_per_epoch)
    return lambda step: base * factor(step) * min(1.0, (step + 1) / (warmup + 1))


def _factor(
    config: Poly | Cosine | StepExponential | Steps, steps: int, steps_per_epoch: int
) -> Schedule:
    """What remains of the rate at each step."""
    match config:
        case Poly():
            return lambda step: (1 - step / steps) ** config.power
        case Cosine():
            half = (1 - config.end) / 2
            return lambda step: config.end + half * (1 + math.cos(math.pi * step / steps))
        case StepExponential():
            every = to_steps(config.every, steps_per_epoch)
            return lambda step: config.decay ** (step // every)
        case Steps():
            milestones = [to_steps(m, steps_per_epoch) for m in config.milestones]
            return lambda step: config.decay ** sum(step >= m for m in milestones)


def make_optimizer(config: Sgd | AdamW, groups: list[dict[str, Any]]) -> "torch.optim.Optimizer":
    """The optimizer over parameter groups that carry their own weight decay.

    Fused: it reads float16's overflow on the GPU itself, and takes half the time on a CPU.
    """
    import torch

    if isinstance(config, AdamW):
        betas, eps = config.betas, config.eps
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=eps, fused=True)
    momentum, nesterov = config.momentum, config.nesterov
    sgd = torch.optim.SGD(groups, lr=config.lr, momentum=momentum, nesterov=nesterov, fused=True)
    if momentum:
        # Torch would begin from whatever the memory held where float16 passes over the first step.
        for parameter in (p for group in sgd.param_groups for p in group["params"]):
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def moments(config: Sgd | AdamW) -> int:
    """Tensors that the optimizer keeps for each parameter."""
    return 2 if isinstance(config, AdamW) else int(config.momentum > 0)
