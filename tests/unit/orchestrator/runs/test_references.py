"""start_from by names of MLflow and by places: one digest, whatever the spelling."""

import shutil
from pathlib import Path

import pytest

from orchestrator.bucket import storage_path
from orchestrator.errors import CheckpointError
from orchestrator.files import read_json
from orchestrator.job.config import StageSettings
from orchestrator.runs.checkpoint import Checkpoint, delete_checkpoint
from orchestrator.runs.garbage import find_garbage
from orchestrator.runs.lineage import as_lines, find_checkpoint, trace
from orchestrator.runs.references import find_reference
from orchestrator.runs.start import Start, read_shapes, resolve_start
from orchestrator.runs.tracking import Tracker
from tests.object_store import bucket, store
from tests.unit.orchestrator.jobs import stage
from tests.unit.orchestrator.written_run import WrittenRun

__all__ = ["bucket", "store"]  # fixtures


def written(storage: Path, fingerprint: str = "a", miou: float = 0.5) -> tuple[str, Checkpoint]:
    """A finished run that MLflow shows: its id and result."""
    run = WrittenRun(storage, fingerprint=fingerprint * 64)
    checkpoint = run.finish(miou)
    Tracker(storage, run.run).close()
    return (read_json(run.run.tracking) or {})["run_id"], checkpoint


def settings(place: str, task: str = "segmentation") -> StageSettings:
    return StageSettings.model_validate(stage("next", task, "tiny-voc", start_from=place))


def start(place: str, storage: Path) -> Start:
    found = resolve_start(settings(place), storage, {})
    assert found is not None
    return found


def test_every_spelling_is_one_digest(storage: Path) -> None:
    run_id, checkpoint = written(storage)
    for place, lasting in (
        ("voc", None),
        (str(checkpoint.path), None),
        (str(checkpoint.path.parent), None),
        ("models:/voc@best", "models:/voc/1"),
        ("models:/voc/1", "models:/voc/1"),
        (f"runs:/{run_id}", f"runs:/{run_id}/step-00000006"),
        (f"runs:/{run_id}/checkpoints/step-00000006", f"runs:/{run_id}/step-00000006"),
    ):
        found = start(place, storage)
        assert (found.digest, found.take) == (checkpoint.digest, "network")
        assert found.reference == lasting
        assert Start.from_json(found.as_json()) == found
        assert found.stage == "voc"


def test_the_alias_moves_and_the_recorded_name_does_not(storage: Path) -> None:
    _, first = written(storage)
    before = start("models:/voc@best", storage)
    _, better = written(storage, "b", miou=0.9)
    after = start("models:/voc@best", storage)
    assert (before.digest, after.digest) == (first.digest, better.digest)
    assert before.reference is not None
    assert find_reference(before.reference, storage)[0].digest == first.digest


def test_lineage_and_mlflow_tell_the_reference(storage: Path) -> None:
    run_id, checkpoint = written(storage)
    found = start("models:/voc@best", storage)
    child = WrittenRun(storage, "next", "c" * 64)
    child.run.update(start=found.as_json())
    Tracker(storage, child.run).close()
    from tests.unit.orchestrator.runs.test_tracking import client_of
    from tests.unit.orchestrator.runs.test_tracking import run_id as id_of

    tags = client_of(storage).get_run(id_of(child)).data.tags
    assert tags["atrous.start_from.reference"] == "models:/voc/1"
    assert tags["atrous.start_from.digest"] == checkpoint.digest
    assert tags["atrous.start_from.run_id"] == run_id
    assert find_checkpoint("models:/voc@best", storage).path == checkpoint.path
    assert f"MLflow run {run_id}" in "\n".join(as_lines(trace(checkpoint)))


