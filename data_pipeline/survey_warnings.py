"""What in a survey ruins training runs, and the cure."""

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from data_pipeline.mask_checks import has_background
from data_pipeline.survey import SplitSurvey, shared_images

_SMALL_SIDE = 8  # pixels
_LISTED = 5
_PIXEL_IMBALANCE, _IMAGE_IMBALANCE = 1000, 100  # most common class : rarest


def find_warnings(splits: Sequence[SplitSurvey]) -> list[str]:
    """One line for each thing to look after, the splits' own first."""
    lines = [f"{split.name}: {line}" for split in splits for line in _of_split(split)]
    return [*lines, *_of_classes(splits), *_of_duplicates(splits)]


def looks_inverted(split: SplitSurvey) -> bool:
    """Whether background and objects seem to be exchanged in the masks.

    Photographs have their objects inside and background around them. So where class 0 is the
    background (by its name, or as one of two classes) it covers a greater share of the frame, the
    outermost pixels, than of the whole. Taken for inverted: it has less than half of all pixels,
    and of the frame less than 0.7 of that share.
    """
    names = split.manifest.class_names
    if not split.has_masks or not (has_background(names) or len(names) == 2):
        return False
    inside, frame = split.share(split.pixels)[0], split.share(split.frame)[0]
    return bool(split.pixels[: len(names)].any() and inside < 0.5 and frame < 0.7 * inside)


def _of_split(split: SplitSurvey) -> Iterator[str]:
    seen = max(1, len(split.sizes))
    if split.errors:
        first = next(iter(split.errors.values()))
        yield f"{_count(split.errors, 'broken samples')}; mend or leave them out. First: {first}"
    yield from _of_labels(split, seen)
    if split.has_masks:
        yield from _of_masks(split, seen)
    small = sum(min(size) < _SMALL_SIDE for size in split.sizes)
    if small:
        yield f"{small} images have a side under {_SMALL_SIDE} pixels; leave them out"
    if split.grey > seen / 2:
        yield (
            f"{split.grey} of {seen} images are grey; published weights expect colour: "
            "train longer, or from images alike"
        )


def _of_labels(split: SplitSurvey, seen: int) -> Iterator[str]:
    if not split.manifest.has_labels:
        yield "has no labels; it can only be predicted, not trained or evaluated on"
    elif split.unlabelled:
        yield (
            f"{_count(split.unlabelled, 'samples without a label')}; they teach that no class is "
            "there: label them or leave them out"
        )
    if split.unknown:
        ids = ", ".join(f"{label} ({n} images)" for label, n in split.unknown.most_common(_LISTED))
        yield (
            f"{len(split.unknown)} label ids outside the {split.num_classes} classes: {ids}; "
            "correct the class list or the labels"
        )
    counts = split.pixels if split.has_masks else split.images
    names = split.manifest.class_names
    present = [(int(n), name) for n, name in zip(counts, names, strict=False) if n]
    limit = _PIXEL_IMBALANCE if split.has_masks else _IMAGE_IMBALANCE
    if present and max(present)[0] > limit * min(present)[0]:
        (most, common), (least, rare) = max(present), min(present)
        unit = "pixels" if split.has_masks else "images"
        yield (
            f"{common!r} has {most / least:,.0f} times the {unit} of {rare!r}; "
            "weight the classes in the loss, or add samples of the rare ones"
        )


def _of_masks(split: SplitSurvey, seen: int) -> Iterator[str]:
    if split.all_ignored:
        yield (
            f"{_count(split.all_ignored, 'masks with ignored pixels only')}; "
            "they teach nothing: leave them out or correct the ignore label"
        )
    if split.ignored_share > 0.5:
        yield (
            f"{split.ignored_share:.0%} of all pixels are ignored; check the ignore label "
            f"{split.manifest.ignore_label} and the map of ids to classes"
        )
    if split.interpolated:
        yield (
            f"{_count(split.interpolated, 'masks that look interpolated, or stored with loss')}: "
            "along edges they have ids from between those of both sides; resize masks to the "
            "nearest pixel and store them as PNG"
        )
    if looks_inverted(split):
        yield (
            f"masks look inverted: {split.manifest.class_names[0]!r} covers "
            f"{split.share(split.pixels)[0]:.0%} of the pixels, but only "
            f"{split.share(split.frame)[0]:.0%} of the outermost ones; exchange the ids"
        )


def _of_classes(splits: Sequence[SplitSurvey]) -> Iterator[str]:
    """Classes that are nowhere, and those to be evaluated that nothing can be learned about."""
    labelled = [split for split in splits if split.manifest.has_labels and split.looked_at]
    for split in labelled:
        names = split.manifest.class_names
        absent = [name for name, n in zip(names, split.images, strict=False) if not n]
        if absent:
            note = " (not all samples were looked at)" if _is_sample(split) else ""
            yield (
                f"{split.name}: {_count(absent, 'classes never present')}{note}; "
                "add samples, or take them out of the class list"
            )
    training = [split for split in labelled if split.name.startswith("train")]
    for split in [split for split in labelled if training and split not in training]:
        names = split.manifest.class_names
        alike = [one.images for one in training if one.manifest.class_names == names]
        if not alike:
            continue
        only = [
            name
            for name, here, there in zip(names, split.images, np.sum(alike, axis=0), strict=False)
            if here and not there
        ]
        if only:
            yield (
                f"{split.name}: {_count(only, 'classes that no training split has')}; "
                "they cannot be learned: split anew"
            )


def _of_duplicates(splits: Sequence[SplitSurvey]) -> Iterator[str]:
    for split in splits:
        if split.duplicates:
            pairs = [f"{a} = {b}" for a, b in split.duplicates]
            yield f"{split.name}: {_count(pairs, 'images twice')}; leave one of each out"
    for one, other in combinations(splits, 2):
        training = one.name.startswith("train"), other.name.startswith("train")
        shared = shared_images(one, other)
        if shared and training != (True, True):
            pairs = [key if key == copy else f"{key} = {copy}" for key, copy in shared]
            yield (
                f"{_count(pairs, f'images both in {one.name} and in {other.name}')}; do not "
                "train on one and evaluate on the other, or results will look too good"
            )


def _is_sample(split: SplitSurvey) -> bool:
    return split.looked_at < split.manifest.num_samples


def _count(things: Sequence[str] | dict[str, str], what: str) -> str:
    """'broken samples: 3 (a, b, c)'."""
    names = list(things)
    more = ", ..." if len(names) > _LISTED else ""
    return f"{what}: {len(names)} ({', '.join(names[:_LISTED])}{more})"
