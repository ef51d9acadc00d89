"""Evaluation: every sample of a split exactly once, one set of sums over all workers."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from data_pipeline.config import as_size
from data_pipeline.dataset import Dataset
from data_pipeline.loader import EvalLoader, EvalSample
from data_pipeline.plan import eval_indices
from model.blocks import resize
from model.build import Network
from model.deeplab import DeepLab
from orchestrator.config import StageSettings
from orchestrator.place import Place
from orchestrator.task import Metrics, make_metrics

Size = tuple[int, int]


def aligned_side(side: int) -> int:
    """The next 16k+1 from `side` on: there corner pixels stay aligned at every stride."""
    return -(-(side - 1) // 16) * 16 + 1


def pad_image(image: torch.Tensor, size: Size, mean_pixel: torch.Tensor) -> torch.Tensor:
    """Pad (3, H, W) at the bottom and right with the mean colour, as the reference does.

    Returns float32: the mean colour is no whole number, and after normalisation it must be zero.
    """
    height, width = image.shape[-2:]
    padded = mean_pixel.view(3, 1, 1).expand(3, *size).clone()
    padded[:, :height, :width] = image
    return padded


def evaluate(
    network: Network, stage: StageSettings, split: Dataset, place: Place
) -> dict[str, float]:
    """Evaluate a whole split, each worker its part, on the network without DDP around it."""
    manifest = split.manifest
    new_metrics = partial(make_metrics, stage.task, manifest.class_names, manifest.ignore_label)
    metrics = new_metrics()
    place.share_buffers(network)
    network.eval()
    trained_stride = network.output_stride
    network.set_output_stride(stage.evaluate.output_stride or trained_stride)
    loader = EvalLoader(
        dataset=split,
        task=stage.task,
        data=stage.data.val,
        indices=eval_indices(split.num_samples, place.rank, place.world),
        num_classes=len(manifest.class_names),
        crop=stage.data.val.crop or stage.data.train.crop,
        threads=stage.data.threads,
    )
    with place.autocast(), torch.no_grad():
        if isinstance(network, DeepLab):
            _segment(network, loader, metrics, stage, place.device)
        else:
            _classify(network, loader, metrics, stage.evaluate.batch, place.device)
    network.set_output_stride(trained_stride)
    result = merge(new_metrics(), place.gather(metrics.state()), split.num_samples)
    return {f"val/{name}": value for name, value in result.items()}


def _segment(
    network: DeepLab,
    samples: Iterable[EvalSample],
    metrics: Metrics,
    stage: StageSettings,
    device: torch.device,
) -> None:
    """Add the argmax predictions of whole images, padded to the crop (None: to their own 16k+1).

    Images of one padded size go through the network together.
    """
    size = as_size(stage.data.val.crop) if stage.data.val.crop else None
    scale = stage.evaluate.scale
    mean_pixel = torch.tensor(network.mean_pixel, dtype=torch.float32, device=device)
    for group in _groups(samples, lambda sample: size or _aligned(sample), stage.evaluate.batch):
        padded = size or _aligned(group[0])
        images = torch.stack([pad_image(s.image.to(device), padded, mean_pixel) for s in group])
        if scale != 1:
            images = resize(images, (_scaled(padded[0], scale), _scaled(padded[1], scale)))
        images = images.contiguous(memory_format=torch.channels_last)
        logits = resize(network.forward_low_resolution(images).float(), padded)
        predictions = logits.argmax(dim=1).to(torch.uint8).cpu()
        for sample, prediction in zip(group, predictions, strict=True):
            height, width = sample.label.shape
            metrics.update(prediction[:height, :width], sample.label)


def _classify(
    network: Network,
    samples: Iterable[EvalSample],
    metrics: Metrics,
    batch: int,
    device: torch.device,
) -> None:
    """Add the class scores of centre crops."""
    for group in _groups(samples, lambda sample: sample.image.shape, batch):
        images = torch.stack([sample.image for sample in group]).to(device)
        labels = torch.stack([torch.as_tensor(sample.label) for sample in group])
        metrics.update(network(images).float().cpu(), labels)


def merge(fresh: Metrics, states: list[dict[str, Any]], expected: int) -> dict[str, float]:
    """The ratios over the sums of all workers.

    Raises:
        RuntimeError: the number of samples seen is not the size of the split.
    """
    for state in states:
        fresh.add(state)
    if fresh.num_samples != expected:
        raise RuntimeError(f"evaluated {fresh.num_samples} samples of a split of {expected}")
    return fresh.compute()


def _scaled(side: int, scale: float) -> int:
    """The reference's scale_dimension: 16k+1 stays aligned under halving and doubling."""
    return int((side - 1) * scale + 1)


def _aligned(sample: EvalSample) -> Size:
    height, width = sample.image.shape[-2:]
    return aligned_side(height), aligned_side(width)


def _groups(
    samples: Iterable[EvalSample], key: Callable[[EvalSample], Any], size: int
) -> Iterator[list[EvalSample]]:
    """Neighbouring samples of equal key, at most `size` together."""
    group: list[EvalSample] = []
    for sample in samples:
        if group and (len(group) == size or key(group[0]) != key(sample)):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group
