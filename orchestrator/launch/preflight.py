"""What is wrong with a job, and what it will take, before anything of it runs."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from data_pipeline.config import EvalData, TrainData
from data_pipeline.dataset import Dataset, open_dataset
from data_pipeline.errors import DataError
from data_pipeline.manifest import FILE_NAME, Manifest
from data_pipeline.storage import join, open_storage
from orchestrator.bucket import BucketPath, hasty, storage_path
from orchestrator.errors import AtrousError, CheckpointError, RunError
from orchestrator.job.config import Job, PipelineJob, Prepared, StageSettings
from orchestrator.job.duration import to_steps
from orchestrator.job.sweep import SweepJob
from orchestrator.launch.budget import limit_findings
from orchestrator.launch.forecast import (
    Data,
    Device,
    Forecast,
    find_device,
    forecast,
    forecast_warnings,
    much_memory,
)
from orchestrator.launch.machine import (
    Finding,
    check_answers,
    check_machine,
    check_room,
    check_storage,
    check_tracking,
    find_room,
    wait_for_no_hub,
)
from orchestrator.launch.selection import why
from orchestrator.launch.sources import (
    Size,
    check_task,
    published_size,
    size_to_come,
    source_problems,
)
from orchestrator.launch.stage import build_on_meta, finished_result, plan_stage, shapes_of
from orchestrator.launch.trials import dearest
from orchestrator.runs.bill import Bill, read_bill
from orchestrator.runs.checkpoint import Checkpoint
from orchestrator.runs.foreign import TIMM
from orchestrator.runs.run import Run, all_runs
from orchestrator.runs.start import Start, plan_hand_over, read_shapes, resolve_start
from orchestrator.training.stage_checks import (
    check_data,
    check_fills,
    check_precision,
    duration_warnings,
    stage_warnings,
)

if TYPE_CHECKING:
    from model.build import Network

_SHARDS_LOOKED_AT = 200  # of a split, evenly spread


@dataclass(kw_only=True)
class Report:
    """Findings, and a forecast of every stage whose data is there."""

    findings: list[Finding] = field(default_factory=list)
    forecasts: list[Forecast] = field(default_factory=list)
    done: list[str] = field(default_factory=list)  # stages that an earlier run finished
    unknown: dict[str, str] = field(default_factory=dict)  # stage -> why there is no forecast
    assumed: dict[str, int] = field(default_factory=dict)  # data set/split -> samples to come
    origins: dict[str, str] = field(default_factory=dict)  # stage -> what it takes from where
    changes: dict[str, list[str]] = field(default_factory=dict)  # stage -> since its newest run
    bills: dict[str, Bill] = field(default_factory=dict)  # stage -> of its runs so far

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
            self.add("error", where, str(error))

    def add(self, level: Literal["error", "warning"], where: str, text: str) -> None:
        """Note a finding, once."""
        finding = Finding(level, where, text.removeprefix(f"{where}: "))
        if finding not in self.findings:
            self.findings.append(finding)


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
        self._storage = hasty(storage_path(job.storage))
        self._stages = _stages(job)
        self._report = Report()
        self._foreseen: dict[str, _Foreseen] = {}
        self._looked_at: set[str] = set()
        self._results: dict[str, Checkpoint] = {}

    def run(self) -> Report:
        report = self._report
        if isinstance(self._storage, BucketPath) and (away := check_storage(self._storage, 0)):
            report.findings += away  # the rest would wait for it, minutes each
            return report
        with report.noting("data_root"):
            check_answers(self._job.data_directory)
        if report.errors:
            return report
        self._check_sources()
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
        report.findings += limit_findings(self._job, report)
        return report

    def _check_sources(self) -> None:
        """Data sets that are to be prepared: their sources, layouts, splits."""
        for name, wanted in self._job.datasets.items():
            where = f"datasets.{name}"
            with self._report.noting(where):
                if wanted.source is not None:
                    check_answers(wanted.source)
                users = [stage for stage in self._stages if name in _datasets(stage)]
                prepared = self._is_prepared(name, wanted)
                for text in source_problems(name, wanted, users, prepared=prepared):
                    self._report.add("error", where, text)
                if not users:
                    self._report.add("warning", where, "no stage uses it; it is prepared anyway")

    def _is_prepared(self, name: str, wanted: Prepared) -> bool:
        """Whether every split of a data set that a stage uses, or the job asks for, is there."""
        used = [part for s in self._stages for part in (s.data.train, s.data.val)]
        splits = {part.split for part in used if part.dataset == name} | set(wanted.splits or ())
        storage = open_storage(join(self._job.data_directory, name))
        return all(storage.size(f"{split}/{FILE_NAME}") is not None for split in splits)

    def _check_stage(self, stage: StageSettings, device: Device) -> None:
        report = self._report
        with report.noting(stage.name):
            check_precision(stage)
        for text in stage_warnings(stage):
            report.add("warning", stage.name, text)
        data = self._data_of(stage)
        if data is None:
            return
        steps = to_steps(stage.duration, data.train // stage.global_batch)
        for text in duration_warnings(stage, steps, data.train // stage.global_batch):
            report.add("warning", stage.name, text)
        network = build_on_meta(stage, len(data.class_names))
        shapes = shapes_of(network)
        with report.noting(stage.name):
            self._check_start(stage, shapes, data.class_names)
        self._foreseen[stage.name] = _Foreseen(
            shapes=shapes, task=stage.task, class_names=data.class_names
        )
        self._reckon(stage, network, data, steps, device)
        resolved = stage.start_from is None or stage.name in report.origins
        there = f"{stage.data.train.dataset}/{stage.data.train.split}" not in report.assumed
        if resolved and there and not self._is_tuned(stage):
            self._look_for_result(stage)

    def _data_of(self, stage: StageSettings) -> Data | None:
        """What is prepared, else what the job prepares first, else what is published of it."""
        if self._to_come(stage) is None:
            sets = []
            for role, part in (("train", stage.data.train), ("val", stage.data.val)):
                with self._report.noting(stage.name):
                    sets.append(self._open(role, part))
            if len(sets) == 2:
                return self._prepared_data(stage, *sets)
        train = self._size_to_come(stage, stage.data.train)
        val = self._size_to_come(stage, stage.data.val)
        name = stage.data.train.dataset
        if train is None or val is None:
            why = "prepared first" if self._to_come(stage) else "not there"
            self._report.unknown[stage.name] = f"{name} is {why}"
            return None
        self._report.assumed[f"{name}/{stage.data.train.split}"] = train.samples
        check_fills(stage, train.samples)
        return Data(train.samples, val.samples, train.class_names)

    def _size_to_come(self, stage: StageSettings, part: TrainData | EvalData) -> Size | None:
        wanted = self._job.datasets.get(part.dataset)
        if wanted is None:
            return published_size(part.dataset, part.split)
        check_task(wanted, stage, part.dataset)
        return size_to_come(wanted, part.split)

    def _prepared_data(self, stage: StageSettings, train: Dataset, val: Dataset) -> Data:
        for split in (train, val):
            if not self._is_indexed_again(split):
                self._look_at(split, stage.name)
        check_data(stage, train, val)
        _check_some_class_counts(stage, train.manifest.class_names)
        return Data(train.num_samples, val.num_samples, train.manifest.class_names)

    def _open(self, role: str, part: TrainData | EvalData) -> Dataset:
        try:
            return open_dataset(self._job.data_directory, part.dataset, part.split)
        except DataError as error:
            raise DataError(f"data.{role}: {error}") from None

    def _to_come(self, stage: StageSettings) -> Prepared | None:
        """A data set of the stage that the job itself prepares and has not yet."""
        datasets = self._job.datasets
        wanted = [(name, datasets[name]) for name in _datasets(stage) if name in datasets]
        return next((one for name, one in wanted if not self._is_prepared(name, one)), None)

    def _is_indexed_again(self, split: Dataset) -> bool:
        """Whether the launch looks at its shards anew: those of others, which may change."""
        wanted = self._job.datasets.get(split.manifest.dataset)
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
            over = plan_hand_over(shapes, earlier.shapes, start, names)
            self._report.origins[stage.name] = f"{wanted.checkpoint}: {over.report()}"
        elif wanted.checkpoint not in self._report.unknown:
            start_now = self._resolve(stage, wanted.checkpoint)
            if start_now is not None:
                over = plan_hand_over(shapes, read_shapes(start_now.file()), start_now, names)
                origin = f"{wanted.checkpoint} (sha256 {start_now.digest[:12]})"
                self._report.origins[stage.name] = f"{origin}: {over.report()}"

    def _resolve(self, stage: StageSettings, place: str) -> Start | None:
        """Where a stage starts that starts from none of this job.

        Raises:
            CheckpointError: it cannot; the field, why, and the cure.
        """
        try:
            if place.startswith("s3://"):
                check_answers(place)
            if place.startswith(TIMM):
                wait_for_no_hub()
            return resolve_start(stage, self._storage, {})
        except (AtrousError, DataError, OSError) as error:
            names = [one.name for one in self._stages if one.name != stage.name]
            near = difflib.get_close_matches(place, names, 1)
            hint = f"; of this job, did you mean {near[0]!r}?" if near else ""
            text = str(error).removeprefix("start_from: ")
            raise CheckpointError(f"start_from: {text}{hint}") from None

    def _reckon(
        self, stage: StageSettings, network: "Network", data: Data, steps: int, device: Device
    ) -> None:
        report = self._report
        found = forecast(stage, network, data, steps, device, self._runs)
        if isinstance(self._job, SweepJob) and self._is_tuned(stage):
            stage, found = dearest(self._job, data, device, self._runs)
        report.forecasts.append(found)
        if finding := much_memory(stage, found):
            report.findings.append(finding)
        for text in forecast_warnings(stage, found, data):
            report.add("warning", stage.name, text)

    def _look_for_result(self, stage: StageSettings) -> None:
        """Whether an earlier run did the stage, or all that it starts from."""
        start = stage.start_from
        if start and start.checkpoint in self._foreseen and start.checkpoint not in self._results:
            return
        report = self._report
        with report.noting(stage.name):
            planned = plan_stage(stage, self._storage, self._job.data_directory, self._results)
            report.changes[stage.name] = list(why(planned, self._runs))
            report.bills[stage.name] = read_bill(planned.run)
            result = finished_result(planned)
            if result is not None:
                self._results[stage.name] = result.checkpoint
                report.done.append(stage.name)

    def _is_tuned(self, stage: StageSettings) -> bool:
        return isinstance(self._job, SweepJob) and stage.name == self._job.tuned.name

    @cached_property
    def _runs(self) -> list[Run]:
        return all_runs(self._storage)


def _datasets(stage: StageSettings) -> tuple[str, str]:
    return stage.data.train.dataset, stage.data.val.dataset


def _stages(job: Job) -> list[StageSettings]:
    return job.in_order if isinstance(job, PipelineJob) else [job.settings]


def _check_some_class_counts(stage: StageSettings, names: tuple[str, ...]) -> None:
    """Refuse class weights under which nothing is learnt.

    Raises:
        RunError: the weight of every class is 0.
    """
    weights = stage.loss.class_weights
    if not any(weights.get(name, 1.0) for name in names):
        raise RunError(
            f"{stage.name}: loss.class_weights: all {len(names)} classes have the weight 0, so the "
            "loss is 0 and nothing is learnt; give the classes that count more than 0"
        )


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
