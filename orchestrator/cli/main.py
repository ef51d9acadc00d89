"""The command line. Nothing heavy is imported before a command runs."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.data import data
from orchestrator.cli.runs import commands
from orchestrator.cli.sweeps import sweep

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from orchestrator.job.config import Job
    from orchestrator.runs.stop import Signals

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Train DeepLabv3+ as one lineage of stages on Ray.",
)
app.add_typer(data, name="data")
app.add_typer(sweep, name="sweep")
app.add_typer(commands)


@app.command()
def run(
    job_file: Path,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate and show, run nothing.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Of a pipeline, this stage (repeatable).")
    ] = None,
    start_at: Annotated[
        str | None, typer.Option("--from", help="This stage, and all that start from it.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run again what is done; the earlier run is kept.")
    ] = False,
    attach: Annotated[
        bool, typer.Option("--attach", help="Where another command runs it, wait for its result.")
    ] = False,
) -> None:
    """Run a stage, pipeline or sweep; what was done before is found and not done again."""
    from rich.console import Console

    from orchestrator.job.job_file import load_job
    from orchestrator.launch.selection import select

    job = select(load_job(job_file, tuple(override or ())), only or (), start_at)
    console = Console(width=None if sys.stdout.isatty() else 160)
    from orchestrator.launch.report import job_warnings, show_log, summary

    if dry_run:
        console.print(summary(job))
        for line in job_warnings(job):
            console.print(line, style="yellow", soft_wrap=True, markup=False, highlight=False)
        return
    from orchestrator.errors import JobStopped
    from orchestrator.launch.plan_view import finding_lines
    from orchestrator.launch.preflight import preflight
    from orchestrator.runs.stop import Interrupted, Signals

    report = preflight(job)
    told_later = {line.partition(": warning: ")[2] for line in job_warnings(job)}
    for line, style in finding_lines(one for one in report.findings if one.text not in told_later):
        console.print(line, style=style, soft_wrap=True, markup=False, highlight=False)
    if report.errors:
        raise typer.Exit(1)
    show_log(console)
    signals = Signals()
    signals.listen()
    try:
        options = {"force": force, "overrides": tuple(override or ())}
        parts = _carry_out(job, console, signals, attach=attach, **options)
    except JobStopped as stop:
        cure = "the same command goes on from there, after a limit with a larger one"
        typer.echo(f"{stop}\n{cure}", err=True)
        raise typer.Exit(stop.exit_code) from None
    except Interrupted as signal:
        typer.echo(f"{signal}: the same command goes on from the last checkpoint", err=True)
        raise typer.Exit(128 + signal.number) from None
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str), markup=False, highlight=False)


def _carry_out(
    job: "Job", console: "Console", signals: "Signals", *, attach: bool, **options: Any
) -> "list[Table | str]":
    """Run a job of any kind; the table at its end."""
    from orchestrator.job.sweep import SweepJob

    if isinstance(job, SweepJob):
        from orchestrator.sweep.report import final_table
        from orchestrator.sweep.sweep import run_sweep

        if attach:
            raise typer.BadParameter("--attach: not for sweeps; atrous wait waits for a trial")
        sweep = run_sweep(job, console, signals, **options)
        return final_table(sweep, job)
    from orchestrator.bucket import storage_path
    from orchestrator.launch.pipeline import run_job
    from orchestrator.launch.report import Display, result_table

    with Display(console) as display:
        results = run_job(job, display, signals, attach=attach, **options)
    return result_table(results, storage_path(job.storage))


@app.command()
def complexity(
    job_file: Annotated[Path | None, typer.Argument(help="A stage or pipeline.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field.")
    ] = None,
    tables: Annotated[
        bool, typer.Option("--tables", help="The paper's Tables 3 and 5 instead of a job file.")
    ] = False,
    classes: Annotated[
        int | None, typer.Option(help="Default: the prepared data set's, else 21 or 1000.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print parameters and Multiply-Adds (in billions), true and as the paper counted them."""
    import json

    from rich.console import Console

    from orchestrator.job.job_file import load_job
    from orchestrator.networks.complexity import as_table, job_rows, table_rows

    if tables == (job_file is not None):
        raise typer.BadParameter("give a job file, or --tables")
    rows = (
        job_rows(load_job(job_file, tuple(override or ())), classes) if job_file else table_rows()
    )
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(as_table(rows))


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="tf:PATH, a checkpoint's prefix or an .npz.")],
    out: Annotated[Path, typer.Argument(help="Directory of the checkpoint to write.")],
    job: Annotated[Path, typer.Option(help="Job file that describes the network.")],
    stage: Annotated[str | None, typer.Option(help="Which, where it is a pipeline.")] = None,
    moving_averages: Annotated[
        bool, typer.Option("--moving-averages", help="Take averages of variables where saved.")
    ] = False,
) -> None:
    """Turn a TensorFlow DeepLab checkpoint into one to start from, evaluate, predict and export."""
    from orchestrator.job.job_file import load_job
    from orchestrator.networks.importing import import_checkpoint

    checkpoint, report = import_checkpoint(
        source, load_job(job), out, stage=stage, moving_averages=moving_averages
    )
    typer.echo(f"{report}\nwritten: {checkpoint.path} (sha256 {checkpoint.digest})")


