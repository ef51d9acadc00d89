import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_pipeline.prepare import prepare
from orchestrator.errors import RunError
from orchestrator.job.config import StageSettings
from orchestrator.launch.stage import plan_stage
from tests.unit.orchestrator.jobs import stage


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_split_without_labels_is_refused_before_anything_runs(tmp_path, part):
    source = tmp_path / "mine"
    for split in ("train", "val", "test"):
        (source / "images" / split).mkdir(parents=True)
        for index in range(8):
            picture = simplejpeg.encode_jpeg(np.zeros((20, 30, 3), np.uint8))
            (source / "images" / split / f"{index}.jpg").write_bytes(picture)
    for split in ("train", "val"):
        (source / "masks" / split).mkdir(parents=True)
        for index in range(8):
            mask = Image.fromarray(np.zeros((20, 30), np.uint8))
            mask.save(source / "masks" / split / f"{index}.png")
    (source / "classes.yaml").write_text("names: [road, car]\n")
    prepare("folder", source, tmp_path / "data/mine", workers=1)
    settings = stage("one", "segmentation", "mine")
    plan_stage(StageSettings.model_validate(settings), tmp_path / "runs", tmp_path / "data")
    settings["data"][part]["split"] = "test"
    with pytest.raises(RunError, match="data: mine/test has no labels to train on or to compare"):
        plan_stage(StageSettings.model_validate(settings), tmp_path / "runs", tmp_path / "data")
