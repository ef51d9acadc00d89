"""Durations of a job file (steps, or epochs), their conversion to steps, and seconds in words."""

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


def as_time(seconds: float) -> str:
    """Such as 42 s, 3.5 min, 7.1 h, 2.0 d, 3.0 years."""
    for size, unit in ((365 * 86400, "years"), (86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
