"""A loss or gradient that is not finite: where it is, and how the run goes on behind it.

rollbacks.json   windows of steps that are passed over, each written before the run goes back
trouble.json     the report of a run that may not go back once more
"""

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.loader import Batch
from orchestrator.errors import CheckpointError, NonFiniteError, RunError
from orchestrator.files import read_json, write_json
from orchestrator.job.config import StageSettings
from orchestrator.runs.checkpoint import checkpoint_paths, delete_checkpoint, read_checkpoint
from orchestrator.runs.record import Metrics
from orchestrator.runs.run import Run
from orchestrator.training.place import Place

log = logging.getLogger(__name__)

ROLLBACKS, TROUBLE = "rollbacks.json", "trouble.json"
_RECENT = 3  # batches whose keys are kept; a GPU tells of a step during the next one
_NAMED = 8  # sample keys in a message; the files have all


class GivenUp(RunError):
    """On every worker: the attempt has failed for good, as the run's trouble.json says."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Steps `start` to before `stop` (from 0), which are not trained on; the last one is bad."""

    start: int
    stop: int
    what: str  # loss, gradient, weights
    samples: Mapping[str, Sequence[str]]  # rank -> keys of its batch of the bad step

    def __contains__(self, step: int) -> bool:
        return self.start <= step < self.stop

    def __str__(self) -> str:
        keys = [key for part in self.samples.values() for key in part]
        more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
        return (
            f"the {self.what} of step {self.stop - 1} is not finite (workers: "
            f"{', '.join(self.samples)}; samples: {', '.join(keys[:_NAMED])}{more})"
        )


def read_windows(run: Run) -> list[Window]:
    """The windows a run passes over, in the order they were met."""
    found = read_json(run.path / ROLLBACKS) or {"windows": []}
    return [Window(**window) for window in found["windows"]]


class RecentBatches:
    """The sample keys of this worker's last batches."""

    def __init__(self) -> None:
        self._keys: deque[tuple[int, tuple[str, ...]]] = deque(maxlen=_RECENT)

    def add(self, step: int, keys: tuple[str, ...]) -> None:
        """Remember the batch of `step`."""
        self._keys.append((step, keys))

    def of(self, step: int) -> list[str]:
        """The keys of a recent step."""
        return [key for recent, keys in self._keys if recent == step for key in keys]


def agreed_windows(run: Run, place: Place) -> list[Window]:
    """The windows of a run that starts or goes on; every worker calls it before it restores.

    Checkpoints within a window are of a path that the run has left (a stop had them written):
    they are removed, if a kill has left them.

    Raises:
        RunError: this attempt has failed for good already, and was started again.
    """
    windows: list[Window] = []
    verdict: str | None = None
    if place.rank == 0:
        windows = read_windows(run)
        _remove_left(run, windows)
        verdict = verdict_of(run)
    windows, verdict = place.gather((windows, verdict))[0]
    if verdict:
        raise GivenUp(verdict)
    return windows


def verdict_of(run: Run) -> str | None:
    """Why this attempt has failed for good, if it has."""
    trouble = read_json(run.path / TROUBLE) or {}
    return trouble.get("error") if trouble.get("attempt") == _attempt(run) else None


def first_trained(start: int, windows: Sequence[Window]) -> int:
    """The first step from `start` on that no window holds."""
    while any(start in window for window in windows):
        start += 1
    return start


def with_gaps(
    batches: Iterator[Batch], start: int, windows: Sequence[Window]
) -> Iterator[Batch | None]:
    """The batches of the steps from `start` on; None for a step that is passed over.

    `batches` begin at the first step that is trained.
    """
    begins = first_trained(start, windows)
    for _ in range(start, begins):
        yield None
    for step, batch in enumerate(batches, begins):
        yield None if any(step in window for window in windows) else batch
    while True:  # the run ends with a window
        yield None


def rollback_metrics(windows: Sequence[Window], step: int) -> Metrics:
    """How often the run went back on its way to having done `step` steps; nothing while never."""
    count = sum(window.start < step for window in windows)
    return {"train/rollbacks": float(count)} if count else {}


