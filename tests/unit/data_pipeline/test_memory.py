"""Loading many epochs needs no more memory than loading a few."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg

from data_pipeline.config import TrainData
from data_pipeline.formats.sample import Sample
from data_pipeline.loader import TrainLoader
from tests.unit.data_pipeline.conftest import tiny_sample

SIDE = 384
SAMPLES = (10, 14)
WARM, EPOCHS = 5, 20


def large(task: str, index: int) -> Sample:
    """Of 432 KB decoded; the last one is damaged, as errors hold on to memory most easily."""
    noise = np.random.Generator(np.random.PCG64(index)).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    image = simplejpeg.encode_jpeg(noise, quality=60)
    if index == sum(SAMPLES) - 1:
        image = image[: len(image) // 2]
    label = cv2.imencode(".png", noise[..., 0] % 5)[1].tobytes()
    sample = replace(tiny_sample(task, index), image=image, width=SIDE, height=SIDE)
    return replace(sample, label=label) if task == "segmentation" else sample


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_memory_is_flat_over_epochs(make_dataset: Any, task: str, block_size: int) -> None:
    dataset = make_dataset(task, SAMPLES, large)
    steps = sum(SAMPLES) // 4
    sizes = []
    with TrainLoader(
        dataset=dataset,
        task=task,
        data=TrainData(dataset="tiny", crop=65, block_size=block_size),
        seed=0,
        global_batch=4,
        slots=range(4),
        num_classes=5,
        stop_step=EPOCHS * steps,
        threads=2,
        prefetch=2,
        on_bad_sample="skip",
    ) as loader:
        for step, batch in enumerate(loader, start=1):
            assert batch.images.shape == (4, 3, 65, 65)
            if step % steps == 0:
                sizes.append(resident_bytes())
    # Fifteen epochs of 24 images decode 156 MB; encoded, they are some 25 MB.
    assert sizes[-1] - sizes[WARM - 1] < 12 << 20, [size >> 20 for size in sizes]
