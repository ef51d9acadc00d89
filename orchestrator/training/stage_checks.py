"""What a stage is refused for, or warned of, before anything of it runs."""

import difflib
import math
from operator import itemgetter
from typing import TYPE_CHECKING

from data_pipeline.config import as_size
from data_pipeline.dataset import Dataset
from orchestrator.errors import RunError
from orchestrator.job.config import StageSettings
from orchestrator.training.optimizer import base_rate
from orchestrator.training.passes import fewest_images

if TYPE_CHECKING:
    from model.build import Network

# DeepLab's train.py: "use at least batch size larger than 12 (batch size more than 16 is better)".
_SMALL_BATCH = 12
_SETTLED = 3  # times 1 / momentum: then 95 % of the running statistics are of the data
_MOMENTUM = 3e-4  # of the backbones that are the reference's, but for its ResNets


def check_data(stage: StageSettings, train: Dataset, val: Dataset) -> None:
    """Refuse what cannot work with this data.

    Raises:
        RunError: says what and the cure.
    """
    for split in (train, val):
        manifest = split.manifest
        if manifest.task != stage.task:
            raise RunError(
                f"{stage.name}: task: {stage.task!r}, but {manifest.dataset}/{manifest.split} "
                f"is a data set of {manifest.task}"
            )
        if not manifest.has_labels:
            raise RunError(
                f"{stage.name}: data: {manifest.dataset}/{manifest.split} has no labels to train "
                "on or to compare with; name another split"
            )
    if train.num_samples < stage.global_batch:
        raise RunError(
            f"{stage.name}: {train.num_samples} samples do not fill a global batch of "
            f"{stage.global_batch}; lower global_batch or add samples"
        )
    if train.manifest.class_names != val.manifest.class_names:
        raise RunError(
            f"{stage.name}: data: train has {len(train.manifest.class_names)} classes, val has "
            f"{len(val.manifest.class_names)}, or their names differ; prepare both from one source"
        )
    _check_class_weights(stage, train)
    if stage.task == "segmentation":
        _check_crop(stage, val)


def _check_class_weights(stage: StageSettings, train: Dataset) -> None:
    names = train.manifest.class_names
    for name in stage.loss.class_weights:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            cure = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names[:30])}"
            raise RunError(
                f"{stage.name}: loss.class_weights: {train.manifest.dataset} has no class "
                f"{name!r}; {cure}"
            )


def _check_crop(stage: StageSettings, val: Dataset) -> None:
    """Evaluation pads images and never cuts them."""
    crop = stage.data.val.crop
    if crop is None:
        return
    height, width = as_size(crop)
    largest = val.largest_size()
    if height < largest[0] or width < largest[1]:
        raise RunError(
            f"{stage.name}: data.val.crop: {[height, width]} is smaller than the largest image "
            f"{list(largest)} (height, width); images are never cut: raise it to that"
        )


def fewest_at_once(stage: StageSettings) -> tuple[int, int]:
    """Fewest images that batch normalisation sees at once, and the number of workers then."""
    cluster = stage.cluster
    worlds = range(max(1, cluster.min_workers), max(1, cluster.max_workers) + 1)
    return min(((fewest_images(stage, world), world) for world in worlds), key=itemgetter(0))


def check_batch_norm(stage: StageSettings, network: "Network") -> None:
    """Refuse batch normalisation of one value per channel, which has no variance.

    `network` is on the meta device: it takes part in shape alone.

    Raises:
        RunError: says the numbers and the cure.
    """
    import torch

    together, workers = fewest_at_once(stage)
    if stage.model.batch_norm.frozen or together > 1:
        return
    height, width = as_size(stage.data.train.crop)
    try:
        with torch.no_grad():
            network.train()(
                torch.empty(together, 3, height, width, dtype=torch.uint8, device="meta")
            )
    except ValueError as error:
        raise RunError(
            f"{stage.name}: global_batch: {stage.global_batch} over {workers} workers, "
            f"micro_batch: {stage.micro_batch or 'null'}, leaves one image at a time to a worker, "
            f"and batch normalisation of {height}x{width} needs two ({error}); raise global_batch "
            "or micro_batch, lower cluster.workers, or set model.batch_norm.frozen, or "
            "model.batch_norm.sync where there are more workers"
        ) from None


