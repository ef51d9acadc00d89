"""Commands about job files and runs that train nothing."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.launch.submit import Submission

commands = typer.Typer()

Storage = Annotated[
    str | None,
    typer.Option(help="Directory or s3://bucket/prefix; default: $ATROUS_STORAGE, else ~/atrous."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Target = Annotated[
    str, typer.Argument(help="A stage or pipeline (its newest run), run directory, MLflow run id.")
]


def storage_place(storage: str | None) -> Path:
    """The storage that an option names, or the default one."""
    from orchestrator.bucket import storage_path

    return storage_path(storage or os.environ.get("ATROUS_STORAGE") or "~/atrous")


def make_console() -> "Console":
    """A console for tables: wide where it is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)


@commands.command()
def schema() -> None:
    """Print the JSON Schema of job files, for editors."""
    from orchestrator.job.explain import json_schema

    typer.echo(json.dumps(json_schema(), indent=1, ensure_ascii=False))


@commands.command()
def explain(
    field: Annotated[
        str, typer.Argument(help="Such as optimizer.lr; default: the top level.")
    ] = "",
) -> None:
    """Tell what a field of a job file means, what it may be, and its default."""
    from orchestrator.job.explain import explain as lines

    for line in lines(field):
        typer.echo(line)


@commands.command()
def plan(
    job_file: Path,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster to look at; default: $RAY_ADDRESS, else here.")
    ] = None,
    why: Annotated[
        bool, typer.Option("--why", help="Also tell what changed since each stage last ran.")
    ] = False,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Also print the job with all its values.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a job and tell what it will take; exit status 1 where it cannot run."""
    from dataclasses import asdict

    from orchestrator.job.job_file import load_job
    from orchestrator.launch.budget import limit_lines
    from orchestrator.launch.plan_view import (
        as_yaml,
        explaining_lines,
        finding_lines,
        plan_tables,
    )
    from orchestrator.launch.preflight import preflight

    job = load_job(job_file, tuple(override or ()))
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
    report = preflight(job)
    if as_json:
        typer.echo(json.dumps(asdict(report) | {"job": job.model_dump(mode="json")}, indent=1))
    else:
        console = make_console()
        if resolved:
            typer.echo(as_yaml(job))
        for table in plan_tables(job, report):
            console.print(table)
        for line in (*explaining_lines(job, report), *limit_lines(job, report)):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        for name, changes in report.changes.items() if why else ():
            console.print(f"{name}: " + "\n".join(changes or ["never ran"]), highlight=False)
        for line, style in finding_lines(report.findings):
            console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1 if report.errors else 0)


@commands.command()
def submit(
    job_file: Path,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="http://HEAD:8265; default: $RAY_ADDRESS, else this machine.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show its log; end with its exit status.")
    ] = False,
    kuberay: Annotated[
        bool, typer.Option("--kuberay", help="Print a RayJob manifest instead.")
    ] = False,
    apply: Annotated[
        bool, typer.Option("--apply", help="--kuberay: and hand it to kubectl apply.")
    ] = False,
    package: Annotated[
        str | None, typer.Option(help="--kuberay: s3://bucket/prefix for the packed project.")
    ] = None,
    image: Annotated[str, typer.Option(help="--kuberay: container image.")] = "atrous:latest",
) -> None:
    """Pack what git tracks and run the job file on a Ray cluster."""
    from orchestrator.job.job_file import load_job
    from orchestrator.launch import submit as submitting

    overrides = tuple(override or ())
    submission = submitting.make_submission(load_job(job_file, overrides), job_file, overrides)
    if kuberay:
        if package is None:
            raise typer.BadParameter("--kuberay needs --package s3://bucket/prefix")
        typer.echo(_kuberay(submission, package, image, apply=apply))
        return
    if apply or package is not None:
        raise typer.BadParameter("--apply and --package go together with --kuberay")
    client, job_id = submitting.submit(submission, address, typer.echo)
    typer.echo(f"submitted: {job_id}")
    if follow:
        try:
            raise typer.Exit(submitting.follow(client, job_id, typer.echo))
        except KeyboardInterrupt:
            typer.echo(f"{job_id} goes on without you; to stop it: ray job stop {job_id}", err=True)
            raise typer.Exit(130) from None
    typer.echo(f"its log: ray job logs {job_id} --follow")


def _kuberay(submission: "Submission", package: str, image: str, *, apply: bool) -> str:
    """The RayJob of a submission whose project is uploaded, or what kubectl says to it."""
    from orchestrator.launch import submit as submitting

    if not package.startswith("s3://"):
        raise typer.BadParameter(f"--package {package}: pods fetch it from s3://bucket/prefix")
    if apply:
        submitting.kubectl()  # before anything is uploaded
    packed, uri = submitting.upload(submission, package, lambda line: typer.echo(line, err=True))
    for warning in submitting.pod_warnings(packed):
        typer.secho(f"warning: {warning}", err=True, fg=typer.colors.YELLOW)
    manifest = submitting.kuberay_manifest(packed, uri, image)
    return submitting.apply(manifest) if apply else manifest


@commands.command()
def lineage(
    target: Annotated[
        str, typer.Argument(help="A stage, run directory, MLflow run id or checkpoint.")
    ],
    storage: Storage = None,
    as_json: AsJson = False,
    dot: Annotated[bool, typer.Option("--dot", help="Print Graphviz.")] = False,
) -> None:
    """Print the chain of a checkpoint back to raw data, with digests and metrics."""
    from orchestrator.runs.lineage import as_dot, as_lines, as_records, find_checkpoint, trace

    link = trace(find_checkpoint(target, storage_place(storage)))
    if as_json:
        typer.echo(json.dumps(as_records(link), indent=1))
    else:
        typer.echo("\n".join(as_dot(link) if dot else as_lines(link)))


@commands.command()
def runs(
    stage: Annotated[str | None, typer.Option(help="Only runs of this stage.")] = None,
    best: Annotated[
        str | None, typer.Option(metavar="METRIC", help="By this metric, best first: val/miou.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1)] = 30,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """List runs, newest or best first."""
    from orchestrator.runs import overview

    found = overview.overviews(storage_place(storage), stage)
    if best is not None:
        found = overview.best_first(found, best)
    if as_json:
        overview.read_ahead(found[:limit], "state", "journal", "bill")
        typer.echo(json.dumps([overview.as_json(one) for one in found[:limit]], indent=1))
    elif found:
        make_console().print(overview.runs_table(found[:limit], best))
    else:
        typer.echo(f"no runs under {storage_place(storage)}")


@commands.command()
def status(target: Target, storage: Storage = None, as_json: AsJson = False) -> None:
    """Tell how a run stands, from its directory alone."""
    from orchestrator.runs import overview

    place = storage_place(storage)
    one = overview.find_run(target, place)
    if as_json:
        record = overview.pipeline_as_json(one, place) if one.stages else overview.as_json(one)
        typer.echo(json.dumps(record, indent=1))
        return
    make_console().print(overview.runs_table(overview.members(one, place) if one.stages else [one]))
    if one.stages:
        typer.echo(f"{one.run.path.name}: {one.state}")
    for field in ("error", "reason", "checkpoint", "digest", "overrides", "code"):
        if one.record.get(field):
            typer.echo(f"{field}: {_text(one.record[field])}")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items() if item is not None)
    return str(value)


@commands.command()
def wait(
    target: Target,
    timeout: Annotated[float | None, typer.Option(help="Seconds; default: without end.")] = None,
    storage: Storage = None,
) -> None:
    """Wait until a run ended; exit status 0 only when it finished, 75 when it was stopped."""
    from orchestrator.errors import JobStopped
    from orchestrator.runs import overview

    one = overview.wait(target, storage_place(storage), timeout, typer.echo)
    why = one.record.get("error") or one.record.get("reason")
    why = why or (one.progress if one.stages else one.score)
    typer.echo(f"{one.run.path.name}: {one.state}: {why}")
    raise typer.Exit({"finished": 0, "stopped": JobStopped.exit_code}.get(one.state, 1))


@commands.command()
def stop(target: Target, storage: Storage = None) -> None:
    """Ask a running run to write a checkpoint and to stop; the same job goes on from there."""
    from orchestrator.runs import overview
    from orchestrator.runs.stop import ask_to_stop

    one = overview.find_run(target, storage_place(storage))
    if one.state != "running":
        typer.echo(f"{one.run.path.name}: is {one.state}, there is nothing to stop")
        raise typer.Exit(1)
    ask_to_stop(one.run, "atrous stop")
    typer.echo(f"{one.run.path.name}: stops at its next step; atrous wait {target}")


@commands.command()
def gc(
    older_than: Annotated[
        float, typer.Option(min=0, help="Days an unfinished run was not touched.")
    ] = 30,
    delete: Annotated[bool, typer.Option("--delete", help="Delete; default: only tell.")] = False,
    storage: Storage = None,
) -> None:
    """Find runs and checkpoints that nobody needs any more."""
    from orchestrator.runs import garbage

    found = garbage.find_garbage(storage_place(storage), older_than)
    for one in found:
        typer.echo(f"{one.path}: {one.bytes / 2**20:.1f} MiB: {one.why}")
        if delete:
            garbage.delete(one)
    total = sum(one.bytes for one in found) / 2**20
    done = "deleted" if delete else "to delete (atrous gc --delete)"
    typer.echo(f"{len(found)} {done}, {total:.1f} MiB")


@commands.command()
def compare(
    targets: Annotated[list[str], typer.Argument(help="Runs, each as in `atrous status`.")],
    out: Annotated[Path | None, typer.Option(help="Draw their curves to this .png.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="To draw (repeatable); default: loss and headline.")
    ] = None,
    storage: Storage = None,
) -> None:
    """Show in which parameters runs differ, and their metrics."""
    from orchestrator.runs import overview

    found = [overview.find_run(target, storage_place(storage)) for target in targets]
    make_console().print(overview.compare(found))
    if out is not None:
        overview.draw(found, metric or ["train/loss", found[0].headline], out)
        typer.echo(f"drawn: {out}")
