"""What a stage will take: memory of a worker, hours and money, reckoned before it runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from data_pipeline.config import as_size
from orchestrator.job.config import StageSettings
from orchestrator.job.duration import to_steps
from orchestrator.runs.run import Run, read_journal
from orchestrator.training.optimizer import moments

if TYPE_CHECKING:
    from model.build import Network


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: GB/s of its memory and GiB, from NVIDIA's data sheets."""

    name: str
    bandwidth: float
    gibibytes: float


GPUS = (
    Gpu("H200", 4800, 141),
    Gpu("H100", 3350, 80),
    Gpu("A100", 1555, 40),
    Gpu("4090", 1008, 24),
    Gpu("3090", 936, 24),
    Gpu("V100", 900, 16),
    Gpu("L40S", 864, 48),
    Gpu("T4", 320, 16),
    Gpu("L4", 300, 24),
)
_REFERENCE = GPUS[2]
# timm's benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv: Xception-65 trains at 281 images of 299
# (3 x 13.9 G Multiply-Adds) a second. Depthwise convolutions make it a matter of
# memory, so other GPUs are reckoned by their bandwidth.
_MACS_PER_GB = 3 * 13.9e9 * 281 / 936
_CPU_SHARE = 0.5  # of a matrix product's speed


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a worker computes on; `basis` tells where its speed in training comes from."""

    name: str
    macs_per_second: float
    basis: str
    bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The cost of a stage on its least number of workers."""

    stage: str
    steps: int
    epochs: float
    workers: int
    device: Device
    hours: float
    gpu_hours: float
    money: float | None
    memory: int  # bytes of a worker's device
    checkpoint: int  # bytes


class Data(NamedTuple):
    """Samples and class names of a stage's data."""

    train: int
    val: int
    class_names: tuple[str, ...]


class Size(NamedTuple):
    """Of a published split."""

    samples: int
    classes: int


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
    ("cityscapes", "train_extra"): Size(19_998, 19),
    ("cityscapes", "trainval_coarse"): Size(23_473, 19),
}


def published_size(layout: str, split: str) -> Size | None:
    """The size of a split as published, for a data set that is not prepared yet."""
    return _PUBLISHED.get((layout, split))


def find_device(gpus_per_worker: float, gpu_names: Sequence[str] = ()) -> Device:
    """The device of a worker: of a cluster's accelerator names, this machine's, or a guess."""
    import torch

    if not gpus_per_worker:
        basis = f"{_CPU_SHARE:g} of a matrix product's speed on this machine"
        return Device(name="CPU", macs_per_second=_CPU_SHARE * _cpu_peak(), basis=basis)
    size = None
    if not gpu_names and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu_names, size = (properties.name,), properties.total_memory
    found = [gpu for gpu in GPUS if any(gpu.name in name.upper() for name in gpu_names)]
    gpu = found[0] if found else _REFERENCE
    basis = (
        f"timm's speed of Xception-65 on an RTX 3090, by memory bandwidth ({gpu.bandwidth} GB/s)"
    )
    if not found:
        basis = f"no GPU is known here, so for an {gpu.name}; {basis}"
    return Device(
        name=gpu.name,
        macs_per_second=_MACS_PER_GB * gpu.bandwidth,
        basis=basis,
        bytes=size or int(gpu.gibibytes * 2**30),
    )


def _cpu_peak() -> float:
    """Multiply-Adds per second of a product like the network's, on this machine's CPUs."""
    import torch

    from orchestrator.training.ledger import product_speed

    return product_speed(1024, (728, 728), torch.device("cpu"), torch.float32)


