"""What a person sees while a job runs, and the table at its end."""

import logging
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table

from data_pipeline.manifest import Manifest
from orchestrator.files import read_json
from orchestrator.job.config import Job
from orchestrator.launch.costs import bill_table, in_brief, so_far
from orchestrator.launch.stage import PlannedStage, StageResult
from orchestrator.runs.bill import Account
from orchestrator.runs.record import HEADLINE, evaluated, headline
from orchestrator.runs.run import EventReader, read_journal
from orchestrator.runs.server import program, run_link, tracking_uri, ui_command
from orchestrator.training.stage_checks import stage_warnings

_LINE_EVERY = 10.0  # seconds between lines of a stage where there is no terminal


@dataclass(kw_only=True)
class _Watched:
    """A stage that runs."""

    planned: PlannedStage
    task: TaskID
    events: EventReader
    account: Account = field(default_factory=Account)
    step: int = 0  # the last one in the journal
    metrics: dict[str, float] = field(default_factory=dict)
    spoken: float = -_LINE_EVERY


class Display:
    """Progress bars on a terminal, lines elsewhere (a Ray job's log, CI)."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[detail]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._watched: dict[str, _Watched] = {}

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str, style: str = "") -> None:
        """One line above the bars."""
        self._progress.console.print(
            text, style=style, markup=False, highlight=False, soft_wrap=True
        )

    @contextmanager
    def preparing(self, name: str) -> Iterator[Callable[[str, int, int], None]]:
        """Progress of a data set: the callable takes (split, done, total)."""
        task = self._progress.add_task(f"data {name}", total=1, detail="")
        began = time.monotonic()
        counts: dict[str, int] = {}

        def progress(split: str, done: int, total: int) -> None:
            counts[split] = total
            self._progress.update(task, completed=done, total=max(total, 1), detail=split)

        yield progress
        self._progress.remove_task(task)
        splits = ", ".join(f"{split} {count}" for split, count in counts.items()) or "there already"
        self.say(f"data {name}: {splits} ({time.monotonic() - began:.0f} s)")

    def prepared(self, manifests: Iterable[Manifest]) -> None:
        """What a person must know of prepared splits: inputs left out, unexpected counts."""
        for manifest in manifests:
            name = f"{manifest.dataset}/{manifest.split}"
            for warning in manifest.source["warnings"]:
                self.say(f"{name}: {warning}", "yellow")
            for entry in manifest.source["skipped_items"][:10]:
                self.say(f"{name}: left out {entry['key']}: {entry['reason']}", "yellow")
            if manifest.source["skipped"]:
                self.say(f"{name}: {manifest.source['skipped']} inputs left out", "yellow")

    def started(self, planned: PlannedStage) -> None:
        """A stage begins or goes on."""
        stage = planned.stage
        workers = stage.cluster.workers or "this process"
        self.say(
            f"{stage.name}: {planned.steps} steps of {stage.global_batch} on "
            f"{planned.train.num_samples} samples, workers: {workers}, run {planned.run.path}"
        )
        for warning in stage_warnings(stage):
            self.say(f"{stage.name}: warning: {warning}", "yellow")
        if planned.start and planned.hand_over:
            self.say(
                f"{stage.name}: starts from {planned.start.stage or planned.start.place} "
                f"(sha256 {planned.start.digest[:12]}): {planned.hand_over.report()}"
            )
        task = self._progress.add_task(stage.name, total=planned.steps, detail="starting workers")
        watched = _Watched(planned=planned, task=task, events=EventReader(planned.run))
        if earlier := read_journal(planned.run.journal):
            watched.step = earlier[-1]["step"]
        for event in watched.events.new():  # told by earlier attempts
            watched.account.take(event)
        self._watched[stage.name] = watched

    def update(self, running: Sequence[PlannedStage]) -> None:
        """Show what the journals and events of the running stages say by now."""
        for planned in running:
            name = planned.stage.name
            watched = self._watched[name]
            for event in watched.events.new():
                watched.account.take(event)
                if event["kind"] == "start":
                    watched.step = event["step"]  # the journal goes on from there
                if event["text"]:
                    style = "" if event["kind"] == "start" else "yellow"
                    self.say(f"{name}: {event['text']}", style)
            records = read_journal(planned.run.journal, after=watched.step)
            if records:
                watched.step = records[-1]["step"]
                watched.metrics = {k: v for record in records for k, v in record["metrics"].items()}
            detail = _detail(watched)
            self._progress.update(watched.task, completed=watched.step, detail=detail)
            if records:
                self._speak(watched, f"{name}: step {watched.step}/{planned.steps} {detail}")

    def _speak(self, watched: _Watched, line: str) -> None:
        """Without a terminal: a line now and then, and at every evaluation."""
        if self._console.is_terminal:
            return
        now = time.monotonic()
        if evaluated(watched.metrics) or now - watched.spoken > _LINE_EVERY:
            watched.spoken = now
            self.say(line)

    def finished(self, result: StageResult) -> None:
        """A stage is done, now or before."""
        how = "was done before, not run again" if result.reused else "done"
        metric, path = headline(result.checkpoint.state), result.checkpoint.path
        self.say(f"{result.name}: {how}: {metric}, checkpoint {path}{self._let_go(result.name)}")

    def stopped(self, name: str, how: str) -> None:
        """A stage was asked to stop, and did."""
        self.say(f"{name}: {how}{self._let_go(name)}", "yellow")

    def failed(self, name: str, reason: str) -> None:
        """A stage failed."""
        self.say(f"{name}: failed: {reason}{self._let_go(name)}", "red")

    def _let_go(self, name: str) -> str:
        """A stage no longer runs; what it has cost."""
        watched = self._watched.pop(name, None)
        if watched is None:
            return ""
        self._progress.remove_task(watched.task)
        for event in watched.events.new():
            watched.account.take(event)
        return f" ({in_brief(watched.account.bill())})"


def _detail(watched: _Watched) -> str:
    planned, metrics, parts = watched.planned, watched.metrics, []
    if "train/loss" in metrics:
        parts.append(f"loss {metrics['train/loss']:.3f}")
        parts.append(f"{metrics['train/images_per_second']:.0f} images/s")
    if "train/mfu" in metrics:
        parts.append(f"MFU {metrics['train/mfu']:.1%}")
    name = HEADLINE[planned.stage.task]
    if name in metrics:
        parts.append(f"{name} {metrics[name]:.4f}")
    if not parts:
        parts.append("starting workers")
    return ", ".join(parts + so_far(watched.account, planned.steps, time.time()))


def result_table(results: Sequence[StageResult], storage: Path) -> list[Table | str]:
    """What the stages came to, what they have cost, and how to open MLflow."""
    uri = tracking_uri(storage)
    table = Table(title=f"Stages; checkpoints under {storage}", title_justify="left", box=SIMPLE)
    for column in (
        "stage",
        "metric",
        "started from",
        "checkpoint, its weights' sha256, MLflow run",
    ):
        table.add_column(column, overflow="fold")
    for result in results:
        start, checkpoint = result.start, result.checkpoint
        origin = f"{start.stage or start.weights}\n@ {start.digest[:12]}" if start else "scratch"
        record = read_json(result.run.tracking)
        lines = (
            str(checkpoint.path.relative_to(storage)),
            checkpoint.digest,
            run_link(uri, record) if record else "not yet sent to MLflow",
        )
        table.add_row(result.name, headline(checkpoint.state), origin, "\n".join(lines))
    command = ui_command(uri)
    how = f"{command}, then the links above" if command else uri
    trace = f"{program('atrous')} lineage STAGE --storage {shlex.quote(str(storage))}"
    return [
        table,
        bill_table(results),
        f"MLflow: {how}",
        f"The chain of a stage back to raw data: {trace}",
    ]


def job_warnings(job: Job) -> list[str]:
    """What makes results worse without failing, for --dry-run."""
    return [
        f"{stage.name}: warning: {warning}"
        for stage in job.stages
        for warning in stage_warnings(stage)
    ]


def summary(job: Job) -> Table:
    """What a job file asks for, for --dry-run."""
    table = Table(title=f"{job.kind} {job.name}", title_justify="left")
    for column in (
        "stage",
        "task",
        "backbone",
        "data",
        "starts from",
        "length",
        "batch",
        "lr",
        "workers",
    ):
        table.add_column(column, overflow="fold")
    for stage in job.stages:
        table.add_row(
            stage.name,
            stage.task,
            stage.model.backbone,
            f"{stage.data.train.dataset}/{stage.data.train.split}",
            stage.start_from.checkpoint if stage.start_from else "scratch",
            f"{stage.duration} steps" if stage.steps else str(stage.duration),
            str(stage.global_batch),
            f"{stage.optimizer.lr:g}",
            str(stage.cluster.workers),
        )
    return table


def show_log(console: Console) -> None:
    """Warnings of our own packages, in lines."""
    from rich.logging import RichHandler

    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    for name in ("orchestrator", "data_pipeline", "model"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.addHandler(handler)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
