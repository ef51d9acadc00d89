"""Pictures and tables of an evaluation."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data_pipeline.loader import EvalSample
from orchestrator.runs.run import Run
from orchestrator.training.artifacts import Predictions, keep_artifacts, split_classes


def test_a_picture_has_image_label_and_prediction_in_a_row() -> None:
    seen = Predictions()
    assert seen.files() == {}
    for index in range(6):
        label = torch.full((10, 20), 255)
        image = torch.full((3, 10, 20), 40 * index, dtype=torch.uint8)
        sample = EvalSample(image=image, label=label, key="a", index=index)
        seen.add(sample, torch.ones(10, 20, dtype=torch.int64))
    (png,) = seen.files().values()
    picture = cv2.cvtColor(cv2.imdecode(np.frombuffer(png, np.uint8), 1), cv2.COLOR_BGR2RGB)
    assert picture.shape == (4 * 14, 3 * 24, 3)
    assert picture[5, 5].tolist() == [0, 0, 0]
    assert picture[14 + 5, 5].tolist() == [40, 40, 40]
    assert picture[5, 24 + 5].tolist() == [224, 224, 192]  # the palette's colour of 255
    assert picture[5, 48 + 5].tolist() == [128, 0, 0]  # and of 1


def test_large_images_are_made_small() -> None:
    seen = Predictions()
    image, ids = torch.zeros(3, 1024, 2048, dtype=torch.uint8), torch.zeros(1024, 2048).long()
    seen.add(EvalSample(image=image, label=ids, key="a", index=0), ids)
    (png,) = seen.files().values()
    assert cv2.imdecode(np.frombuffer(png, np.uint8), 1).shape == (164, 972, 3)


@pytest.mark.parametrize("classes", [100, 101])
def test_metrics_of_many_classes_become_a_table(classes: int) -> None:
    metrics = {"val/miou": 0.5} | {f"val/iou/a, {n}/b": n / 7 for n in range(classes)}
    rest, tables = split_classes(metrics)
    if classes == 100:
        assert (rest, tables) == (metrics, {})
        return
    assert rest == {"val/miou": 0.5}
    lines = tables["classes/iou.csv"].decode().splitlines()
    assert lines[:3] == ["class,iou", '"a, 0/b",0.0', f'"a, 1/b",{1 / 7}']
    assert len(lines) == 102


def test_a_full_disk_costs_the_picture_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full() -> None:
        raise OSError("No space left on device")

    run = Run(tmp_path)
    keep_artifacts(run, full, {"predictions/val.png": b"a"})
    assert "not written: No space left" in caplog.text
    keep_artifacts(run, lambda: None, {"predictions/val.png": b"a"})
    assert (run.artifacts / "predictions" / "val.png").read_bytes() == b"a"
