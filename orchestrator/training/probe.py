"""How many samples go through the network at once: found, or checked, before training.

Workers probe alone: no collective operation runs, so that none waits for one that is out of memory.

micro_batch.json   what `micro_batch: auto` has found; a run keeps it to its end
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import uname
from typing import Any

import torch
from torch import Tensor

from data_pipeline.config import as_size
from data_pipeline.dataset import Dataset
from model.build import Network, build_network, freeze_batch_norm
from model.deeplab import DeepLab
from model.inference import aligned_side, make_views, predict_labels
from orchestrator.errors import RunError
from orchestrator.files import read_json, write_json
from orchestrator.job.config import StageSettings
from orchestrator.runs.record import Metrics
from orchestrator.runs.run import Run
from orchestrator.training.memory import (
    available_memory,
    describe,
    is_out_of_memory,
    kept_for_backward,
)
from orchestrator.training.optimizer import moments
from orchestrator.training.place import Place
from orchestrator.training.stage_checks import fewest_at_once, stage_warnings
from orchestrator.training.task import Loss

RECORD = "micro_batch.json"
_HEADROOM = 0.05  # share of a GPU's memory left over: fragments, and what other libraries need
_MARGIN = 1.25  # RAM over what backward needs; 0.9 to 1.04 times that was measured


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A network before its first step, and what it will be trained with."""

    stage: StageSettings
    place: Place
    network: Network
    loss: Loss
    num_classes: int

    @property
    def crop(self) -> tuple[int, int]:
        """Height and width of a training sample."""
        return as_size(self.stage.data.train.crop)

    def copies(self) -> int:
        """Tensors of the size of all parameters that training holds beside them."""
        ema = self.stage.ema is not None
        return 1 + moments(self.stage.optimizer) + ema  # 1: the gradients


def settle_memory(probe: Probe, run: Run, val_set: Dataset) -> StageSettings:
    """What `settle_micro_batch` returns, after a look at evaluation."""
    stage = settle_micro_batch(probe, run)
    check_evaluation(probe, val_set)
    return stage


def settle_micro_batch(probe: Probe, run: Run) -> StageSettings:
    """The stage with `micro_batch` as a number where it was auto; every worker calls it.

    On a GPU a number (or null, the whole part of a worker) is tried out. The network, its
    statistics and the random state stay as they are.

    Raises:
        RunError: on every worker, that many samples do not fit into the memory of one.
    """
    stage, place = probe.stage, probe.place
    on_cpu, automatic = not _refuses(place), stage.micro_batch == "auto"
    kept = place.gather(read_json(run.path / RECORD) if automatic else None)[0]
    wanted = kept["micro_batch"] if kept else stage.micro_batch
    if on_cpu and wanted != "auto":
        return stage.model_copy(update={"micro_batch": wanted})
    most = math.ceil(stage.global_batch / place.world)
    if isinstance(wanted, int):
        most = min(most, wanted)
    fits = _fits_in_ram(probe) if on_cpu else lambda size: _fits(lambda: _train_pass(probe, size))
    found = min(place.gather(next((s for s in _sizes(stage, most) if fits(s)), 0)))
    if not found or (found < most and wanted != "auto"):
        raise RunError(_refusal(probe, kept, most, found))
    if wanted != "auto":
        return stage.model_copy(update={"micro_batch": wanted})
    return _keep(probe, run, found, most)


def _refuses(place: Place) -> bool:
    """Whether the device says that memory is used up; on a CPU the system ends the process."""
    return place.device.type != "cpu"


def _sizes(stage: StageSettings, most: int) -> list[int]:
    """Sizes to try: all at once, in two passes, in four ...; not those that leave one image to
    batch normalisation that is trained."""
    halvings = (math.ceil(most / 2**i) for i in range(most.bit_length() + 1))
    sizes = sorted(set(halvings), reverse=True)
    if stage.model.batch_norm.frozen:
        return sizes
    return [size for size in sizes if size == most or fewest_at_once(_with(stage, size))[0] > 1]


def _with(stage: StageSettings, micro_batch: int) -> StageSettings:
    return stage.model_copy(update={"micro_batch": micro_batch})