def stage_warnings(stage: StageSettings) -> list[str]:
    """What works and yet makes results worse, or other than one may think."""
    found = (_small_batches(stage), _scaled_rate(stage), _statistics(stage), _evaluation(stage))
    return [warning for warning in found if warning]


def _small_batches(stage: StageSettings) -> str | None:
    """Batch normalisation trained on few samples."""
    together, workers = fewest_at_once(stage)
    frozen = stage.model.batch_norm.frozen
    if stage.task != "segmentation" or frozen or together > _SMALL_BATCH:
        return None
    where = f"global_batch: {stage.global_batch}, workers: {workers}"
    cures = ["raise global_batch", "freeze statistics that are trained (model.batch_norm.frozen)"]
    if isinstance(stage.micro_batch, int):
        where += f", micro_batch: {stage.micro_batch}"
        cures.insert(0, "raise micro_batch")
    if workers > 1 and not stage.model.batch_norm.sync:
        cures.insert(0, "set model.batch_norm.sync: true")
    return (
        f"batch normalisation sees {together} images at a time ({where}), and DeepLab's authors "
        "ask for more than 12. Others got a mIoU of 63.4 instead of 75.9 with 4 "
        "(mmsegmentation#3023) and 74.9 instead of 78.9 with 2 (tensorflow/models#5116). Cures: "
        f"{', or '.join(cures)}"
    )


def _scaled_rate(stage: StageSettings) -> str | None:
    optimizer = stage.optimizer
    if optimizer.lr_for_batch in (None, stage.global_batch):
        return None
    rate = base_rate(optimizer, stage.global_batch)
    growing = rate > optimizer.lr and stage.schedule.warmup is None
    warmup = (
        "; a larger rate needs schedule.warmup (Goyal et al. 2017, 5 epochs)" if growing else ""
    )
    return (
        f"optimizer.lr: {optimizer.lr:g} is for batches of {optimizer.lr_for_batch}; with "
        f"global_batch: {stage.global_batch} the rate is {rate:g}{warmup}"
    )


def _statistics(stage: StageSettings) -> str | None:
    """Running statistics that evaluation uses and training does not, and that stay untrue."""
    norm, start = stage.model.batch_norm, stage.start_from
    if norm.frozen and start is None:
        return (
            "model.batch_norm.frozen: true without start_from: the running statistics stay at "
            "mean 0, variance 1, so nothing is normalised; give start_from, or train them first"
        )
    if norm.frozen or stage.steps is None or (start is not None and start.take != "backbone"):
        return None
    default = _MOMENTUM if stage.model.backbone.startswith("xception") else None
    momentum = norm.momentum or default
    if momentum is None or stage.steps * momentum >= _SETTLED:
        return None
    return (
        f"steps: {stage.steps} at model.batch_norm.momentum: {momentum:g} leave "
        f"{(1 - momentum) ** stage.steps:.0%} of their first values in the running statistics, "
        "and evaluation, which uses them, falls behind training; raise momentum to "
        f"{min(1.0, _round_up(_SETTLED / stage.steps)):g} or train longer"
    )


def _round_up(value: float) -> float:
    """To one digit."""
    scale = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / scale) * scale


def _evaluation(stage: StageSettings) -> str | None:
    """Numbers that say less than they seem to."""
    train, val = stage.data.train, stage.data.val
    if (train.dataset, train.split) == (val.dataset, val.split):
        return (
            f"data.val is data.train ({val.dataset}/{val.split}): the metric is of samples that "
            "were trained on"
        )
    return None
