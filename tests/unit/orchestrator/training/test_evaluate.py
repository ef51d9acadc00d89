from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.dataset import Dataset, open_dataset
from data_pipeline.loader import EvalLoader
from model.build import build_network
from model.deeplab import DeepLab
from model.inference import make_views, pad_image, predict_probabilities
from model.metrics import SegmentationMetrics
from orchestrator.job.config import StageSettings
from orchestrator.training.evaluate import evaluate, merge
from orchestrator.training.place import Place
from tests.unit.orchestrator.jobs import stage

ALONE = Place(rank=0, world=1, device=torch.device("cpu"))
MEAN = torch.full((3,), 127.5)


def settings(**changes: Any) -> StageSettings:
    return StageSettings.model_validate(stage("tiny", "segmentation", "tiny-voc", **changes))


def samples(split: Dataset, job: StageSettings) -> EvalLoader:
    return EvalLoader(
        dataset=split,
        task="segmentation",
        data=job.data.val,
        indices=range(split.num_samples),
        num_classes=len(split.manifest.class_names),
    )


def network_and_split(data: Path, job: StageSettings) -> tuple[DeepLab, Dataset]:
    split = open_dataset(data, "tiny-voc", "val")
    torch.manual_seed(1)
    network = build_network(job.model, "segmentation", len(split.manifest.class_names))
    assert isinstance(network, DeepLab)
    images = torch.stack([pad_image(s.image, (81, 81), MEAN) for s in samples(split, job)])
    network.train()
    for _ in range(30):  # running statistics that fit, so that predictions differ by pixel
        network(images)
    network.eval()
    with torch.no_grad():  # predict some of every class, so that accuracies say something
        logits = network(images)
        network.logits.bias -= logits.mean(dim=(0, 2, 3))
        network.logits.bias[0] += logits.std(dim=(0, 2, 3)).mean()
    return network, split


@pytest.mark.parametrize(
    ("how", "multiple"),
    [({}, 16), ({"scales": [0.5, 1, 1.5], "flip": True}, 64), ({"scales": [0.5]}, 64)],
)
def test_whole_images_are_compared_at_their_own_size(
    tiny_data: Path, how: dict[str, Any], multiple: int
) -> None:
    job = settings(evaluate=how)
    network, split = network_and_split(tiny_data, job)
    expected = SegmentationMetrics(split.manifest.class_names, split.manifest.ignore_label)
    views = make_views(job.evaluate.scales, job.evaluate.flip)
    predicted = set()
    for sample in samples(split, job):
        height, width = sample.image.shape[-2:]
        size = (-(-(side - 1) // multiple) * multiple + 1 for side in (height, width))
        canvas = torch.full((1, 3, *size), 127.5)
        canvas[0, :, :height, :width] = sample.image
        with torch.no_grad():
            plain = len(views) == 1 and not how
            scores = network(canvas) if plain else predict_probabilities(network, canvas, views)
        prediction = scores[0].argmax(0)[:height, :width]
        expected.update(prediction, sample.label)
        predicted |= set(prediction.unique().tolist())
    assert len(predicted) > 5
    result = evaluate(network, job, split, ALONE)
    assert result == pytest.approx({f"val/{k}": v for k, v in expected.compute().items()}, abs=1e-3)


def test_batches_change_nothing(tiny_data: Path) -> None:
    one, four = (settings(evaluate={"batch": batch}) for batch in (1, 4))
    network, split = network_and_split(tiny_data, one)
    results = [evaluate(network, job, split, ALONE) for job in (one, four)]
    assert results[0] == pytest.approx(results[1], abs=1e-3)


def test_the_output_stride_of_evaluation_is_put_back(tiny_data: Path) -> None:
    job = settings(evaluate={"output_stride": 8})
    network, split = network_and_split(tiny_data, job)
    sixteen = evaluate(network, settings(), split, ALONE)
    eight = evaluate(network, job, split, ALONE)
    assert eight != sixteen
    assert network.output_stride == 16


def test_scales_and_flip_change_the_result(tiny_data: Path) -> None:
    ways = ({}, {"scales": [0.5]}, {"flip": True}, {"scales": [0.5, 1], "flip": True})
    network, split = network_and_split(tiny_data, settings())
    results = [evaluate(network, settings(evaluate=way), split, ALONE) for way in ways]
    assert len({result["val/pixel_accuracy"] for result in results}) == len(ways)


def test_a_sample_that_is_missing_or_counted_twice_is_an_error() -> None:
    metrics = SegmentationMetrics(("a", "b"), 255)
    metrics.update(torch.zeros(2, 2), torch.zeros(2, 2))
    states = [metrics.state(), metrics.state()]
    merge(SegmentationMetrics(("a", "b"), 255), states, expected=2)
    with pytest.raises(RuntimeError, match="evaluated 2 samples of a split of 3"):
        merge(SegmentationMetrics(("a", "b"), 255), states, expected=3)
