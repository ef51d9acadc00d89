"""Data sets that a job prepares before its first stage: can it, and how large will they be."""

import difflib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.config import EvalData, TrainData
from data_pipeline.errors import DataError
from data_pipeline.storage import is_local
from orchestrator.errors import RunError
from orchestrator.job.config import Prepared, StageSettings

_TASKS = {"imagenet": "classification", "multilabel": "multilabel"}  # others: segmentation


# A source that is listed to know its size, archives included.
_FEW_FILES, _FEW_BYTES = 20_000, 4 * 2**30


class Size(NamedTuple):
    """Of a split."""

    samples: int
    classes: int

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of VOC, which COCO is prepared with too; of others there is but the number."""
        from data_pipeline.formats.sample import VOC_CLASSES

        numbered = tuple(f"class {number} of {self.classes}" for number in range(self.classes))
        return VOC_CLASSES if self.classes == len(VOC_CLASSES) else numbered


# COCO's is before images without a large object of VOC's classes are left out.
_PUBLISHED = {
    ("imagenet", "train"): Size(1_281_167, 1000),
    ("imagenet", "val"): Size(50_000, 1000),
    ("coco", "train"): Size(118_287, 21),
    ("coco", "val"): Size(5_000, 21),
    ("voc", "train"): Size(1_464, 21),
    ("voc", "val"): Size(1_449, 21),
    ("voc", "trainaug"): Size(10_582, 21),
    ("voc", "trainval"): Size(2_913, 21),
    ("cityscapes", "train"): Size(2_975, 19),
    ("cityscapes", "val"): Size(500, 19),
    ("cityscapes", "trainval"): Size(3_475, 19),
    ("cityscapes", "train_coarse"): Size(22_973, 19),
    ("cityscapes", "train_extra"): Size(19_998, 19),
    ("cityscapes", "trainval_coarse"): Size(23_473, 19),
}
# Splits that consist of others, in drawn data sets.
_PARTS = {
    "voc/trainaug": ("voc/train", "voc/extra"),
    "voc/trainval": ("voc/train", "voc/val"),
    "cityscapes/trainval": ("cityscapes/train", "cityscapes/val"),
    "cityscapes/train_coarse": ("cityscapes/train", "cityscapes/train_extra"),
    "cityscapes/trainval_coarse": (
        *("cityscapes/train", "cityscapes/val"),
        "cityscapes/train_extra",
    ),
}


def published_size(dataset: str, split: str) -> Size | None:
    """The size as published of a split of a data set that is called by its layout (voc2012)."""
    layout = next((layout for layout, _ in _PUBLISHED if dataset.startswith(layout)), "")
    return _PUBLISHED.get((layout, split))


def size_to_come(wanted: Prepared, split: str) -> Size | None:
    """The size that a split will have, as drawn, listed or published; None: not known."""
    size = _PUBLISHED.get((wanted.format, split))
    if wanted.synthesize is not None:
        size = _drawn_size(wanted, f"{wanted.format}/{split}")
    elif wanted.shards is None and wanted.source and is_local(wanted.source):
        size = _listed_size(wanted.format, wanted.source, split) or size
    if size is None or wanted.limit is None:
        return size
    return size._replace(samples=min(size.samples, wanted.limit))


@cache
def _listed_size(layout: str, source: str, split: str) -> Size | None:
    """The size as the source says, if it is small; of others a list takes minutes."""
    from data_pipeline.prepare import FORMATS

    files = size = 0
    for directory, _, names in os.walk(source):
        files += len(names)
        size += sum(os.path.getsize(os.path.join(directory, name)) for name in names)
        if files > _FEW_FILES or size > _FEW_BYTES:
            return None
    with suppress(DataError):  # told with what else is wrong with the source
        found = FORMATS[layout].read_split(source, split)
        return Size(len(found.items), len(found.class_names))
    return None


def _drawn_size(wanted: Prepared, split: str) -> Size | None:
    from data_pipeline.formats.scene import KINDS
    from data_pipeline.formats.synthetic import COUNTS

    counts = {**COUNTS, **(wanted.synthesize or {}).get("counts", {})}
    parts = _PARTS.get(split, (split,))
    if any(part not in counts for part in parts):
        return None
    published = _PUBLISHED.get((wanted.format, "train"))
    classes = published.classes if published and wanted.format not in _TASKS else len(KINDS)
    return Size(sum(counts[part] for part in parts), classes)


def source_problems(
    name: str, wanted: Prepared, stages: Sequence[StageSettings], *, prepared: bool
) -> Iterator[str]:
    """What keeps a data set from being prepared, or of use to the stages that name it.

    Raises:
        DataError: the source is not of the layout.
    """
    source = wanted.source or ""
    if wanted.synthesize is not None:
        yield from _drawing_problems(wanted.synthesize)
    elif not prepared and is_local(source) and not Path(source).exists():
        yield f"source: {source} does not exist, and {name} is not prepared yet; correct it"
        return
    there = _splits(wanted, prepared=prepared)
    needs = [(stage.name, split) for stage in stages for split in _used(stage, name)]
    for split in (*(wanted.splits or ()), *(split for _, split in needs)):
        if there is not None and split not in there:
            yield f"splits: {source} has no split {split!r}; {_choose(split, there)}"
    for stage_name, split in needs:
        if wanted.splits and split not in wanted.splits:
            yield f"splits: {stage_name} needs {split!r} too; {_choose(split, wanted.splits)}"


def check_task(wanted: Prepared, stage: StageSettings, dataset: str) -> None:
    """Refuse a data set of another task.

    Raises:
        RunError: says which is which.
    """
    task = _TASKS.get(wanted.format, "segmentation")
    if wanted.shards is not None:
        task = wanted.shards.task
    if task != stage.task:
        raise RunError(
            f"{stage.name}: task: {stage.task!r}, but {dataset} is of format {wanted.format}, "
            f"which is for {task}"
        )


def _used(stage: StageSettings, name: str) -> list[str]:
    parts: tuple[TrainData | EvalData, ...] = (stage.data.train, stage.data.val)
    return [part.split for part in parts if part.dataset == name]


def _choose(wanted: str, there: Sequence[str]) -> str:
    near = difflib.get_close_matches(wanted, there, 1)
    return f"{f'did you mean {near[0]!r}? ' if near else ''}there are {', '.join(there) or 'none'}"


def _splits(wanted: Prepared, *, prepared: bool) -> Sequence[str] | None:
    """The splits that the source has, as its folders tell; None: not looked for."""
    from data_pipeline.prepare import FORMATS

    if prepared:
        return None
    if wanted.shards is not None:
        return tuple(wanted.shards.splits)
    if wanted.source is None or not is_local(wanted.source):
        return None
    return tuple(FORMATS[wanted.format].splits(wanted.source))


def _drawing_problems(options: Mapping[str, Any]) -> Iterator[str]:
    from data_pipeline.formats.synthetic import COUNTS, synthesize

    known = sorted(inspect.signature(synthesize).parameters.keys() - {"destination", "layouts"})
    for option in options:
        if option not in known:
            yield f"synthesize: no option {option!r}; {_choose(option, known)}"
    counts = options.get("counts") or {}
    if not isinstance(counts, dict):
        yield "synthesize: counts should be a section, such as {voc/train: 100}"
        return
    for split in counts:
        if split not in COUNTS:
            yield f"synthesize: counts has no {split!r}; {_choose(str(split), sorted(COUNTS))}"
