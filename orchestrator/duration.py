"""Durations of a job file (steps, or epochs) and their conversion to steps: once, at the border."""

import re
from typing import Annotated

from pydantic import AfterValidator

_EPOCHS = re.compile(r"^(\d+(?:\.\d+)?) epochs?$")


def _check(value: int | str) -> int | str:
    if isinstance(value, int):
        if value < 1:
            raise ValueError("must be at least 1 step")
    elif not _EPOCHS.match(value) or float(value.split()[0]) == 0:
        raise ValueError("must be a number of steps (1000) or of epochs ('2 epochs')")
    return value


Duration = Annotated[int | str, AfterValidator(_check)]


def to_steps(duration: int | str, steps_per_epoch: int) -> int:
    """Steps of a `Duration`, at least 1."""
    if isinstance(duration, int):
        return duration
    return max(1, round(float(duration.split()[0]) * steps_per_epoch))


def is_time(step: int, every: int, last: int) -> bool:
    """Whether `step` (counted from 1) ends a period of `every` steps; the last step always does."""
    return step % every == 0 or step == last
