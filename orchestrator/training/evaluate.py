"""Evaluation: every sample of a split exactly once, one set of sums over all workers."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from data_pipeline.config import as_size
from data_pipeline.dataset import Dataset
from data_pipeline.loader import EvalLoader, EvalSample
from data_pipeline.plan import eval_indices
from model.build import Network
from model.deeplab import DeepLab
from model.inference import aligned_side, make_views, pad_image, predict_labels
from orchestrator.job.config import StageSettings
from orchestrator.training.place import Place
from orchestrator.training.task import Metrics, make_metrics

Size = tuple[int, int]


def evaluate(
    network: Network,
    stage: StageSettings,
    split: Dataset,
    place: Place,
    alive: Callable[[str], None] = lambda _: None,
    see: Callable[[EvalSample, torch.Tensor], None] = lambda *_: None,
) -> dict[str, float]:
    """Evaluate a whole split, each worker its part, on the network without DDP around it.

    `alive` is told of every sample, `see` of every segmentation (H, W) of this worker.
    """
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
    samples = _told(loader, alive)
    with place.autocast(), torch.no_grad():
        if isinstance(network, DeepLab):
            _segment(network, samples, metrics, stage, place.device, see)
        else:
            _classify(network, samples, metrics, stage.evaluate.batch, place.device)
    network.set_output_stride(trained_stride)
    result = merge(new_metrics(), place.gather(metrics.state()), split.num_samples)
    return {f"val/{name}": value for name, value in result.items()}


def _told(samples: Iterable[EvalSample], alive: Callable[[str], None]) -> Iterator[EvalSample]:
    for sample in samples:
        alive("evaluates")
        yield sample


def _segment(
    network: DeepLab,
    samples: Iterable[EvalSample],
    metrics: Metrics,
    stage: StageSettings,
    device: torch.device,
    see: Callable[[EvalSample, torch.Tensor], None],
) -> None:
    """Add the predictions of whole images, padded to the crop (None: to their own aligned size).

    Images of one padded size go through the network together.
    """
    crop = as_size(stage.data.val.crop) if stage.data.val.crop else None
    views = make_views(stage.evaluate.scales, stage.evaluate.flip)
    mean_pixel = torch.tensor(network.mean_pixel, dtype=torch.float32, device=device)

    def padded(sample: EvalSample) -> Size:
        height, width = sample.image.shape[-2:]
        return crop or (aligned_side(height, network, views), aligned_side(width, network, views))

    for group in _groups(samples, padded, stage.evaluate.batch):
        size = padded(group[0])
        images = torch.stack([pad_image(s.image.to(device), size, mean_pixel) for s in group])
        predictions = predict_labels(network, images, views).cpu()
        for sample, prediction in zip(group, predictions, strict=True):
            height, width = sample.label.shape
            metrics.update(prediction[:height, :width], sample.label)
            see(sample, prediction[:height, :width])


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
