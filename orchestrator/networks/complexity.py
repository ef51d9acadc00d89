"""`atrous complexity`: parameters and Multiply-Adds, of a job file or of the paper's tables."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from data_pipeline.config import as_size
from data_pipeline.errors import DataError
from orchestrator.errors import RunError
from orchestrator.job.config import Job, PipelineJob, StageSettings

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]


def job_rows(job: Job, num_classes: int | None) -> list[Row]:
    """One row for a training crop and one for an evaluated image of each stage, in billions.

    num_classes None takes those of the prepared data set, where there is none 21 (segmentation)
    or 1000.

    Raises:
        RunError: a network that cannot be built.
    """
    stages = job.stages if isinstance(job, PipelineJob) else (job.settings,)
    rows: list[Row] = []
    for stage in stages:
        classes = num_classes or _num_classes(stage, job)
        try:
            rows += _stage_rows(stage, classes)
        except ValueError as error:
            raise RunError(f"{stage.name}: model: {error}") from None
    return rows


def _stage_rows(stage: StageSettings, num_classes: int) -> Iterator[Row]:
    from model.complexity import complexity

    crop, evaluate = stage.data.train.crop, stage.evaluate
    stride = stage.model.output_stride or (16 if stage.task == "segmentation" else 32)
    for use, size, output_stride, scales, flip in (
        ("train", crop, stride, (1.0,), False),
        (
            "evaluate",
            stage.data.val.crop or crop,
            evaluate.output_stride or stride,
            evaluate.scales,
            evaluate.flip,
        ),
    ):
        config = stage.model.model_copy(update={"output_stride": output_stride})
        found = complexity(config, stage.task, num_classes, as_size(size), scales=scales, flip=flip)
        yield {
            "stage": stage.name,
            "use": use,
            "backbone": config.backbone,
            "output_stride": output_stride,
            "size": list(as_size(size)),
            "classes": num_classes,
            "passes": len(scales) * (2 if flip else 1),
            "parameters": found.parameters,
            "true": round(found.multiply_adds / 1e9, 6),
            "paper_convention": round(found.paper_multiply_adds / 1e9, 6),
        }


def _num_classes(stage: StageSettings, job: Job) -> int:
    from data_pipeline.dataset import open_dataset

    data = stage.data.train
    try:
        return len(open_dataset(job.data_directory, data.dataset, data.split).manifest.class_names)
    except DataError:
        return 21 if stage.task == "segmentation" else 1000


def table_rows() -> list[Row]:
    """The models of the paper's Tables 3 and 5, in billions of Multiply-Adds."""
    from model.complexity import paper_rows

    rows = []
    for row in paper_rows():
        found = row.measure()
        rows.append(
            {
                "table": row.table,
                "row": row.row,
                "model": row.name,
                "paper": row.paper,
                "ours": round(found.paper_multiply_adds / 1e9, 2),
                "true": round(found.multiply_adds / 1e9, 2),
            }
        )
    return rows


def as_table(rows: list[Row]) -> "Table":
    """Rows as a table for the terminal."""
    from rich.table import Table

    table = Table(*(name.replace("_", " ") for name in rows[0]))
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    return table


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " x ".join(str(side) for side in value)
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
