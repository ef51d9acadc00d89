"""What a stage is refused for, or warned of, before anything of it runs."""

import difflib
import math
from collections.abc import Iterator
from operator import itemgetter
from typing import TYPE_CHECKING

from data_pipeline.config import as_size
from data_pipeline.dataset import Dataset
from orchestrator.errors import RunError
from orchestrator.job.config import StageSettings
from orchestrator.job.duration import to_steps
from orchestrator.job.sections import Steps
from orchestrator.training.optimizer import base_rate
from orchestrator.training.passes import fewest_images

if TYPE_CHECKING:
    from model.build import Network

# So many images or fewer are few to batch normalisation, and what others lost by it.
# DeepLab's train.py: "use at least batch size larger than 12 (batch size more than 16 is better)".
_FEW = {
    True: (
        12,
        "DeepLabv3's mIoU on VOC was 77.2 with 16, 76.5 with 12, 75.8 with 8 and 64.4 with 4 "
        "(arXiv:1706.05587, appendix A)",
    ),
    False: (
        8,
        "ResNet-50's top-1 error was 23.6 % with 32, 24.8 with 8, 27.3 with 4 and 34.7 with 2 (Wu "
        "and He 2018, arXiv:1803.08494)",
    ),
}
_LARGE_BATCH = 8192
_RATES = {"sgd": (1e-6, 5.0), "adamw": (1e-7, 0.05)}
_STRONG_DECAY = 1e-3  # of the weights, in a step
_MUCH_MOMENTUM = 0.5
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
    check_fills(stage, train.num_samples)
    if train.manifest.class_names != val.manifest.class_names:
        raise RunError(
            f"{stage.name}: data: train has {len(train.manifest.class_names)} classes, val has "
            f"{len(val.manifest.class_names)}, or their names differ; prepare both from one source"
        )
    _check_class_weights(stage, train)
    if stage.task == "segmentation":
        _check_crop(stage, val)


def check_fills(stage: StageSettings, samples: int) -> None:
    """Refuse a training split that is smaller than a batch.

    Raises:
        RunError: says the numbers.
    """
    if samples < stage.global_batch:
        raise RunError(
            f"{stage.name}: {samples} samples do not fill a global batch of "
            f"{stage.global_batch}; lower global_batch or add samples"
        )


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


def check_precision(stage: StageSettings) -> None:
    """Refuse a precision that CPUs do not have.

    Raises:
        RunError: says which they have.
    """
    if stage.precision == "tf32" and not stage.cluster.gpus_per_worker:
        raise RunError(
            f"{stage.name}: precision: tf32 is of GPUs, and cluster.gpus_per_worker is 0; take "
            "float32 or auto"
        )


def stage_warnings(stage: StageSettings) -> list[str]:
    """What works and yet makes results worse, or other than one may think."""
    found = (
        *(_small_batches(stage), _large_batches(stage), _scaled_rate(stage), _odd_rate(stage)),
        *(_strong_decay(stage), _momentum(stage), _statistics(stage), _evaluation(stage)),
        *(_circle(stage), *_crops(stage)),
    )
    return [warning for warning in found if warning]


def _small_batches(stage: StageSettings) -> str | None:
    """Batch normalisation trained on few samples."""
    together, workers = fewest_at_once(stage)
    least, measured = _FEW[stage.task == "segmentation"]
    if stage.model.batch_norm.frozen or together > least:
        return None
    where = f"global_batch: {stage.global_batch}, workers: {workers}"
    cures = ["raise global_batch", "freeze statistics that are trained (model.batch_norm.frozen)"]
    if isinstance(stage.micro_batch, int):
        where += f", micro_batch: {stage.micro_batch}"
        cures.insert(0, "raise micro_batch")
    if workers > 1 and not stage.model.batch_norm.sync:
        cures.insert(0, "set model.batch_norm.sync: true")
    images = f"{together} image{'s' * (together > 1)}"
    return (
        f"batch normalisation sees {images} at a time ({where}), which costs accuracy: {measured}. "
        f"Cures: {', or '.join(cures)}"
    )


def _large_batches(stage: StageSettings) -> str | None:
    if stage.task == "segmentation" or stage.global_batch <= _LARGE_BATCH:
        return None
    return (
        f"global_batch: {stage.global_batch} is more than the linear rule for learning rates "
        "carries: ResNet-50's top-1 error was 23.7 % with 8,192, 24.8 with 16,384 and 27.6 with "
        "32,768 (Goyal et al. 2017, Figure 1); lower global_batch, or take fewer workers"
    )