def _keep(probe: Probe, run: Run, found: int, most: int) -> StageSettings:
    """Record what was found; say it, and what comes of it."""
    stage, device = _with(probe.stage, found), describe(probe.place.device)
    if probe.place.rank == 0:
        write_json(run.path / RECORD, {"micro_batch": found, "device": device})
        height, width = probe.crop
        text = f"micro_batch: auto: {found} of {most} samples of {height}x{width} at a time"
        lost = [w for w in stage_warnings(stage) if w not in stage_warnings(probe.stage)]
        run.note("micro_batch", "; ".join([f"{text} fit into the memory of {device}", *lost]))
    return stage


def _refusal(probe: Probe, kept: dict[str, str] | None, most: int, found: int) -> str:
    stage, device = probe.stage, describe(probe.place.device)
    height, width = probe.crop
    shape = f"{most} samples of {height}x{width}"
    cures = "lower data.train.crop, take a smaller network, or devices with more memory"
    if not found:
        norm = "" if stage.model.batch_norm.frozen else ", or model.batch_norm.frozen"
        return (
            f"micro_batch: {stage.micro_batch or 'null'}: not even the fewest "
            f"samples of {height}x{width} that can be trained on fit into the memory of {device}; "
            f"{cures}{norm}"
        )
    if kept:
        return (
            f"micro_batch: auto found {kept['micro_batch']} on {kept['device']} when "
            f"this run began, and {device} holds {found}. Batch normalisation sees the same number "
            f"to the end: go on with devices like the first, or start anew, micro_batch: {found}"
        )
    return (
        f"micro_batch: {stage.micro_batch or 'null'} sends {shape} through the "
        f"network at once, which does not fit into the memory of {device}; micro_batch: {found} "
        f"fits, or {cures}"
    )


def check_evaluation(probe: Probe, split: Dataset) -> None:
    """Try the largest shape of evaluation on a GPU; every worker calls it.

    Raises:
        RunError: on every worker, it does not fit.
    """
    stage, place = probe.stage, probe.place
    if not _refuses(place):
        return
    batch, (height, width) = stage.evaluate.batch, _evaluated_size(probe, split)
    sizes = sorted({math.ceil(batch / 2**i) for i in range(batch.bit_length() + 1)}, reverse=True)
    run = _evaluation_pass(probe, height, width)
    found = min(place.gather(next((s for s in sizes if _fits(lambda s=s: run(s))), 0)))  # type: ignore[misc]
    if found < batch:
        cure = f"evaluate.batch: {found} fits" if found else "lower evaluate.scales"
        raise RunError(
            f"evaluate.batch: {batch} images of {height}x{width} do not fit into the "
            f"memory of {describe(place.device)}; {cure}"
        )


def _evaluated_size(probe: Probe, split: Dataset) -> tuple[int, int]:
    """Height and width of the largest image that is evaluated."""
    crop, network = probe.stage.data.val.crop, probe.network
    if not isinstance(network, DeepLab):
        return as_size(crop) if crop else probe.crop
    if crop:
        return as_size(crop)
    views = make_views(probe.stage.evaluate.scales, probe.stage.evaluate.flip)
    height, width = split.largest_size()
    return aligned_side(height, network, views), aligned_side(width, network, views)


def _evaluation_pass(probe: Probe, height: int, width: int) -> Callable[[int], None]:
    network, evaluate = probe.network, probe.stage.evaluate
    views = make_views(evaluate.scales, evaluate.flip)

    def run(size: int) -> None:
        with _held(probe, probe.copies()), probe.place.autocast(), torch.no_grad():
            trained = network.output_stride
            network.eval().set_output_stride(evaluate.output_stride or trained)
            try:
                images = _images(probe, size, height, width)
                if isinstance(network, DeepLab):
                    predict_labels(network, images.float(), views)
                else:
                    network(images)
            finally:
                network.set_output_stride(trained)

    return run


def _fits(run: Callable[[], None]) -> bool:
    try:
        run()
        fitted = True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fitted = False
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return fitted


