"""What the storage knows of runs: lists, states, comparison. Reads, never writes into a run."""

import difflib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from orchestrator.bucket import storage_path
from orchestrator.errors import RunError
from orchestrator.files import read_json
from orchestrator.job.duration import as_time
from orchestrator.runs.bill import Bill, read_bill
from orchestrator.runs.record import HEADLINE, evaluated, flatten
from orchestrator.runs.run import Run, all_runs, read_journal

ENDED = ("finished", "failed", "stopped", "interrupted")


@dataclass(frozen=True)
class Overview:
    """One run as its directory tells it at this moment."""

    run: Run

    @cached_property
    def record(self) -> dict[str, Any]:
        """run.json."""
        return self.run.read()

    @cached_property
    def state(self) -> str:
        """running, finished, failed, stopped, or interrupted: its driver is gone."""
        status = str(self.record.get("status", "interrupted"))
        return "interrupted" if status == "running" and not self.run.is_driven() else status

    @cached_property
    def journal(self) -> list[dict[str, Any]]:
        """Its logged metrics, in order."""
        return read_journal(self.run.journal)

    @property
    def step(self) -> int:
        """The last logged step."""
        return self.journal[-1]["step"] if self.journal else 0

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric."""
        found = ((entry["step"], entry["metrics"].get(name)) for entry in self.journal)
        return [(step, value) for step, value in found if value is not None]

    @cached_property
    def last(self) -> dict[str, float]:
        """The last value of every metric."""
        return {k: v for entry in self.journal for k, v in entry["metrics"].items()}

    @cached_property
    def bill(self) -> Bill:
        """What it has cost by now, over all its attempts."""
        return read_bill(self.run)

    @property
    def stages(self) -> list[str]:
        """Names of a pipeline's stages; none of a stage's run."""
        return [stage["name"] for stage in self.record["job"].get("stages", ())]

    @property
    def progress(self) -> str:
        """How far it is."""
        steps = self.record.get("steps")
        return f"step {self.step}/{steps}" if steps else f"{len(self.stages)} stages"

    @property
    def updated(self) -> float:
        """When it last told something: its record, or a line of its journal."""
        logged = self.journal[-1].get("time", 0.0) if self.journal else 0.0
        return max(float(self.record.get("updated", 0.0)), float(logged))

    @property
    def headline(self) -> str:
        """Name of the metric that its task is judged by."""
        return HEADLINE[self.record["job"]["task"]]

    @property
    def score(self) -> str:
        """That metric and its last value."""
        value = self.last.get(self.headline)
        return f"{self.headline} {value:.4f}" if value is not None else "not evaluated"


def overviews(storage: Path, stage: str | None = None) -> list[Overview]:
    """All runs, newest first; of one stage if named.

    Raises:
        RunError: no run of that stage; names the nearest.
    """
    found = [Overview(run) for run in all_runs(storage)]
    read_ahead(found, "record")
    if stage is None:
        return found
    stages = sorted({one.record["stage"] for one in found})
    if stage not in stages:
        near = difflib.get_close_matches(stage, stages, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(stages) or "none yet"
        raise RunError(f"{stage!r}: no run of that stage under {storage}; {hint}there: {known}")
    return [one for one in found if one.record["stage"] == stage]


def read_ahead(found: Sequence[Overview], *names: str) -> None:
    """Read something of many runs at the same time.

    In a bucket each takes a round trip, and an owner on another machine is watched for seconds.
    """
    with ThreadPoolExecutor(32) as threads:
        list(threads.map(lambda one: [getattr(one, name) for name in names], found))


def find_run(target: str, storage: Path) -> Overview:
    """The newest run of a stage or pipeline, or the one of a directory, its name, an MLflow run id.

    Raises:
        RunError: no such run; names the nearest stage.
    """
    path = storage_path(target)
    if (path / "run.json").exists():
        return Overview(Run(path))
    for run in all_runs(storage):
        if run.path.name == target or (read_json(run.tracking) or {}).get("run_id") == target:
            return Overview(run)
    for pipeline in all_runs(storage, "pipelines"):
        if target in (pipeline.path.name, pipeline.read()["name"]):
            return Overview(pipeline)
    return overviews(storage, target)[0]


def members(pipeline: Overview, storage: Path) -> list[Overview]:
    """The newest run of each stage of a pipeline that has one.

    Of a stage that starts from another one, the newest that did start from that one's run.
    """
    every = overviews(storage)
    stages = pipeline.record["job"]["stages"]
    starts = {stage["name"]: stage.get("start_from") or {} for stage in stages}
    chosen: dict[str, Overview | None] = {}

    def choose(name: str) -> Overview | None:
        if name not in chosen:
            before = starts[name].get("checkpoint", "")
            parent = choose(before) if before in starts else None
            wanted = parent.record.get("fingerprint") if parent else None
            chosen[name] = next(
                (
                    one
                    for one in every
                    if one.record["stage"] == name
                    and (before not in starts or (wanted and wanted == _origin(one)))
                ),
                None,
            )
        return chosen[name]

    return [one for name in pipeline.stages if (one := choose(name)) is not None]


def _origin(one: Overview) -> str | None:
    """Fingerprint of the run that a run started from."""
    return (one.record.get("start") or {}).get("fingerprint")


def best_first(found: Sequence[Overview], metric: str) -> list[Overview]:
    """Runs that have a metric by its best last value; the larger the better, but for losses.

    Raises:
        RunError: none has it; names those there are.
    """
    read_ahead(found, "journal")
    having = [one for one in found if metric in one.last]
    if not having:
        known = sorted({name for one in found for name in evaluated(one.last)})
        raise RunError(f"no run has the metric {metric!r}; there are {', '.join(known) or 'none'}")
    return sorted(having, key=lambda one: one.last[metric], reverse="loss" not in metric)


def runs_table(found: Sequence[Overview], metric: str | None = None) -> Table:
    """A line for each run."""
    table = Table(box=SIMPLE)
    for column in (
        *("run", "state", "steps", "metric", "started from"),
        *("hours", "to pay", "attempts", "updated"),
    ):
        table.add_column(column, overflow="fold")
    read_ahead(found, "state", "journal", "bill")
    for one in found:
        record = one.record
        start = record.get("start")
        origin = f"{start['stage'] or start['weights']} @ {start['digest'][:12]}" if start else "-"
        table.add_row(
            one.run.path.name,
            one.state,
            f"{one.step}/{record['steps']}",
            one.score if metric is None else f"{metric} {one.last[metric]:.4f}",
            origin,
            one.bill.used,
            one.bill.paid,
            str(record.get("attempts", 0)),
            f"{as_time(time.time() - one.updated)} ago",
        )
    return table


def pipeline_as_json(one: Overview, storage: Path) -> dict[str, Any]:
    """A pipeline for programs."""
    same = {field: one.record.get(field) for field in ("reason", "bill", "overrides", "updated")}
    stages = [as_json(stage) for stage in members(one, storage)]
    return {"pipeline": one.run.path.name, "state": one.state, **same, "stages": stages}


def as_json(one: Overview) -> dict[str, Any]:
    """A run for programs."""
    record = one.record
    return {
        "run": one.run.path.name,
        "stage": record["stage"],
        "state": one.state,
        "step": one.step,
        "steps": record["steps"],
        "attempts": record.get("attempts", 0),
        "metrics": one.last,
        "error": record.get("error"),
        "reason": record.get("reason"),
        "bill": one.bill.as_record(),
        "overrides": record.get("overrides"),
        "code": record.get("code"),
        "checkpoint": record.get("checkpoint"),
        "digest": record.get("digest"),
        "updated": record.get("updated"),
    }


def wait(
    target: str, storage: Path, timeout: float | None, tell: Callable[[str], None]
) -> Overview:
    """Wait until a run ended, whoever drives it; looks at its directory every second.

    Raises:
        RunError: no such run, or still running after `timeout` seconds.
    """
    began, told = time.monotonic(), ""
    while True:
        one = find_run(target, storage)
        if one.state in ENDED:
            return one
        if one.progress != told:
            told = one.progress
            tell(f"{one.run.path.name}: {told}")
        if timeout is not None and time.monotonic() - began > timeout:
            raise RunError(f"{one.run.path.name}: still running after {timeout:g} s, {told}")
        time.sleep(1)


def compare(found: Sequence[Overview]) -> Table:
    """The parameters that differ between runs, then their last metrics."""
    flat = [dict(flatten(_identity(one.record))) for one in found]
    names = dict.fromkeys(name for one in flat for name in one)
    table = Table(box=SIMPLE)
    table.add_column("")
    for one in found:
        table.add_column(one.run.path.name, overflow="fold")
    for name in names:
        values = [_text(one.get(name)) for one in flat]
        if len(set(values)) > 1:
            table.add_row(name, *values)
    table.add_section()
    for name in dict.fromkeys(name for one in found for name in one.last):
        if name.startswith(("val/", "train/loss")):
            table.add_row(name, *(_text(one.last.get(name)) for one in found))
    return table


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    start = record.get("start")
    return {
        **record["job"],
        "start": f"{start['stage'] or start['weights']} @ {start['digest'][:12]}"
        if start
        else None,
        "data digests": {role: data["digest"] for role, data in record["data"].items()},
        "state": record.get("status"),
        "digest": (record.get("digest") or "")[:12],
    }


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def draw(found: Sequence[Overview], metrics: Sequence[str], path: Path) -> None:
    """Curves of metrics over steps, a panel for each, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(metrics), 4.5), layout="constrained")
    for panel, name in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True
    ):
        for one in found:
            series = one.series(name)
            panel.plot(*zip(*series, strict=True), label=one.run.path.name) if series else None
        panel.set(xlabel="step", title=name)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
