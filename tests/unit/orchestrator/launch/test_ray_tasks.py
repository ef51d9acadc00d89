"""Where the tasks of preparation run; on a real cluster: tests/cluster/test_preparation.py."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from data_pipeline.errors import DataError
from data_pipeline.prepare import prepare
from orchestrator.errors import RunError
from orchestrator.launch.ray_tasks import on_cluster


def test_there_is_a_cluster_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_cluster() is None
    assert on_cluster("127.0.0.1:1") is not None
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert on_cluster() is not None


def test_a_cluster_that_does_not_answer_is_said_at_once(tmp_path: Path) -> None:
    picture = tmp_path / "raw/train/ant/1.JPEG"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(simplejpeg.encode_jpeg(np.zeros((8, 9, 3), np.uint8)))
    with pytest.raises(RunError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 .*--address"):
        prepare("imagenet", tmp_path / "raw", tmp_path / "out", workers=on_cluster("127.0.0.1:1"))
    # What is there already, or cannot be, needs no cluster.
    with pytest.raises(DataError, match="no such folder"):
        prepare("voc", tmp_path / "none", tmp_path / "out", workers=on_cluster("127.0.0.1:1"))


def test_without_a_cluster_ray_is_not_imported() -> None:
    code = (
        "import sys; from orchestrator.launch.ray_tasks import on_cluster; "
        "on_cluster(); print('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
