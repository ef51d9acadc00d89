"""Commands that make, prepare and look at data sets."""

import sys
from pathlib import Path, PurePath
from typing import Annotated

import typer

data = typer.Typer(no_args_is_help=True, help="Make, and prepare, data sets.")

Splits = Annotated[
    list[str] | None, typer.Option("--split", help="Only these splits (repeatable).")
]


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
    layout: Annotated[
        str, typer.Argument(help="imagenet, multilabel, coco, voc, cityscapes or folder.")
    ],
    source: Annotated[
        str,
        typer.Argument(
            help="Its folder or s3://bucket/prefix, unpacked or with the archives as published."
        ),
    ],
    destination: Annotated[str, typer.Argument(help="A directory, or s3://bucket/prefix.")],
    split: Splits = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave broken inputs out and count them.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="At most so many samples of a split.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Shards written at the same time; default: one per core."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Write them on this Ray cluster; default: $RAY_ADDRESS, else here."),
    ] = None,
) -> None:
    """Write WebDataset shards and their manifest from a data set in its original layout."""
    from rich.console import Console

    from data_pipeline.prepare import Settings
    from data_pipeline.prepare import prepare as write
    from orchestrator.launch.ray_tasks import on_cluster
    from orchestrator.launch.report import Display, show_log

    console = Console()
    show_log(console)
    with Display(console) as display:
        with display.preparing(PurePath(destination).name) as progress:
            manifests = write(
                layout,
                source,
                destination,
                Settings(limit=limit, on_broken="skip" if skip_broken else "fail"),
                splits=tuple(split) if split else None,
                workers=on_cluster(address, workers) or workers,
                progress=progress,
            )
        display.prepared(manifests.values())
        for name, manifest in manifests.items():
            display.say(f"{name}: {manifest.num_samples} samples, manifest {manifest.digest}")


@data.command()
def index(
    shards: Annotated[
        list[str],
        typer.Argument(help="WebDataset .tar files, also with {000..012} or *, or their folder."),
    ],
    destination: Annotated[
        str, typer.Argument(help="The data set to be: a directory or s3://bucket/prefix.")
    ],
    task: Annotated[str, typer.Option(help="segmentation, classification or multilabel.")],
    classes: Annotated[
        str, typer.Option(help="File of their names (.txt, .yaml), or how many there are.")
    ],
    split: Annotated[str, typer.Option(help="Of the data set.")] = "train",
    image: Annotated[
        str, typer.Option(help="Extensions, the first that is there counts.")
    ] = "jpg,jpeg,png,webp",
    label: Annotated[
        str | None,
        typer.Option(
            help="The same, or json:field; default: cls; json,cls; seg.png,mask.png,png by task."
        ),
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave broken samples out and count them.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="Shards read at the same time.")] = 16,
) -> None:
    """Index WebDataset shards that others wrote, which are then trained on where they are."""
    from pydantic import ValidationError
    from rich.console import Console

    from data_pipeline.config import ShardContents
    from data_pipeline.shard_index import index_shards
    from orchestrator.launch.report import Display, show_log

    count = int(classes) if classes.isdigit() else classes
    try:
        contents = ShardContents.model_validate(
            {"task": task, "image": image, "label": label, "classes": count}
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise typer.BadParameter(f"--{first['loc'][0]}: {first['msg']}") from None
    console = Console()
    show_log(console)
    with Display(console) as display:
        with display.preparing(PurePath(destination).name) as progress:
            manifest = index_shards(
                shards,
                destination,
                split,
                contents,
                on_broken="skip" if skip_broken else "fail",
                threads=threads,
                progress=progress,
            )
        display.prepared([manifest])
        display.say(f"{split}: {manifest.num_samples} samples, manifest {manifest.digest}")


@data.command()
def inspect(
    place: Annotated[str, typer.Argument(help="A prepared data set or split, local or s3://.")],
    out: Annotated[
        Path | None, typer.Option(help="Write contact sheets and index.html to this directory.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many samples of a split, drawn.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count classes, sizes, ids and duplicates, and warn about what ruins training."""
    import json

    from rich.console import Console

    from orchestrator.cli.inspection import inspect as look
    from orchestrator.cli.inspection import show

    console = Console(width=None if sys.stdout.isatty() else 160, stderr=as_json)
    found = look(place, out, limit, console)
    if as_json:
        splits = [split.as_dict() for split in found.splits]
        typer.echo(json.dumps({"splits": splits, "warnings": found.warnings}))
    else:
        show(found, console)


@data.command()
def verify(
    place: Annotated[str, typer.Argument(help="A prepared data set or split, local or s3://.")],
    threads: Annotated[int, typer.Option(min=1, help="Shards read at the same time.")] = 4,
) -> None:
    """Compare every shard and sample with the manifest's digests; exit status 1 for a damage."""
    from rich.console import Console

    from orchestrator.cli.inspection import describe_damage, verify_all

    results = verify_all(place, threads, Console(stderr=True))
    for line in describe_damage(results):
        typer.echo(line)
    for split, reports in results.items():
        damaged = sum(not report.intact for report in reports)
        samples = sum(report.num_samples for report in reports)
        verdict = f"{damaged} damaged" if damaged else "all intact"
        typer.echo(f"{split}: {len(reports)} shards, {samples} samples: {verdict}")
    if not all(report.intact for reports in results.values() for report in reports):
        typer.echo("copy the damaged shards again, or prepare the data set again", err=True)
        raise typer.Exit(1)
