"""A broken picture in a run of two workers: counted once an epoch over both, and logged by one."""

import hashlib
import shutil
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from data_pipeline.dataset import open_dataset
from data_pipeline.manifest import read_manifest, write_manifest
from orchestrator.runs.run import read_journal
from tests.cluster.conftest import Atrous, only_run
from tests.unit.orchestrator.jobs import stage_job, write

pytestmark = pytest.mark.cluster
DATASET = "tiny-imagenet"  # 48 samples, six steps of eight an epoch


def break_picture(root: Path, index: int) -> str:
    """Cut a JPEG's pixels off, as if it had been prepared so: its checksum is right. Its key."""
    sample = open_dataset(root, DATASET, "train").locate(index)
    manifest = read_manifest(root / DATASET / "train")
    tables = [manifest.read_rows(number) for number in range(len(manifest.shards))]
    rows = tables[sample.shard].to_pylist()
    row = rows[sample.row]
    path = root / DATASET / "train" / manifest.shards[sample.shard].name
    content = bytearray(path.read_bytes())
    start, size = row["image_offset"], row["image_size"]
    content[start + size // 2 : start + size] = bytes(size - size // 2)
    path.write_bytes(content)
    row["crc32"] = zlib.crc32(content[row["offset"] : row["offset"] + row["size"]])
    tables[sample.shard] = pa.Table.from_pylist(rows, schema=tables[sample.shard].schema)
    shards = list(manifest.shards)
    digest = hashlib.sha256(content).hexdigest()
    shards[sample.shard] = replace(shards[sample.shard], sha256=digest)
    write_manifest(root / DATASET / "train", replace(manifest, shards=tuple(shards)), tables)
    return str(row["key"])


def test_two_workers_count_a_broken_picture_once_an_epoch(
    tiny_data: Path, tmp_path: Path, atrous: Atrous, environment: dict[str, str]
) -> None:
    shutil.copytree(tiny_data / DATASET, tmp_path / "data" / DATASET)
    key = break_picture(tmp_path / "data", 17)
    job = stage_job(tmp_path / "data", steps=18, evaluate={"every": 18}, cluster={"workers": 2})
    job["data"] |= {"on_bad_sample": "skip"}
    with tempfile.TemporaryDirectory(prefix="ray-") as logs:  # short: Ray's sockets are in it too
        environment["RAY_TMPDIR"] = logs
        done = atrous("run", write(tmp_path / "job.yaml", job))
        assert done.returncode == 0, done.stdout + done.stderr
        said = [
            line
            for file in Path(logs).glob("ray/session_2*/logs/worker-*.err")
            for line in file.read_text(errors="replace").splitlines()
            if "bad sample" in line
        ]
    run = only_run(tmp_path / "storage")
    assert run is not None
    counts = {r["step"]: r["metrics"]["train/bad_samples"] for r in read_journal(run.journal)}
    assert {step: counts[step] for step in (6, 12, 18)} == {6: 1, 12: 2, 18: 3}
    assert said
    assert all(key in line and "cannot decode" in line for line in said), said
    assert len(said) <= 2  # by each worker that met it, once