def forecast(
    stage: StageSettings,
    network: "Network",
    data: Data,
    steps: int,
    device: Device,
    runs: Sequence[Run] = (),
) -> Forecast:
    """Reckon a stage on `network`, which is on the meta device.

    An earlier run of its kind among `runs`, newest first, tells the speed better than the device.
    """
    from model.complexity import complexity
    from orchestrator.training.ledger import PASSES

    workers = max(1, stage.cluster.min_workers)
    size = as_size(stage.data.train.crop)
    counted = complexity(stage.model, stage.task, len(data.class_names), size)
    crop_macs = counted.multiply_adds
    device = _from_earlier(stage, crop_macs, device, runs)
    every = to_steps(stage.evaluate.every, data.train // stage.global_batch)
    views = sum(scale**2 for scale in stage.evaluate.scales) * (1 + stage.evaluate.flip)
    images = PASSES * steps * stage.global_batch + math.ceil(steps / every) * data.val * views
    # Two processes on one machine's CPUs share its speed.
    together = workers if stage.cluster.gpus_per_worker else 1
    hours = images * crop_macs / (device.macs_per_second * together) / 3600
    gpu_hours = hours * workers * stage.cluster.gpus_per_worker
    price = stage.cluster.price_per_gpu_hour
    memory, checkpoint = _bytes(stage, network)
    return Forecast(
        stage=stage.name,
        steps=steps,
        epochs=steps * stage.global_batch / data.train,
        workers=workers,
        device=device,
        hours=hours,
        gpu_hours=gpu_hours,
        money=gpu_hours * price if price is not None else None,
        memory=memory,
        checkpoint=checkpoint,
    )


def _from_earlier(
    stage: StageSettings, crop_macs: float, device: Device, runs: Sequence[Run]
) -> Device:
    """The device at the speed that the newest run of this task and backbone was logged with."""
    from orchestrator.training.ledger import PASSES

    area = math.prod(as_size(stage.data.train.crop))
    for run in runs:
        job = run.read().get("job", {})
        if not _is_alike(job, stage):
            continue
        journal = read_journal(run.journal)
        speeds = [entry["metrics"].get("train/images_per_second") for entry in journal]
        known = sorted(speed for speed in speeds if speed)
        if known:
            earlier = StageSettings.model_validate(job)
            workers = max(1, earlier.cluster.min_workers if earlier.cluster.gpus_per_worker else 1)
            larger = math.prod(as_size(earlier.data.train.crop)) / area
            speed = PASSES * crop_macs * larger * known[len(known) // 2] / workers
            return replace(device, macs_per_second=speed, basis=f"the speed of {run.path.name}")
    return device


def _is_alike(job: dict[str, Any], stage: StageSettings) -> bool:
    return (
        job.get("task") == stage.task
        and job["model"]["backbone"] == stage.model.backbone
        and bool(job["cluster"]["gpus_per_worker"]) == bool(stage.cluster.gpus_per_worker)
    )


def _bytes(stage: StageSettings, network: "Network") -> tuple[int, int]:
    """(what a worker's device holds in a training step, what a checkpoint takes on disk)."""
    weights = sum(tensor.nbytes for tensor in network.state_dict().values())
    slots = moments(stage.optimizer)
    averaged = weights if stage.ema else 0
    part = math.ceil(stage.global_batch / max(1, stage.cluster.min_workers))
    images = min(part, stage.micro_batch) if isinstance(stage.micro_batch, int) else part
    half = stage.precision not in ("float32", "tf32") and stage.cluster.gpus_per_worker
    activations = _activations(network, images, as_size(stage.data.train.crop))
    training = weights * (2 + slots) + averaged + activations // (2 if half else 1)
    return training, weights * (1 + slots) + averaged


def _activations(network: "Network", images: int, size: tuple[int, int]) -> int:
    """Bytes that the backward pass keeps of `images` crops, in float32; nothing is computed."""
    import torch

    from orchestrator.training.memory import kept_for_backward

    pair = torch.empty(2, 3, *size, dtype=torch.uint8, device="meta")
    with kept_for_backward(network) as kept:
        network.train()(pair).float().log_softmax(1)
        return images * kept() // len(pair)