def test_a_copied_storage_is_found_by_the_server_of_the_first(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, checkpoint = written(storage)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{storage / 'mlflow.db'}")
    copy = tmp_path / "copy"
    shutil.copytree(storage / "runs", copy / "runs")
    inside = start("models:/voc@best", copy)
    assert storage_path(inside.weights).is_relative_to(copy)
    assert storage_path(start(f"runs:/{run_id}", copy).weights).is_relative_to(copy)
    # Another storage that has none of it takes it from where it is.
    assert start("models:/voc@best", tmp_path / "other").weights == str(checkpoint.result)
    assert start(f"runs:/{run_id}", tmp_path / "other").weights == str(checkpoint.result)


def test_a_run_that_was_done_anew_is_found_by_its_digest(storage: Path) -> None:
    _, checkpoint = written(storage)
    WrittenRun(storage, fingerprint="a" * 64).run.set_aside()
    other = WrittenRun(storage, fingerprint="a" * 64)
    other._number = -1.0  # other weights at the place that the version names
    other.finish()
    found = start("models:/voc/1", storage)
    assert found.digest == checkpoint.digest
    assert not Path(found.weights).is_relative_to(other.run.path)


def test_what_cannot_be_found_says_why(storage: Path) -> None:
    _, checkpoint = written(storage)
    for place, message in (
        ("models:/voc", "write models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/voc@gone", "alias gone not found.*; registered are voc@best"),
        ("models:/vox@best", "vox not found; registered are voc@best"),
        ("models:/voc/7", "version=7.* not found"),
        ("runs:/abc", "write runs:/RUN_ID or"),
        (f"runs:/{'0' * 32}", "Run with id=0+ not found"),
    ):
        with pytest.raises(CheckpointError, match=f"start_from: {place}: .*{message}"):
            start(place, storage)
    best = settings("models:/voc@best").model_copy(
        update={
            "start_from": settings("voc").start_from.model_copy(  # type: ignore[union-attr]
                update={"checkpoint": "models:/voc@best", "which": "best"}
            )
        }
    )
    with pytest.raises(CheckpointError, match="which: best: models:/voc@best is one checkpoint"):
        resolve_start(best, storage, {})
    delete_checkpoint(checkpoint.path)
    with pytest.raises(CheckpointError, match=r"models:/voc/1: its checkpoint, .* is gone or dam"):
        start("models:/voc@best", storage)


def test_a_damaged_checkpoint_is_not_taken(storage: Path) -> None:
    _, checkpoint = written(storage)
    content = bytearray(checkpoint.result.read_bytes())
    content[-1] ^= 1
    checkpoint.result.write_bytes(content)
    with pytest.raises(CheckpointError, match="is gone or damaged"):
        start("models:/voc@best", storage)


def test_a_model_of_others_is_refused(storage: Path) -> None:
    from tests.unit.orchestrator.runs.test_tracking import client_of

    client = client_of(storage)
    client.create_registered_model("theirs")
    client.create_model_version("theirs", "s3://elsewhere/model")
    with pytest.raises(CheckpointError, match="models:/theirs/1 is no result of a stage"):
        start("models:/theirs/1", storage)


def test_without_mlflow_the_storage_alone_knows_its_runs(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, checkpoint = written(storage)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert start(f"runs:/{run_id}", storage).digest == checkpoint.digest
    with pytest.raises(CheckpointError, match=r"MLflow at http://127\.0\.0\.1:9 does not"):
        start("models:/voc@best", storage)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(CheckpointError, match=r"mlflow.db does not exist yet; set MLFLOW_TRACK"):
        start("models:/voc@best", tmp_path / "empty")


def test_what_a_version_points_to_is_no_garbage(storage: Path) -> None:
    _, checkpoint = written(storage)
    assert checkpoint.path not in [one.path for one in find_garbage(storage, older_than=0)]


def test_a_checkpoint_in_a_bucket(
    storage: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{storage / 'mlflow.db'}")
    place = storage_path(f"s3://{bucket}")
    run = WrittenRun(place)
    run.log(1, 2)
    checkpoint = run.finish()
    for spelled in (str(checkpoint.path), f"{checkpoint.path.parent}/"):
        found = start(spelled, storage)
        assert (found.digest, found.take) == (checkpoint.digest, "network")
        assert read_shapes(found.file()) == {"backbone.w": (2,)}
    Tracker(place, run.run).close()
    for asking in (place, storage):
        assert start("models:/voc@best", asking).weights == str(checkpoint.result)
