"""Commands about sweeps."""

import json
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.runs import AsJson, Storage, make_console, storage_place

sweep = typer.Typer(no_args_is_help=True, help="Look at sweeps and take trials out of them.")

Target = Annotated[str, typer.Argument(help="A sweep (its newest), its directory, or its name.")]


@sweep.command()
def show(target: Target, storage: Storage = None, as_json: AsJson = False) -> None:
    """List the trials of a sweep, the best first, from its directory alone."""
    from orchestrator.sweep import report

    found = report.find_sweep(target, storage_place(storage))
    job = report.job_of(found)
    if as_json:
        typer.echo(json.dumps(report.as_json(found, job), indent=1))
        return
    for part in report.final_table(found, job):
        make_console().print(part, soft_wrap=isinstance(part, str), markup=False, highlight=False)


@sweep.command()
def best(
    target: Target,
    out: Annotated[Path, typer.Option(help="Job file to write.")],
    trial: Annotated[int | None, typer.Option(help="Its number; default: the best.")] = None,
    storage: Storage = None,
) -> None:
    """Write the job file of a trial, ready to run."""
    from orchestrator.errors import RunError
    from orchestrator.sweep import report
    from orchestrator.sweep.decisions import read
    from orchestrator.sweep.results import fold, winner

    found = report.find_sweep(target, storage_place(storage))
    job, trials = report.job_of(found), fold(read(found.path))
    if trial is None:
        chosen = winner(trials, job.objectives)
    else:
        chosen = next((one for one in trials if one.number == trial), None)
    if chosen is None:
        what = "no trial has finished" if trial is None else f"there is no trial {trial}"
        raise RunError(f"{found.path.name}: {what}; atrous sweep show {target} lists them")
    report.write_best(out, job, chosen, trials)
    typer.echo(f"written: {out} (trial {chosen.number})")
