"""The command line. Nothing heavy is imported before a command runs."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Train DeepLabv3+ as one lineage of stages on Ray.",
)
data = typer.Typer(no_args_is_help=True, help="Make, and prepare, data sets.")
app.add_typer(data, name="data")

Splits = Annotated[
    list[str] | None, typer.Option("--split", help="Only these splits (repeatable).")
]


@app.command()
def run(
    job_file: Path,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate and show, run nothing.")
    ] = False,
) -> None:
    """Run a stage or a pipeline; what was done before is found and not done again."""
    from rich.console import Console

    from orchestrator.job_file import load_job

    job = load_job(job_file, tuple(override or ()))
    console = Console(width=None if sys.stdout.isatty() else 160)
    from orchestrator.report import Display, result_table, show_log, summary

    if dry_run:
        console.print(summary(job))
        return
    from orchestrator.pipeline import run_job

    show_log(console)
    with Display(console) as display:
        results = run_job(job, display)
    for part in result_table(results, Path(job.storage)):
        console.print(part, soft_wrap=isinstance(part, str), markup=False, highlight=False)


@data.command()
def synthesize(
    destination: Path,
    seed: int = 0,
    layout: Annotated[
        list[str] | None,
        typer.Option(help="imagenet, multilabel, coco, voc, cityscapes; default all."),
    ] = None,
) -> None:
    """Draw textured objects on cluttered backgrounds in the original layouts of the data sets."""
    from data_pipeline.formats.synthetic import synthesize as draw

    for name, folder in draw(destination, seed=seed, layouts=layout).items():
        typer.echo(f"{name}: {folder}")


@data.command()
def prepare(
    layout: Annotated[str, typer.Argument(help="imagenet, multilabel, coco, voc or cityscapes.")],
    source: Path,
    destination: Path,
    split: Splits = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave broken inputs out and count them.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="At most so many samples of a split.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one per core.")] = None,
) -> None:
    """Write WebDataset shards and their manifest from a data set in its original layout."""
    from rich.console import Console

    from data_pipeline.prepare import Settings
    from data_pipeline.prepare import prepare as write
    from orchestrator.report import Display

    console = Console()
    with Display(console) as display:
        with display.preparing(destination.name) as progress:
            manifests = write(
                layout,
                source,
                destination,
                Settings(limit=limit, on_broken="skip" if skip_broken else "fail"),
                splits=tuple(split) if split else None,
                workers=workers,
                progress=progress,
            )
        display.prepared(manifests.values())
        for name, manifest in manifests.items():
            display.say(f"{name}: {manifest.num_samples} samples, manifest {manifest.digest}")


@app.command()
def lineage(
    target: Annotated[
        str, typer.Argument(help="A stage, run directory, MLflow run id or checkpoint.")
    ],
    storage: Annotated[
        Path | None, typer.Option(help="Default: $ATROUS_STORAGE, else ~/atrous.")
    ] = None,
) -> None:
    """Print the chain of a checkpoint back to raw data, with digests and metrics."""
    from orchestrator.lineage import as_lines, find_checkpoint, trace

    place = storage or Path(os.environ.get("ATROUS_STORAGE") or "~/atrous")
    checkpoint = find_checkpoint(target, place.expanduser().absolute())
    typer.echo("\n".join(as_lines(trace(checkpoint))))


def main() -> None:
    """`atrous COMMAND`; an executable job file calls `python -m orchestrator JOB.yaml`."""
    arguments = sys.argv[1:]
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments.insert(0, "run")
    from data_pipeline.errors import DataError
    from orchestrator.errors import AtrousError, JobFileError

    try:
        app(arguments, prog_name="atrous")
    except (AtrousError, DataError) as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        sys.exit(2 if isinstance(error, JobFileError) else 1)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from the last checkpoint", err=True)
        sys.exit(130)
