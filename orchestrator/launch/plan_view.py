"""The forecast of a job and its findings, in words and tables."""

from collections.abc import Iterable, Iterator, Sequence

from rich.box import SIMPLE
from rich.table import Table

from orchestrator.job.config import Job, PipelineJob, StageSettings
from orchestrator.job.sections import Cluster
from orchestrator.launch.forecast import Cost, Forecast
from orchestrator.launch.machine import Finding
from orchestrator.launch.preflight import Report
from orchestrator.launch.trials import trial_lines


def as_yaml(job: Job) -> str:
    """The job with all its values, as a job file."""
    import yaml

    values = {"kind": job.kind, "name": job.name} | job.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def plan_tables(job: Job, report: Report) -> Iterator[Table]:
    """What would happen, and what it would take: a line for each stage, in the order they run."""
    stages = job.in_order if isinstance(job, PipelineJob) else [job.settings]
    of_stage = {one.stage: one for one in report.forecasts}
    yield _what_happens(f"{job.kind} {job.name}: what happens", stages, of_stage)
    table = _what_it_takes(stages, of_stage, report)
    left = [one for one in report.forecasts if one.stage not in report.done]
    if len(stages) > 1:
        table.add_section()
        table.add_row("all that is to run", "one after another", "", "", *_spans(left))
    yield table


def _what_happens(
    title: str, stages: Iterable[StageSettings], of_stage: dict[str, Forecast]
) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for column in ("stage", "trains", "on", "starting from", "length", "batch", "rate"):
        table.add_column(column, overflow="fold")
    for stage in stages:
        found = of_stage.get(stage.name)
        rate = found.rate if found else stage.optimizer.lr
        table.add_row(
            stage.name,
            stage.model.backbone,
            f"{stage.data.train.dataset}/{stage.data.train.split}",
            stage.start_from.checkpoint if stage.start_from else "scratch",
            f"{found.steps:,} steps, {found.epochs:.3g} epochs" if found else str(stage.duration),
            str(stage.global_batch),
            f"{rate:g}",
        )
    return table


def _what_it_takes(
    stages: Iterable[StageSettings], of_stage: dict[str, Forecast], report: Report
) -> Table:
    table = Table(title="what it takes", title_justify="left", box=SIMPLE)
    for column in ("stage", "workers", "memory of each", "a checkpoint"):
        table.add_column(column, overflow="fold")
    for column in ("hours", "GPU-hours", "money"):
        table.add_column(column, justify="right")
    for stage in stages:
        found = of_stage.get(stage.name)
        need = ("-", "-")
        if found:
            need = (f"{found.memory / 2**30:.1f} GiB", f"{found.checkpoint / 2**20:.0f} MiB")
        costs = _costs(stage, report, found)
        table.add_row(stage.name, _workers(stage.cluster), *need, *costs)
    return table


def _workers(cluster: Cluster) -> str:
    if not cluster.max_workers:
        return "this process" + (", its GPU" if cluster.gpus_per_worker else "")
    least = f"{cluster.min_workers} to " if cluster.min_workers < cluster.max_workers else ""
    gpus = f" x {cluster.gpus_per_worker:g} GPU" if cluster.gpus_per_worker else " on CPUs"
    return f"{least}{cluster.max_workers}{gpus}"


def _costs(stage: StageSettings, report: Report, found: Forecast | None) -> tuple[str, str, str]:
    if stage.name in report.done:
        return "was done", "", ""
    if found is None:
        return report.unknown.get(stage.name, "see below"), "", ""
    return _spans([found])


def _spans(found: Sequence[Forecast]) -> tuple[str, str, str]:
    """Hours, GPU-hours and money together, each on the least workers to the most."""
    least = [Cost(one.hours, one.gpu_hours, one.money) for one in found]
    most = [one.on_most for one in found]
    hours, gpu_hours, money = (
        [sum(one[column] or 0 for one in costs) for costs in (least, most)] for column in range(3)
    )
    return _span(hours, 1), _span(gpu_hours, 1), _span(money, 2)


def _span(numbers: Sequence[float], digits: int) -> str:
    if not any(numbers):
        return "-"
    texts = [f"{n:.{digits}f}" if n >= 0.1 or not n else f"{n:.2g}" for n in numbers]
    return " to ".join(dict.fromkeys(texts))


def explaining_lines(job: Job, report: Report) -> Iterator[str]:
    """What stands behind the numbers of the tables."""
    left = [one for one in report.forecasts if one.stage not in report.done]
    for basis in dict.fromkeys(one.device.basis for one in left):
        yield f"Hours, on the least workers to the most, are an order of size: {basis}."
    if report.assumed:
        sizes = ", ".join(f"{name} {size:,}" for name, size in report.assumed.items())
        yield f"Data that is not prepared yet is reckoned as listed, drawn or published: {sizes}."
    if any(one.gpu_hours and one.money is None for one in left):
        field = "stages.*.cluster" if isinstance(job, PipelineJob) else "cluster"
        yield f"For the money: --set '{field}.price_per_gpu_hour=2' (what you pay), or in the file."
    yield from trial_lines(job, report)
    for name, origin in report.origins.items():
        yield f"{name} starts from {origin}"


def finding_lines(findings: Iterable[Finding]) -> Iterator[tuple[str, str]]:
    """(line, style) of each finding, errors last, where a terminal shows them."""
    for one in sorted(findings, key=lambda one: one.level == "error"):
        yield f"{one.where}: {one.level}: {one.text}", "red" if one.level == "error" else "yellow"
