"""What a stage will take: memory of a worker, hours and money, reckoned before it runs."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from data_pipeline.config import as_size
from orchestrator.job.config import StageSettings
from orchestrator.job.duration import as_time, to_steps
from orchestrator.launch.machine import Finding
from orchestrator.runs.run import Run, read_journal
from orchestrator.training.optimizer import base_rate, moments

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
    Gpu("A100-80G", 2039, 80),
    Gpu("A100", 1555, 40),
    Gpu("4090", 1008, 24),
    Gpu("3090", 936, 24),
    Gpu("V100", 900, 16),
    Gpu("L40S", 864, 48),
    Gpu("T4", 320, 16),
    Gpu("L4", 300, 24),
)
_REFERENCE = GPUS[3]
# timm's benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv: Xception-65 trains at 281 images of 299
# (3 x 13.9 G Multiply-Adds) a second. Depthwise convolutions make it a matter of
# memory, so other GPUs are reckoned by their bandwidth.
_MACS_PER_GB = 3 * 13.9e9 * 281 / 936
# Kernels of some microseconds for some hundred layers, forward and backward, and the exchange of
# statistics and gradients: that does not shrink with the images of a worker. A guess.
_LEAST_STEP = 0.05  # seconds, on a GPU
_SHAPE = ("backbone", "width", "middle_units")
_FULL = 0.9  # share of a device's memory
_HOPELESS = 4  # times a device's memory: no error of the forecast
_MUCH_EVALUATION = 0.5  # share of the hours
_OFTEN = 10  # steps from one checkpoint to the next
_SHORT = 1000  # steps of a training that is a trial
_VERY_LONG = 90 * 24  # hours
_CPU_SHARE = 0.5  # of a matrix product's speed


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a worker computes on; `basis` tells where its speed in training comes from."""

    name: str
    macs_per_second: float
    basis: str
    bytes: int | None = None
    least_step: float = 0.0  # seconds


class Cost(NamedTuple):
    """Of a stage."""

    hours: float
    gpu_hours: float
    money: float | None


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The cost of a stage on its least workers, and on its most."""

    stage: str
    steps: int
    epochs: float
    rate: float  # highest learning rate
    workers: int
    device: Device
    hours: float
    gpu_hours: float
    money: float | None
    on_most: Cost
    evaluation: float  # share of the hours
    memory: int  # bytes of a worker's device
    checkpoint: int  # bytes


class Data(NamedTuple):
    """Samples and class names of a stage's data."""

    train: int
    val: int
    class_names: tuple[str, ...]


