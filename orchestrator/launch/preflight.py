"""What is wrong with a job, and what it will take, before anything of it runs."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.table import Table

from data_pipeline.dataset import Dataset, open_dataset
from data_pipeline.errors import DataError
from data_pipeline.manifest import FILE_NAME, Manifest
from data_pipeline.storage import is_local, join, open_storage
from orchestrator.errors import AtrousError
from orchestrator.job.config import Job, PipelineJob, Prepared, StageSettings
from orchestrator.job.duration import to_steps
from orchestrator.job.sections import Steps
from orchestrator.launch.forecast import (
    Data,
    Device,
    Forecast,
    find_device,
    forecast,
    published_size,
)
from orchestrator.launch.machine import (
    Finding,
    check_machine,
    check_room,
    check_storage,
    check_tracking,
    find_room,
)
from orchestrator.launch.selection import why
from orchestrator.launch.stage import build_on_meta, finished_result, plan_stage, shapes_of
from orchestrator.runs.checkpoint import Checkpoint
from orchestrator.runs.run import Run, all_runs
from orchestrator.runs.start import Start, plan_hand_over, read_shapes, resolve_start
from orchestrator.training.stage_checks import check_data, stage_warnings

if TYPE_CHECKING:
    from model.build import Network

_FULL = 0.9  # share of a device's memory
_SHARDS_LOOKED_AT = 200  # of a split, evenly spread


@dataclass(kw_only=True)
class Report:
    """Findings, and a forecast of every stage whose data is there."""

    findings: list[Finding] = field(default_factory=list)
    forecasts: list[Forecast] = field(default_factory=list)
    done: list[str] = field(default_factory=list)  # stages that an earlier run finished
    unknown: dict[str, str] = field(default_factory=dict)  # stage -> why there is no forecast
    changes: dict[str, list[str]] = field(default_factory=dict)  # stage -> since its newest run

    @property
    def errors(self) -> list[Finding]:
        """What keeps the job from running."""
        return [one for one in self.findings if one.level == "error"]

    @contextmanager
    def noting(self, where: str) -> Iterator[None]:
        """Turn errors that a user can act on into findings."""
        try:
            yield
        except (AtrousError, DataError, OSError) as error:
            text = str(error).removeprefix(f"{where}: ")
            self.findings.append(Finding("error", where, text))

    def warn(self, where: str, text: str) -> None:
        """Note what works and yet may surprise."""
        self.findings.append(Finding("warning", where, text))


@dataclass(frozen=True, kw_only=True)
class _Foreseen:
    """A stage that will have run: what a later one takes from it."""

    shapes: dict[str, tuple[int, ...]]
    task: str
    class_names: tuple[str, ...]


def preflight(job: Job) -> Report:
    """Check everything that can be known without training, in seconds and without a GPU."""
    return _Preflight(job).run()


class _Preflight:
    def __init__(self, job: Job) -> None:
        self._job = job
        self._storage = Path(job.storage)
        self._stages = _stages(job)
        self._report = Report()
        self._foreseen: dict[str, _Foreseen] = {}
        self._looked_at: set[str] = set()
        self._results: dict[str, Checkpoint] = {}

    def run(self) -> Report:
        report = self._report
        if isinstance(self._job, PipelineJob):
            self._check_sources(self._job)
        room = None
        with report.noting("cluster"):
            room = find_room()
        gpus = room.accelerators if room else ()
        for stage in self._stages:
            with report.noting(stage.name):
                self._check_stage(stage, find_device(stage.cluster.gpus_per_worker, gpus))
        to_run = [stage for stage in self._stages if stage.name not in report.done]
        if room:
            report.findings += check_room(to_run, room)
        needed = sum(
            one.checkpoint * (stage.checkpoint.keep + stage.checkpoint.keep_best + 1)
            for one in report.forecasts
            for stage in to_run
            if stage.name == one.stage
        )
        report.findings += check_storage(self._storage, needed)
        report.findings += check_tracking(self._storage)
        report.findings += check_machine(to_run)
        return report

    def _check_sources(self, job: PipelineJob) -> None:
        """Data sets that are to be prepared need their sources."""
        for name, wanted in job.datasets.items():
            if wanted.source is None or not is_local(wanted.source):
                continue
            if not self._is_prepared(name, wanted) and not Path(wanted.source).exists():
                self._report.findings.append(
                    Finding(
                        "error",
                        f"datasets.{name}",
                        f"source: {wanted.source} does not exist, and {name} is not prepared "
                        f"under {job.data_directory}; correct it, or prepare the data set there",
                    )
                )

    def _is_prepared(self, name: str, wanted: Prepared) -> bool:
        """Whether every split of a data set that a stage uses, or the job asks for, is there."""
        used = [part for s in self._stages for part in (s.data.train, s.data.val)]
        splits = {part.split for part in used if part.dataset == name} | set(wanted.splits or ())
        storage = open_storage(join(self._job.data_directory, name))
        return all(storage.size(f"{split}/{FILE_NAME}") is not None for split in splits)

    def _check_stage(self, stage: StageSettings, device: Device) -> None:
        report = self._report
        for text in stage_warnings(stage):
            report.warn(stage.name, text)
        data = self._data_of(stage)
        if data is None:
            return
        steps = to_steps(stage.duration, data.train // stage.global_batch)
        for text in duration_warnings(stage, steps, data.train // stage.global_batch):
            report.warn(stage.name, text)
        network = build_on_meta(stage, len(data.class_names))
        shapes = shapes_of(network)
        with report.noting(stage.name):
            self._check_start(stage, shapes, data.class_names)
        self._foreseen[stage.name] = _Foreseen(
            shapes=shapes, task=stage.task, class_names=data.class_names
        )
        self._reckon(stage, network, data, steps, device)
        if self._to_come(stage) is None:
            self._look_for_result(stage)

    def _data_of(self, stage: StageSettings) -> Data | None:
        """What is prepared, else what the job prepares first, by its published size."""
        used = stage.data
        to_come = self._to_come(stage)
        if to_come is None:
            train = open_dataset(self._job.data_directory, used.train.dataset, used.train.split)
            val = open_dataset(self._job.data_directory, used.val.dataset, used.val.split)
            for split in (train, val):
                if not self._is_indexed_again(split):
                    self._look_at(split, stage.name)
            check_data(stage, train, val)
            return Data(train.num_samples, val.num_samples, train.manifest.class_names)
        published = [
            published_size(to_come.format, split) for split in (used.train.split, used.val.split)
        ]
        known = [size for size in published if size is not None]
        if to_come.synthesize is None and len(known) == len(published):
            names = tuple(f"{to_come.format} {number}" for number in range(known[0].classes))
            return Data(known[0].samples, known[1].samples, names)
        self._report.unknown[stage.name] = f"{used.train.dataset} is prepared first"
        return None

    def _to_come(self, stage: StageSettings) -> Prepared | None:
        """A data set of the stage that the job itself prepares and has not yet."""
        datasets = self._job.datasets if isinstance(self._job, PipelineJob) else {}
        used = (stage.data.train.dataset, stage.data.val.dataset)
        wanted = [(name, datasets[name]) for name in used if name in datasets]
        return next((one for name, one in wanted if not self._is_prepared(name, one)), None)

    def _is_indexed_again(self, split: Dataset) -> bool:
        """Whether the launch looks at its shards anew: those of others, which may change."""
        datasets = self._job.datasets if isinstance(self._job, PipelineJob) else {}
        wanted = datasets.get(split.manifest.dataset)
        return wanted is not None and wanted.format == "shards"

    def _look_at(self, split: Dataset, where: str) -> None:
        """Shards are there, of the size in the manifest, and the first sample is readable."""
        manifest = split.manifest
        if manifest.digest in self._looked_at:
            return
        self._looked_at.add(manifest.digest)
        with self._report.noting(where):
            _check_shards(manifest)
            split.read(*split.locate(0))

    def _check_start(
        self, stage: StageSettings, shapes: dict[str, tuple[int, ...]], names: tuple[str, ...]
    ) -> None:
        """start_from resolves and fits, tensor by tensor; of stages to come by their shapes."""
        wanted = stage.start_from
        if wanted is None:
            return
        earlier = self._foreseen.get(wanted.checkpoint)
        if earlier is not None:
            take = wanted.take or ("network" if earlier.task == stage.task else "backbone")
            start = Start(
                weights=wanted.checkpoint, digest="", take=take, class_names=earlier.class_names
            )
            plan_hand_over(shapes, earlier.shapes, start, names)
        elif wanted.checkpoint not in self._report.unknown:
            start_now = resolve_start(stage, self._storage, {})
            if start_now is not None:
                plan_hand_over(shapes, read_shapes(Path(start_now.weights)), start_now, names)

    def _reckon(
        self, stage: StageSettings, network: "Network", data: Data, steps: int, device: Device
    ) -> None:
        report = self._report
        found = forecast(stage, network, data, steps, device, self._runs)
        report.forecasts.append(found)
        room = found.device.bytes
        if room and found.memory > _FULL * room and stage.micro_batch != "auto":
            report.warn(
                stage.name,
                f"a training step needs about {found.memory / 2**30:.0f} GiB of a worker, an "
                f"{found.device.name} has {room / 2**30:.0f}; set micro_batch (auto finds what "
                "fits), or take more workers",
            )
        every = to_steps(stage.checkpoint.every, data.train // stage.global_batch)
        hours = found.hours * min(every, steps) / steps
        if hours > 1:
            report.warn(
                stage.name,
                f"checkpoint.every: {stage.checkpoint.every} is about {hours:.1f} hours, which a "
                "failure would cost; write them more often",
            )

    def _look_for_result(self, stage: StageSettings) -> None:
        """Whether an earlier run did the stage, or all that it starts from."""
        start = stage.start_from
        if start and start.checkpoint in self._foreseen and start.checkpoint not in self._results:
            return
        report = self._report
        with report.noting(stage.name):
            planned = plan_stage(stage, self._storage, self._job.data_directory, self._results)
            report.changes[stage.name] = list(why(planned, self._runs))
            result = finished_result(planned)
            if result is not None:
                self._results[stage.name] = result.checkpoint
                report.done.append(stage.name)

    @cached_property
    def _runs(self) -> list[Run]:
        return all_runs(self._storage)


def _stages(job: Job) -> list[StageSettings]:
    return job.in_order if isinstance(job, PipelineJob) else [job.settings]


def plan_table(job: Job, report: Report) -> Table:
    """What would happen, and what it would take, a line for each stage."""
    of_stage = {one.stage: one for one in report.forecasts}
    table = Table(title=f"{job.kind} {job.name}", title_justify="left", box=SIMPLE)
    for column in ("stage", "data", "starts from", "length", "batch", "workers", "a worker needs"):
        table.add_column(column, overflow="fold")
    for column in ("hours", "GPU-hours", "money"):
        table.add_column(column, justify="right")
    for stage in _stages(job):
        table.add_row(
            stage.name,
            f"{stage.data.train.dataset}/{stage.data.train.split}",
            stage.start_from.checkpoint if stage.start_from else "scratch",
            *_length(stage, of_stage.get(stage.name)),
            *_costs(stage, report, of_stage.get(stage.name)),
        )
    left = [one for one in report.forecasts if one.stage not in report.done]
    money = [one.money for one in left if one.money is not None]
    table.add_section()
    table.add_row(
        *("to run", "", "", "", "", "", ""),
        f"{sum(one.hours for one in left):.1f}",
        f"{sum(one.gpu_hours for one in left):.1f}",
        f"{sum(money):.2f}" if money else "-",
    )
    return table


def _length(stage: StageSettings, found: Forecast | None) -> tuple[str, str, str, str]:
    cluster = stage.cluster
    gpus = f" x {cluster.gpus_per_worker:g} GPU" if cluster.gpus_per_worker else ""
    elastic = cluster.min_workers < cluster.max_workers
    least = f"{cluster.min_workers} to " if elastic else ""
    workers = f"{least}{cluster.max_workers}{gpus}" if cluster.max_workers else "this process"
    if found is None:
        return str(stage.duration), str(stage.global_batch), workers, "-"
    length = f"{found.steps} steps, {found.epochs:.3g} epochs"
    need = f"{found.memory / 2**30:.1f} GiB, {found.checkpoint / 2**20:.0f} MiB a checkpoint"
    return length, str(stage.global_batch), workers, need


def _costs(stage: StageSettings, report: Report, found: Forecast | None) -> tuple[str, str, str]:
    if stage.name in report.done:
        return "was done", "", ""
    if found is None:
        return report.unknown.get(stage.name, "see below"), "", ""
    gpu_hours = f"{found.gpu_hours:.1f}" if found.gpu_hours else "-"
    return f"{found.hours:.1f}", gpu_hours, "-" if found.money is None else f"{found.money:.2f}"


def finding_lines(findings: Iterable[Finding]) -> Iterator[tuple[str, str]]:
    """(line, style) of each finding."""
    for one in findings:
        yield f"{one.where}: {one.level}: {one.text}", "red" if one.level == "error" else "yellow"


def basis_lines(report: Report) -> list[str]:
    """Where the hours come from."""
    left = [one for one in report.forecasts if one.stage not in report.done]
    bases = dict.fromkeys(one.device.basis for one in left)
    return [f"Hours on the least workers, reckoned from {basis}." for basis in bases]


def _check_shards(manifest: Manifest) -> None:
    """The shards (of very many, some) have the sizes that the manifest says.

    Raises:
        DataError: one is missing or of another size.
    """
    every = max(1, len(manifest.shards) // _SHARDS_LOOKED_AT)
    for shard in manifest.shards[::every]:
        size = manifest.shard_storage.size(shard.name)
        if size != shard.size:
            there = "is missing" if size is None else f"has {size} bytes"
            raise DataError(
                f"{manifest.place}: shard {shard.name} {there}, the manifest says {shard.size}; "
                "copy it again or prepare (index) the data set again (atrous data verify finds all)"
            )


def duration_warnings(stage: StageSettings, steps: int, steps_per_epoch: int) -> Iterator[str]:
    """Times of a stage, written in its job file, that do not fit into its length."""

    def is_longer(value: int | str | None) -> bool:
        return value is not None and to_steps(value, steps_per_epoch) > steps

    hard = stage.loss.hard_pixels
    for name, given, value, then in (
        (
            "evaluate.every",
            stage.evaluate,
            stage.evaluate.every,
            "it is evaluated once, at the end",
        ),
        ("checkpoint.every", stage.checkpoint, stage.checkpoint.every, "a failure costs all of it"),
        ("schedule.warmup", stage.schedule, stage.schedule.warmup, "the rate never gets to lr"),
        ("loss.hard_pixels.anneal", hard, hard.anneal if hard else None, "fraction is not reached"),
        ("log_every", stage, stage.log_every, "one line is logged, at the end"),
    ):
        if given and name.rpartition(".")[2] in given.model_fields_set and is_longer(value):
            yield f"{name}: {value} is longer than the training of {steps} steps: {then}"
    if isinstance(stage.schedule, Steps):
        late = [value for value in stage.schedule.milestones if is_longer(value)]
        if late:
            yield f"schedule.milestones: {late} lie after the end of the training ({steps} steps)"
    both = math.lcm(
        to_steps(stage.evaluate.every, steps_per_epoch),
        to_steps(stage.checkpoint.every, steps_per_epoch),
    )
    if stage.checkpoint.keep_best and both >= steps:
        yield (
            "checkpoint.keep_best: no checkpoint but the last is of an evaluated step: give "
            "checkpoint.every the time of evaluate.every"
        )