def _odd_rate(stage: StageSettings) -> str | None:
    """A rate of another size than anybody's, as by a slipped decimal point."""
    rate = base_rate(stage.optimizer, stage.global_batch)
    least, most = _RATES[stage.optimizer.name]
    if least <= rate <= most:
        return None
    return (
        f"optimizer.lr: a rate of {rate:g} is outside of what {stage.optimizer.name} is used with, "
        f"{least:g} to {most:g}: is it a slip? (lr_for_batch multiplies it, too)"
    )


def _strong_decay(stage: StageSettings) -> str | None:
    decay = stage.optimizer.weight_decay
    share = base_rate(stage.optimizer, stage.global_batch) * decay
    if share <= _STRONG_DECAY:
        return None
    usual = "4e-5 for sgd" if stage.optimizer.name == "sgd" else "0.05 for adamw"
    return (
        f"optimizer.weight_decay: {decay:g} takes {share:.1%} of the weights away in each step; "
        f"usual is {usual}"
    )


def _momentum(stage: StageSettings) -> str | None:
    momentum = stage.model.batch_norm.momentum
    if momentum is None or momentum <= _MUCH_MOMENTUM:
        return None
    return (
        f"model.batch_norm.momentum: {momentum:g} is PyTorch's, the share of the newest batch; a "
        f"decay of {momentum:g}, as TensorFlow counts, is {1 - momentum:.2g} here"
    )


def _crops(stage: StageSettings) -> Iterator[str]:
    """Sides at which the corners of features and pixels do not lie on each other."""
    if stage.task != "segmentation":
        return
    stride = stage.model.output_stride or 16
    for name, crop in (("train", stage.data.train.crop), ("val", stage.data.val.crop)):
        sides = as_size(crop) if crop is not None else ()
        if any(side < stride or (side - 1) % stride for side in sides):
            fitting = [max(1, round((side - 1) / stride)) * stride + 1 for side in sides]
            yield (
                f"data.{name}.crop: {crop}: at output stride {stride} features and pixels line up "
                f"for sides of a multiple of {stride} plus 1, such as "
                f"{fitting[0] if fitting[0] == fitting[-1] else fitting}; others cost accuracy"
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


def _circle(stage: StageSettings) -> str | None:
    if stage.start_from and stage.start_from.checkpoint == stage.name:
        return (
            f"start_from: {stage.name} is the name of this stage too: it starts from its newest "
            "finished run, so each command trains another one; name it otherwise"
        )
    return None


def _evaluation(stage: StageSettings) -> str | None:
    """Numbers that say less than they seem to."""
    train, val = stage.data.train, stage.data.val
    if (train.dataset, train.split) == (val.dataset, val.split):
        return (
            f"data.val is data.train ({val.dataset}/{val.split}): the metric is of samples that "
            "were trained on"
        )
    return None


def duration_warnings(stage: StageSettings, steps: int, steps_per_epoch: int) -> Iterator[str]:
    """Times of a stage, written in its job file, that do not fit into its length."""

    def is_longer(value: int | str | None) -> bool:
        return value is not None and to_steps(value, steps_per_epoch) > steps

    block = stage.data.train.block_size
    if block > max(1, steps_per_epoch):
        yield (
            f"data.train.block_size: {block} neighbours come in one batch after the other, of the "
            f"{steps_per_epoch} batches of an epoch: that hardly shuffles; lower it"
        )
    hard = stage.loss.hard_pixels
    for name, given, value, then in (
        (
            "evaluate.every",
            stage.evaluate,
            stage.evaluate.every,
            "it is evaluated once, at the end",
        ),
        ("checkpoint.every", stage.checkpoint, stage.checkpoint.every, "a failure costs all of it"),
        ("schedule.warmup", stage.schedule, stage.schedule.warmup, "the rate never gets to lr"),
        ("loss.hard_pixels.anneal", hard, hard.anneal if hard else None, "fraction is not reached"),
        ("log_every", stage, stage.log_every, "one line is logged, at the end"),
    ):
        if given and name.rpartition(".")[2] in given.model_fields_set and is_longer(value):
            yield f"{name}: {value} is longer than the training of {steps} steps: {then}"
    if isinstance(stage.schedule, Steps):
        late = [value for value in stage.schedule.milestones if is_longer(value)]
        if late:
            yield f"schedule.milestones: {late} lie after the end of the training ({steps} steps)"
    both = math.lcm(
        to_steps(stage.evaluate.every, steps_per_epoch),
        to_steps(stage.checkpoint.every, steps_per_epoch),
    )
    if stage.checkpoint.keep_best and both >= steps:
        yield (
            "checkpoint.keep_best: no checkpoint but the last is of an evaluated step: give "
            "checkpoint.every the time of evaluate.every"
        )