def find_device(gpus_per_worker: float, gpu_names: Sequence[str] = ()) -> Device:
    """The device of a worker: of a cluster's accelerator names, this machine's, or a guess."""
    import torch

    if not gpus_per_worker:
        return Device(
            name="this machine",
            macs_per_second=_CPU_SHARE * _cpu_peak(),
            basis=f"at {_CPU_SHARE:g} of a matrix product's speed on this machine's CPUs",
            bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        )
    size = None
    if not gpu_names and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu_names, size = (properties.name,), properties.total_memory
    found = [gpu for gpu in GPUS if any(gpu.name in name.upper() for name in gpu_names)]
    gpu = found[0] if found else _REFERENCE
    guess = "" if found else ", as no GPU is known here"
    basis = (
        f"on an {gpu.name} ({gpu.gibibytes:g} GiB{guess}), by timm's speed of Xception-65 on an "
        f"RTX 3090 and memory bandwidth, and no less than {_LEAST_STEP * 1000:g} ms a step"
    )
    return Device(
        name=gpu.name,
        macs_per_second=_MACS_PER_GB * gpu.bandwidth,
        basis=basis,
        bytes=size or int(gpu.gibibytes * 2**30),
        least_step=_LEAST_STEP,
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

    size = as_size(stage.data.train.crop)
    counted = complexity(stage.model, stage.task, len(data.class_names), size)
    crop_macs = counted.multiply_adds
    device = _from_earlier(stage, crop_macs, device, runs)
    every = to_steps(stage.evaluate.every, data.train // stage.global_batch)
    training = PASSES * steps * stage.global_batch * crop_macs
    evaluation = math.ceil(steps / every) * data.val * _evaluated(stage, len(data.class_names))

    def cost(workers: int) -> Cost:
        gpus, price = workers * stage.cluster.gpus_per_worker, stage.cluster.price_per_gpu_hour
        # Two processes on one machine's CPUs share its speed.
        speed = device.macs_per_second * (workers if gpus else 1)
        hours = (max(training / speed, steps * device.least_step) + evaluation / speed) / 3600
        return Cost(hours, hours * gpus, None if price is None else hours * gpus * price)

    least = cost(max(1, stage.cluster.min_workers))
    memory, checkpoint = _bytes(stage, network)
    return Forecast(
        stage=stage.name,
        steps=steps,
        epochs=steps * stage.global_batch / data.train,
        rate=base_rate(stage.optimizer, stage.global_batch),
        workers=max(1, stage.cluster.min_workers),
        device=device,
        **least._asdict(),
        on_most=cost(max(1, stage.cluster.max_workers)),
        evaluation=evaluation / (training + evaluation),
        memory=memory,
        checkpoint=checkpoint,
    )


def much_memory(stage: StageSettings, found: Forecast) -> Finding | None:
    """More than a worker's device has; by so much that the forecast's error is none: refused."""
    room = found.device.bytes
    if not room or found.memory <= _FULL * room or stage.micro_batch == "auto":
        return None
    return Finding(
        "error" if found.memory > _HOPELESS * room else "warning",
        stage.name,
        f"a training step needs about {found.memory / 2**30:.0f} GiB of a worker, of which "
        f"{found.device.name} has {room / 2**30:.0f}; set micro_batch (auto finds what fits), "
        "lower data.train.crop, or take more workers",
    )


def forecast_warnings(stage: StageSettings, found: Forecast, data: Data) -> Iterator[str]:
    """What of a forecast is not as one would wish."""
    every = to_steps(stage.checkpoint.every, data.train // stage.global_batch)
    hours = found.hours * min(every, found.steps) / found.steps
    if hours > 1:
        yield (
            f"checkpoint.every: {stage.checkpoint.every} is about {hours:.1f} hours, which a "
            "failure would cost; write them more often"
        )
    if every < _OFTEN and found.steps > _SHORT:
        yield (
            f"checkpoint.every: {stage.checkpoint.every} writes {found.steps // every} checkpoints "
            f"of {found.checkpoint / 2**20:.0f} MiB, and training waits where one is not written "
            "yet; write them less often"
        )
    if found.evaluation > _MUCH_EVALUATION:
        yield (
            f"evaluate.every: {stage.evaluate.every}: {found.evaluation:.0%} of the time goes into "
            "evaluation; evaluate less often, or on fewer scales"
        )
    if found.hours > _VERY_LONG:
        years = as_time(found.hours * 3600)
        yield f"steps: {found.steps} take about {years}; is that what you want?"
    step = found.hours * 3600 / found.steps
    if step * 2 > stage.cluster.hang_after:
        yield (
            f"cluster.hang_after: {stage.cluster.hang_after:g} seconds, and a step takes about "
            f"{step:.1f}: workers would be taken for hung; raise it"
        )


def _evaluated(stage: StageSettings, num_classes: int) -> float:
    """Multiply-Adds of the evaluation of an image, of the training crop's size if not given."""
    from model.complexity import complexity

    size = as_size(stage.data.val.crop or stage.data.train.crop)
    stride = stage.evaluate.output_stride or stage.model.output_stride
    model = stage.model.model_copy(update={"output_stride": stride})
    scales, flip = stage.evaluate.scales, stage.evaluate.flip
    return complexity(model, stage.task, num_classes, size, scales=scales, flip=flip).multiply_adds


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
            basis = f"by the speed of {run.path.name}"
            return replace(device, macs_per_second=speed, basis=basis, least_step=0.0)
    return device


def _is_alike(job: dict[str, Any], stage: StageSettings) -> bool:
    return (
        job.get("task") == stage.task
        and all(job["model"][name] == getattr(stage.model, name) for name in _SHAPE)
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
