"""What the first worker writes down for the bill: where its time goes, and its device's peak."""

import logging
import math
import time
from typing import Any

import torch
from torch import nn

from data_pipeline.config import as_size
from model.complexity import complexity
from orchestrator.job.config import StageSettings
from orchestrator.runs.bill import last_seen
from orchestrator.runs.run import Run
from orchestrator.runs.run_writer import RunWriter
from orchestrator.training.meters import Meters
from orchestrator.training.place import Place

log = logging.getLogger(__name__)

EVERY = 30.0  # seconds between two entries
PASSES = 3  # Multiply-Adds of a training step, in forward passes: backward takes two
_ROWS = {"cpu": 512, "cuda": 16384}  # of the product that is timed: enough for the device's speed


class Ledger:
    """Adds events to a run: after the first step, every half minute, and at each checkpoint.

    Workers without a writer write nothing.
    """

    def __init__(self, writer: RunWriter | None, meters: Meters) -> None:
        self._writer = writer
        self._meters = meters
        self._written = -math.inf

    def step(self, done: int) -> None:
        """A step is done: the number of steps now."""
        if time.perf_counter() - self._written >= EVERY:
            self.save(done)

    def save(self, done: int) -> None:
        """Write an entry now: a run that goes on from here has lost nothing before it."""
        self._written = time.perf_counter()
        if self._writer:
            seconds, first_wait = self._meters.not_trained(), self._meters.first_wait
            self._writer.note("time", step=done, seconds=seconds, first_wait=first_wait)


def came_up(run: Run, rank: int, world: int) -> None:
    """The first worker writes down that all are there, and when those before were last alive.

    A disk that does not take it costs the bill a detail, not the run its life.
    """
    if rank == 0:
        try:
            run.note("workers", world=world, seen=last_seen(run))
        except OSError as error:
            log.warning("%s: %s", run.path, error)


def note_device(
    writer: RunWriter, stage: StageSettings, num_classes: int, network: nn.Module, place: Place
) -> float:
    """Measure the device; seconds of a step if every worker's reached its peak all the time."""
    device = measure_peak(network, place)
    size = as_size(stage.data.train.crop)
    found = complexity(stage.model, stage.task, num_classes, size)
    multiply_adds = PASSES * found.multiply_adds * stage.global_batch
    seconds = multiply_adds / (device["multiply_adds_per_second"] * place.world)
    writer.note("device", ideal_step=seconds, multiply_adds_of_step=multiply_adds, **device)
    return seconds


def measure_peak(network: nn.Module, place: Place) -> dict[str, Any]:
    """Multiply-Adds per second of a product like the largest pointwise convolution, in training's
    precision, with this worker's threads; takes a fraction of a second."""
    device, dtype = place.device, place.autocast_dtype or torch.float32
    rows, shape = _ROWS[device.type], _largest_pointwise(network)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "dtype": str(dtype).removeprefix("torch."),
        "product": [rows, *reversed(shape)],
        "multiply_adds_per_second": product_speed(rows, shape, device, dtype),
    }


def product_speed(
    rows: int, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> float:
    """Multiply-Adds per second of a matrix product; `shape`: output and input channels."""
    outputs, inputs = shape
    left = torch.rand(rows, inputs, device=device, dtype=dtype)
    right = torch.rand(inputs, outputs, device=device, dtype=dtype)
    products = 20 if device.type == "cuda" else 1
    seconds = []
    for _ in range(6):  # the first one warms up
        _wait(device)
        began = time.perf_counter()
        for _ in range(products):
            left @ right
        _wait(device)
        seconds.append((time.perf_counter() - began) / products)
    return rows * inputs * outputs / min(seconds)


def _largest_pointwise(network: nn.Module) -> tuple[int, int]:
    """(output channels, input channels)."""
    shapes = [
        (layer.out_channels, layer.in_channels)
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
    ]
    return max(shapes, key=lambda shape: shape[0] * shape[1], default=(1024, 1024))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
