"""`atrous data inspect` and `atrous data verify` as commands."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipeline.formats.synthetic import synthesize
from data_pipeline.prepare import prepare
from orchestrator.cli.main import app


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn data set in the layout of VOC, prepared."""
    root = tmp_path_factory.mktemp("drawn")
    counts = {"voc/train": 6, "voc/val": 3}
    source = synthesize(root / "raw", layouts=["voc"], counts=counts, size=48)["voc"]
    prepare("voc", source, root / "voc", splits=["train", "val"], workers=1)
    return root / "voc"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    return result.exit_code, result.output


def test_inspect_prints_and_writes(place: Path, tmp_path: Path) -> None:
    status, text = run("inspect", place, "--out", tmp_path)
    assert status == 0
    assert "background" in text
    assert "warning: train: classes never present:" in text
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"contact-sheet-train.png", "contact-sheet-val.png", "index.html"}


def test_inspect_as_json(place: Path) -> None:
    status, text = run("inspect", place / "train", "--limit", 4, "--json")
    assert status == 0
    found = json.loads(text)
    (split,) = found["splits"]
    assert (split["split"], split["samples"], split["looked_at"]) == ("train", 6, 4)
    assert len(split["classes"]) == 21
    assert found["warnings"]


def test_verify_says_what_is_damaged(place: Path) -> None:
    assert run("verify", place) == (
        0,
        "train: 1 shards, 6 samples: all intact\nval: 1 shards, 3 samples: all intact\n",
    )
    shard = place / "val/shard-000000.tar"
    data = shard.read_bytes()
    try:
        shard.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
        status, text = run("verify", place)
    finally:
        shard.write_bytes(data)
    assert status == 1
    assert "val/shard-000000.tar: sha256 " in text
    assert "val/shard-000000.tar: sample " in text
    assert "train: 1 shards, 6 samples: all intact" in text
    assert "val: 1 shards, 3 samples: 1 damaged" in text
