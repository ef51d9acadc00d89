"""Processor time of a process and of all that it has started (Linux)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter


@dataclass
class Spent:
    """Seconds, and processor seconds."""

    wall: float = 0.0
    cpu: float = 0.0


@contextmanager
def clock() -> Iterator[Spent]:
    """What the block took, when it has ended."""
    spent = Spent(perf_counter(), cpu_seconds())
    yield spent
    spent.wall, spent.cpu = perf_counter() - spent.wall, cpu_seconds() - spent.cpu


def cpu_seconds() -> float:
    """Of this process and all that it has started."""
    return sum(os.times()[:4]) + sum(map(_cpu_seconds_of, _children(os.getpid())))


def _cpu_seconds_of(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    ticks = sum(map(int, fields[11:15]))  # its own and its dead children's
    return ticks / os.sysconf("SC_CLK_TCK") + sum(map(_cpu_seconds_of, _children(pid)))


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, file.read_text().split())
    return found