def check_finite(network: torch.nn.Module, step: int, place: Place) -> None:
    """Make sure that weights and running statistics after `step` (from 0) are worth keeping.

    Raises:
        NonFiniteError: on every worker, those of one are not finite.
    """
    tensors = [t.detach() for t in network.state_dict().values() if t.is_floating_point()]
    largest = torch.stack(torch._foreach_norm(tensors, float("inf")))  # one pass, NaN stays NaN
    here = ~largest.isfinite().all()
    if place.sum(here.double().clone()).item() > 0:
        raise NonFiniteError(step, "weights", here=bool(here))


def roll_back(
    run: Run,
    place: Place,
    every: int,
    stage: StageSettings,
    error: NonFiniteError,
    keys: Sequence[str],
) -> None:
    """Record the window to pass over, so that whoever starts the run next goes on behind it.

    Checkpoints come `every` so many steps. `keys` are those of this worker's batch at the bad
    step. Every worker calls it.

    Raises:
        GivenUp: on every worker, the run has gone back as often as it may.
        RunError: on every worker, its storage is full or away.
    """
    parts = place.gather((error.here, list(keys)))
    blamed = [rank for rank, (here, _) in enumerate(parts) if here] or range(place.world)
    verdict: str | None = None
    unrecorded: str | None = None
    if place.rank == 0:
        windows = read_windows(run)
        window = Window(
            start=_goes_back_to(run.checkpoints, error.step, every),
            stop=error.step + 1,
            what=error.what,
            samples={str(rank): parts[rank][1] for rank in blamed},
        )
        try:
            if len(windows) < stage.checkpoint.max_rollbacks:
                _record(run, [*windows, window])
            else:
                verdict = _give_up(run, stage, [*windows, window])
        except OSError as problem:
            unrecorded = (
                f"{window}, and that cannot be recorded in {run.path} ({problem}); once it can, "
                f"the same command goes on from step {window.start}"
            )
    verdict, unrecorded = place.gather((verdict, unrecorded))[0]
    if unrecorded:
        raise RunError(unrecorded)
    if verdict:
        raise GivenUp(verdict)


def _record(run: Run, windows: Sequence[Window]) -> None:
    write_json(run.path / ROLLBACKS, {"windows": [asdict(window) for window in windows]})
    _remove_left(run, windows)
    last = windows[-1]
    text = f"{last}; goes back to step {last.start} and on from step {last.stop}"
    run.note("rollback", text, start=last.start, stop=last.stop)


def _give_up(run: Run, stage: StageSettings, windows: Sequence[Window]) -> str:
    """Write the report; what the error says."""
    cures = [
        f"lower optimizer.lr ({stage.optimizer.lr:g}), or give schedule.warmup",
        f"set optimizer.clip_norm ({stage.optimizer.clip_norm or 'null'})",
        f"set precision: float32 ({stage.precision})",
        "look at these samples (atrous data inspect), and repair or leave them out",
        f"raise checkpoint.max_rollbacks ({stage.checkpoint.max_rollbacks})",
    ]
    allowed = stage.checkpoint.max_rollbacks
    error = (
        f"{windows[-1]}, after as many rollbacks as checkpoint.max_rollbacks: {allowed} allows. "
        f"Cures: {'; '.join(cures)}. Report: {run.path / TROUBLE}"
    )
    write_json(
        run.path / TROUBLE,
        {
            "error": error,
            "attempt": _attempt(run),
            "windows": [asdict(window) for window in windows],
            "cures": cures,
        },
    )
    return error


def _attempt(run: Run) -> Any:
    return run.read().get("attempts")


def _goes_back_to(checkpoints: Path, bad: int, every: int) -> int:
    """The step of the checkpoint to go back to; 0 where there is none.

    That is the last one that the job's rhythm has before the bad step, so that the path does not
    depend on stops, which have checkpoints of their own.
    """
    regular = bad // every * every
    paths = checkpoint_paths(checkpoints)
    earlier = [path for path in paths if _step(path) <= regular]
    later = [path for path in paths if regular and path not in earlier]  # rather than the start
    for path in [*earlier, *later]:
        try:
            return read_checkpoint(path).step
        except CheckpointError as error:
            log.warning("passed over: %s", error)
    return 0


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _remove_left(run: Run, windows: Sequence[Window]) -> None:
    """Remove the checkpoints within windows."""
    for path in checkpoint_paths(run.checkpoints):
        if any(window.start < _step(path) < window.stop for window in windows):
            delete_checkpoint(path)