@app.command()
def export(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint, run directory, models:/NAME@best.")
    ],
    out: Annotated[Path, typer.Argument(help="NAME.onnx or NAME.pt2 (torch.export).")],
    output_stride: Annotated[
        int | None, typer.Option(help="8, 16 or 32; default: the one it was trained with.")
    ] = None,
) -> None:
    """Write a network for other runtimes, any batch and image size, and compare it with itself."""
    from orchestrator.networks.export import export as write

    differences = write(checkpoint, out, output_stride=output_stride)
    for (batch, height, width), difference in differences.items():
        typer.echo(f"{batch}x3x{height}x{width}: largest relative difference {difference:.1e}")
    typer.echo(f"written: {out}")


@app.command()
def predict(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint, run directory, models:/NAME@best.")
    ],
    images: Annotated[
        list[str], typer.Argument(help="Files, directories, patterns, s3://bucket/prefix.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write to.")],
    scales: Annotated[
        str, typer.Option(help="Average over these, e.g. 0.5,0.75,1,1.25,1.5,1.75.")
    ] = "1",
    flip: Annotated[bool, typer.Option("--flip", help="Average over mirror images too.")] = False,
    output_stride: Annotated[
        int | None, typer.Option(help="8, 16 or 32; default: the checkpoint's.")
    ] = None,
    tile: Annotated[
        int, typer.Option(help="Images with a longer side are cut into tiles of it: 128k+1.")
    ] = 2049,
    overlap: Annotated[int, typer.Option(help="Pixels that tiles share: 256k.")] = 1024,
    overlay: Annotated[bool, typer.Option(help="Write the image in the classes' colours.")] = True,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write (K, H, W) float16 as .npy.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; default: cuda where there is one.")
    ] = None,
    fold: Annotated[
        bool, typer.Option(help="Fold batch normalisation into convolutions, which is faster.")
    ] = True,
) -> None:
    """Segment images: class ids as palette PNGs, coloured overlays and, if asked, probabilities."""
    from model.inference import Inference
    from orchestrator.networks.predict import Settings
    from orchestrator.networks.predict import predict as write

    try:
        numbers = tuple(float(scale) for scale in scales.split(","))
        inference = Inference(scales=numbers, flip=flip, tile=tile, overlap=overlap)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    settings = Settings(
        inference=inference,
        out=out,
        overlay=overlay,
        probabilities=probabilities,
        output_stride=output_stride,
        device=device,
        fold=fold,
    )
    num_written, failures = write(checkpoint, images, settings)
    typer.echo(f"{num_written} images predicted, written to {out}")
    if failures:
        typer.secho(f"{len(failures)} images failed:", err=True, fg=typer.colors.RED)
        typer.echo("\n".join(failures), err=True)
        raise typer.Exit(1)


def main() -> None:
    """`atrous COMMAND`; an executable job file calls `python -m orchestrator JOB.yaml`."""
    arguments = sys.argv[1:]
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments.insert(0, "run")
    from data_pipeline.errors import DataError
    from orchestrator.errors import AtrousError

    try:
        app(arguments, prog_name="atrous")
    except (AtrousError, DataError) as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        sys.exit(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from the last checkpoint", err=True)
        sys.exit(130)
