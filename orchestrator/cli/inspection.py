"""`atrous data inspect` and `atrous data verify`: what they print and write."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_pipeline.prepared import open_splits
from data_pipeline.survey import SplitSurvey, choose, survey
from data_pipeline.survey_page import Tile, contact_sheet, make_tile, summary, write_page
from data_pipeline.survey_warnings import find_warnings
from data_pipeline.verify import ShardReport, verify

_TILES = 24
_CLASSES_SHOWN = 40
_SAMPLES_SHOWN = 10  # damaged ones of a shard


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found at a place, and the files that show it."""

    splits: Sequence[SplitSurvey]
    warnings: Sequence[str]
    files: Sequence[Path]


def inspect(place: str, out: Path | None, limit: int | None, console: Console) -> Inspection:
    """Survey every split at `place`; with `out`, write contact sheets and a page there.

    Raises:
        DataError: no prepared data set there.
    """
    splits, tiles = [], []
    with _progress(console) as progress:
        for dataset in open_splits(place).values():
            indices = choose(dataset.num_samples, limit)
            task = progress.add_task(dataset.manifest.split, total=len(indices))
            splits.append(survey(dataset, indices, advance=partial(progress.advance, task)))
            if out:
                shown = random.Random(0).sample(indices, min(_TILES, len(indices)))
                tiles.append([make_tile(dataset, index) for index in shown])
    warnings = find_warnings(splits)
    files = _write(out, place, splits, tiles, warnings) if out else []
    return Inspection(splits=splits, warnings=warnings, files=files)


def _write(
    out: Path,
    place: str,
    splits: Sequence[SplitSurvey],
    tiles: Sequence[Sequence[Tile]],
    warnings: Sequence[str],
) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for split, shown in zip(splits, tiles, strict=True):
        files.append(out / f"contact-sheet-{split.name}.png")
        files[-1].write_bytes(contact_sheet(shown))
    files.append(out / "index.html")
    write_page(files[-1], place, splits, tiles, warnings)
    return files


def show(inspection: Inspection, console: Console) -> None:
    """Print the tables, the warnings and where the files are."""
    for split in inspection.splits:
        facts = Table(title=split.name, title_justify="left", box=SIMPLE, show_header=False)
        for row in summary(split):
            facts.add_row(*row)
        console.print(facts)
        console.print(_classes(split))
    for line in inspection.warnings:
        console.print(f"warning: {line}", style="yellow", markup=False, soft_wrap=True)
    if not inspection.warnings:
        console.print("no warnings")
    for path in inspection.files:
        console.print(f"written: {path}", markup=False, soft_wrap=True)


def _classes(split: SplitSurvey) -> Table:
    rows = split.classes()
    title = f"the {_CLASSES_SHOWN} most common classes" if len(rows) > _CLASSES_SHOWN else None
    if title:
        rows = sorted(rows, key=lambda row: -row["images"])[:_CLASSES_SHOWN]
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column("id", justify="right")
    table.add_column("class", overflow="fold")
    for name in ("images", "share", *(("pixels", "share", "regions") * split.has_masks)):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [f"{row['images']:,}", f"{row['image_share']:.2%}"]
        if split.has_masks:
            cells += [f"{row['pixels']:,}", f"{row['pixel_share']:.3%}", f"{row['regions']:,}"]
        table.add_row(str(row["id"]), row["name"], *cells)
    return table


def verify_all(place: str, threads: int, console: Console) -> dict[str, list[ShardReport]]:
    """Verify every split at `place`: the reports of all its shards.

    Raises:
        DataError: no prepared data set there, or the store cannot be reached.
    """
    results: dict[str, list[ShardReport]] = {}
    with _progress(console) as progress:
        for name, dataset in open_splits(place).items():
            task = progress.add_task(name, total=len(dataset.manifest.shards))
            results[name] = []
            for report in verify(dataset, threads):
                results[name].append(report)
                progress.advance(task)
    return results


def describe_damage(results: dict[str, list[ShardReport]]) -> list[str]:
    """A line for each damaged shard and sample; of a shard's samples the first ten."""
    lines = []
    for split, reports in results.items():
        for report in reports:
            name = f"{split}/{report.name}"
            lines += [f"{name}: {damage}" for damage in report.damages]
            samples = list(report.samples.items())
            lines += [f"{name}: sample {key}: {what}" for key, what in samples[:_SAMPLES_SHOWN]]
            if len(samples) > _SAMPLES_SHOWN:
                lines.append(f"{name}: {len(samples) - _SAMPLES_SHOWN} more samples are damaged")
    return lines


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
