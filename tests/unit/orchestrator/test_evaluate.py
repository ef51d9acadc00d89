from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.dataset import Dataset, open_dataset
from model.build import Network, build_network
from model.metrics import SegmentationMetrics
from orchestrator.config import StageSettings
from orchestrator.evaluate import aligned_side, evaluate, merge, pad_image
from orchestrator.place import Place
from tests.unit.orchestrator.jobs import stage

ALONE = Place(rank=0, world=1, device=torch.device("cpu"), bfloat16=False)


def settings(**changes: Any) -> StageSettings:
    return StageSettings.model_validate(stage("tiny", "segmentation", "tiny-voc", **changes))


def network_and_split(data: Path, job: StageSettings) -> tuple[Network, Dataset]:
    split = open_dataset(data, "tiny-voc", "val")
    torch.manual_seed(1)
    network = build_network(job.model, "segmentation", len(split.manifest.class_names))
    noise = torch.randint(0, 256, (8, 3, 65, 65), dtype=torch.uint8)
    network.train()
    for _ in range(30):  # running statistics that fit, so that predictions differ by pixel
        network(noise)
    return network.eval(), split


def test_padding_is_zero_for_the_network() -> None:
    image = torch.full((3, 5, 4), 200, dtype=torch.uint8)
    padded = pad_image(image, (9, 17), torch.tensor([127.5, 127.5, 127.5]))
    assert padded.shape == (3, 9, 17)
    assert (padded[:, :5, :4] == 200).all()
    assert (padded[:, 5:] == 127.5).all()
    assert (padded[:, :, 4:] == 127.5).all()


@pytest.mark.parametrize(("side", "aligned"), [(1, 1), (2, 17), (17, 17), (500, 513), (513, 513)])
def test_aligned_sides(side: int, aligned: int) -> None:
    assert aligned_side(side) == aligned


def test_whole_images_are_compared_at_their_own_size(tiny_data: Path) -> None:
    job = settings()
    network, split = network_and_split(tiny_data, job)
    expected = SegmentationMetrics(split.manifest.class_names, split.manifest.ignore_label)
    from data_pipeline.loader import EvalLoader

    predicted = set()
    loader = EvalLoader(
        dataset=split,
        task="segmentation",
        data=job.data.val,
        indices=range(split.num_samples),
        num_classes=len(split.manifest.class_names),
    )
    for sample in loader:
        height, width = sample.image.shape[-2:]
        canvas = torch.full((3, aligned_side(height), aligned_side(width)), 127.5)
        canvas[:, :height, :width] = sample.image
        with torch.no_grad():
            prediction = network(canvas[None])[0].argmax(0)[:height, :width]
        expected.update(prediction, sample.label)
        predicted |= set(prediction.unique().tolist())
    assert len(predicted) > 1
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


def test_a_scaled_evaluation_still_counts_every_pixel(tiny_data: Path) -> None:
    job = settings(evaluate={"scale": 0.5})
    network, split = network_and_split(tiny_data, job)
    assert 0 <= evaluate(network, job, split, ALONE)["val/pixel_accuracy"] <= 1


def test_a_sample_that_is_missing_or_counted_twice_is_an_error() -> None:
    metrics = SegmentationMetrics(("a", "b"), 255)
    metrics.update(torch.zeros(2, 2), torch.zeros(2, 2))
    states = [metrics.state(), metrics.state()]
    merge(SegmentationMetrics(("a", "b"), 255), states, expected=2)
    with pytest.raises(RuntimeError, match="evaluated 2 samples of a split of 3"):
        merge(SegmentationMetrics(("a", "b"), 255), states, expected=3)
