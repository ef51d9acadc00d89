"""What of a storage nobody needs any more. Found first, deleted only when asked."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.files import remove_tree, tree_size
from orchestrator.job.duration import as_time
from orchestrator.runs.checkpoint import MANIFEST, checkpoint_paths
from orchestrator.runs.overview import Overview, overviews, read_ahead

_DAY = 86400.0


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """A run or checkpoint that can go."""

    path: Path
    why: str
    bytes: int


def find_garbage(storage: Path, older_than: float) -> list[Garbage]:
    """Unfinished runs untouched for `older_than` days, and checkpoints that runs left behind.

    The last checkpoint of a finished run stays, the best ones where its job keeps them, and
    whatever another run started from. Runs that a process drives at this moment are left alone.
    """
    every = overviews(storage)
    read_ahead(every, "state")
    used = {_key(one.record["start"]) for one in every if one.record.get("start")}
    return [
        garbage
        for one in every
        if one.state != "running"
        for garbage in _of_run(one, used, time.time() - older_than * _DAY)
    ]


def _key(start: dict[str, Any]) -> tuple[Any, ...]:
    return start.get("fingerprint"), start.get("step")


def _of_run(one: Overview, used: set[tuple[Any, ...]], before: float) -> Iterator[Garbage]:
    record, directory = one.record, one.run.checkpoints
    fingerprint = record["fingerprint"]
    names = checkpoint_paths(directory)
    needed = {path for path in names if (fingerprint, int(path.name[5:])) in used}
    finished = one.state == "finished"
    if not finished and not needed and record.get("updated", 0) < before:
        age = as_time(time.time() - record.get("updated", 0))
        yield _garbage(one.run.path, f"{one.state}, not touched for {age}")
        return
    for path in directory.glob(".step-*.tmp"):
        yield _garbage(path, "left by a killed writer")
    if finished and not record["job"]["checkpoint"].get("keep_best"):
        for path in names:
            if path not in needed and path != one.run.path / record["checkpoint"]:
                yield _garbage(path, "before the last checkpoint of a finished run")


def _garbage(path: Path, why: str) -> Garbage:
    return Garbage(path=path, why=why, bytes=tree_size(path))


def delete(garbage: Garbage) -> None:
    """Remove it; what a kill leaves half deleted is no checkpoint and no run to anybody."""
    for name in ("run.json", MANIFEST):
        (garbage.path / name).unlink(missing_ok=True)
    remove_tree(garbage.path)