def _train_pass(probe: Probe, size: int) -> None:
    """Forward and backward of so many samples beside all that training holds."""
    parameters = [p for p in probe.network.parameters() if p.requires_grad]
    try:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        with _held(probe, probe.copies() - 1):
            _forward(probe, size).backward()
    finally:
        for parameter in parameters:
            parameter.grad = None


@contextmanager
def _held(probe: Probe, copies: int) -> Iterator[None]:
    """The network in training mode, with memory taken for copies of the parameters and spare."""
    device = probe.place.device
    parameters = [p for p in probe.network.parameters() if p.requires_grad]
    held = [torch.empty_like(p) for p in parameters for _ in range(copies)]
    if device.type == "cuda":
        spare = int(_HEADROOM * torch.cuda.get_device_properties(device).total_memory)
        held.append(torch.empty(spare, dtype=torch.uint8, device=device))
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        probe.network.train()
        held.clear()


def _forward(probe: Probe, size: int) -> Tensor:
    """The loss of so many black samples.

    With frozen statistics, which need the same memory: none changes, nobody waits for others, and
    one sample is enough.
    """
    probe.network.train()
    freeze_batch_norm(probe.network)
    images = _images(probe, size, *probe.crop)
    with probe.place.autocast():
        outputs = probe.network(images)
    return probe.loss(outputs, _labels(probe, size), 0)[0]


def _images(probe: Probe, size: int, height: int, width: int) -> Tensor:
    shape, device = (size, 3, height, width), probe.place.device
    images = torch.zeros(shape, dtype=torch.uint8, device=device)
    return images.to(memory_format=torch.channels_last)


def _labels(probe: Probe, size: int) -> Tensor:
    device = probe.place.device
    if probe.stage.task == "segmentation":
        return torch.zeros((size, *probe.crop), dtype=torch.uint8, device=device)
    if probe.stage.task == "multilabel":
        return torch.zeros((size, probe.num_classes), device=device)
    return torch.zeros(size, dtype=torch.int64, device=device)


def _fits_in_ram(probe: Probe) -> Callable[[int], bool]:
    """What is needed is computed, from one sample."""
    node = uname().nodename
    workers = probe.place.gather(node).count(node)
    free = available_memory() / workers
    weights = sum(p.nbytes for p in probe.network.parameters())
    if _least_kept_by_one(probe) > free:
        return lambda size: False  # trying it out would have the system end this process
    with _held(probe, 0), kept_for_backward(probe.network) as kept:
        _forward(probe, 1)
        each = kept()
    return lambda size: probe.copies() * weights + _MARGIN * each * size <= free


def _least_kept_by_one(probe: Probe) -> int:
    """Bytes that the backward pass keeps of one sample, at least; nothing is computed."""
    stage, (height, width) = probe.stage, probe.crop
    with _held(probe, 0), torch.device("meta"):
        network = build_network(stage.model, stage.task, probe.num_classes).train()
        freeze_batch_norm(network)
        with kept_for_backward(network) as kept:
            network(torch.empty(1, 3, height, width, dtype=torch.uint8))
            return kept() // (2 if probe.place.autocast_dtype else 1)


def micro_batch_metrics(in_job: Any, settled: StageSettings) -> Metrics:
    """What auto came to, for the journal."""
    number = settled.micro_batch
    return {"train/micro_batch": float(number)} if in_job == "auto" and number else {}


@contextmanager
def naming_memory(stage: StageSettings, place: Place, shape: Sequence[int]) -> Iterator[None]:
    """Say what was too large where memory is used up within; `shape` (B, C, H, W) of the batch.

    Raises:
        RunError: memory is used up.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        size, _, height, width = shape
        at_once = min(size, stage.micro_batch) if isinstance(stage.micro_batch, int) else size
        cure = (
            f"set micro_batch: {at_once // 2} or auto" if at_once > 1 else "lower data.train.crop"
        )
        raise RunError(
            f"{describe(place.device)} ran out of memory with micro_batch: "
            f"{stage.micro_batch or 'null'}, {at_once} samples of {height}x{width} at once; {cure} "
            "(either begins a new run)"
        ) from error
