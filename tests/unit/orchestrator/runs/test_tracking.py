"""What MLflow shows of a run: all of it, once, whatever was killed in between."""

import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest

from orchestrator.files import read_json, write_json
from orchestrator.runs import registry, tracking
from orchestrator.runs.run import truncate_journal
from orchestrator.runs.tracking import Tracker, is_tracked
from tests.unit.orchestrator.written_run import WrittenRun


def show(storage: Path, written: WrittenRun) -> None:
    Tracker(storage, written.run).close()


def client_of(storage: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")


def run_id(written: WrittenRun) -> str:
    return read_json(written.run.tracking)["run_id"]  # type: ignore[index]


def points(client: Any, run: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run, key)]


def test_points_are_sent_once_a_checkpoint_covers_them(storage: Path) -> None:
    written, client = WrittenRun(storage), client_of(storage)
    written.log(1, 2, 3)
    show(storage, written)
    run = run_id(written)
    assert points(client, run, "train/loss") == []
    assert client.get_run(run).data.tags["atrous.progress"] == "step 3 of 6, train/loss 0.3333"
    written.save(2)
    show(storage, written)
    assert points(client, run, "train/loss") == [(1, 1.0), (2, 0.5)]


def test_what_a_run_goes_back_behind_is_superseded(storage: Path) -> None:
    written, client = WrittenRun(storage), client_of(storage)
    written.log(1, 2)
    written.save(2)
    written.log(3, 4, loss=100.0)  # not to stay
    show(storage, written)
    truncate_journal(written.run.journal, 2)
    written.log(3, 4)
    written.finish(miou=0.25)
    show(storage, written)
    assert points(client, run_id(written), "train/loss") == [(n, 1 / n) for n in range(1, 7)]
    assert points(client, run_id(written), "val/miou") == [(6, 0.25)]
    info, record = client.get_run(run_id(written)).info, written.run.read()
    assert info.status == "FINISHED"
    assert info.start_time == int(record["created"] * 1000)
    assert info.end_time == int(record["updated"] * 1000)
    assert is_tracked(written.run)


def test_names_of_metrics_are_what_mlflow_takes(storage: Path) -> None:
    written = WrittenRun(storage)
    written.finish(miou=0.25)
    show(storage, written)
    assert points(client_of(storage), run_id(written), "val/iou/a _b_") == [(6, 0.25)]


def test_pictures_and_tables_are_artifacts(storage: Path) -> None:
    written, client = WrittenRun(storage), client_of(storage)
    picture = written.run.artifacts / "predictions" / "step-00000006.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"a picture")
    written.finish()
    show(storage, written)
    run = run_id(written)
    found = client.list_artifacts(run, "predictions")
    assert [item.path for item in found] == ["predictions/step-00000006.png"]
    assert {item.path for item in client.list_artifacts(run)} == {"job.yaml", "predictions"}


def test_a_result_is_a_registered_version(storage: Path) -> None:
    written, client = WrittenRun(storage), client_of(storage)
    checkpoint = written.finish(miou=0.5)
    show(storage, written)
    version = client.get_model_version_by_alias("voc", "best")
    assert version.run_id == run_id(written)
    assert version.tags["atrous.digest"] == checkpoint.digest
    place = checkpoint.path.relative_to(storage).as_posix()
    assert version.tags["atrous.checkpoint"] == place
    assert client.get_run(version.run_id).data.tags["atrous.checkpoint"] == place
    (model,) = client.search_logged_models([client.get_run(run_id(written)).info.experiment_id])
    assert model.tags["mlflow.modelVersions"] == '[{"name": "voc", "version": "1"}]'
    assert model.artifact_location == version.source
    assert model.status == "READY"


def test_best_is_the_best_of_those_with_the_same_validation_data(storage: Path) -> None:
    client = client_of(storage)
    for fingerprint, miou, best in (("a", 0.5, 1), ("b", 0.4, 1), ("c", 0.5, 3)):
        written = WrittenRun(storage, fingerprint=fingerprint * 64)
        written.finish(miou)
        show(storage, written)
        assert int(client.get_model_version_by_alias("voc", "best").version) == best
    other = WrittenRun(storage, fingerprint="d" * 64)
    data = other.run.read()["data"]
    other.run.update(data=data | {"val": data["val"] | {"digest": "3" * 64}})
    other.finish(miou=0.1)
    show(storage, other)
    assert int(client.get_model_version_by_alias("voc", "best").version) == 4


def test_a_replay_changes_nothing(storage: Path) -> None:
    written, client = WrittenRun(storage), client_of(storage)
    written.log(1, 2)
    written.save(2)
    written.finish()
    show(storage, written)
    before = everything(client, run_id(written))
    record = read_json(written.run.tracking)
    assert record is not None
    write_json(written.run.tracking, record | {"sent_step": 0, "status": None})
    show(storage, written)
    assert everything(client, run_id(written)) == before
    written.run.tracking.unlink()  # as after a kill before it was written
    show(storage, written)
    assert everything(client, run_id(written)) == before
    assert before["models"] == ["READY", "READY"]


def test_a_moved_storage_goes_on_in_its_own_run(storage: Path, tmp_path: Path) -> None:
    written = WrittenRun(storage)
    written.finish()
    show(storage, written)
    before = everything(client_of(storage), run_id(written))
    moved = tmp_path / "moved"
    shutil.move(storage, moved)
    written.run = type(written.run)(moved / written.run.path.relative_to(storage))
    written.run.update(job=written.run.read()["job"] | {"name": "changed since"})
    show(moved, written)
    assert everything(client_of(moved), run_id(written)) == before


def test_another_database_gets_all_of_it(
    storage: Path, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = WrittenRun(storage)
    written.finish()
    show(storage, written)
    assert is_tracked(written.run)
    before = everything(client_of(storage), run_id(written))["points"]
    other = tmp_path / "other" / "mlflow.db"
    other.parent.mkdir()
    for path in (other, storage / "mlflow.db"):  # another one, then the same begun anew
        shutil.copy(empty_database, path)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        assert not is_tracked(written.run)
        show(storage, written)
        assert is_tracked(written.run)
        assert everything(client_of(path.parent), run_id(written))["points"] == before


def everything(client: Any, run: str) -> dict[str, Any]:
    found = client.get_run(run)
    models = client.search_logged_models([found.info.experiment_id])
    return {
        "run": run,
        "runs": len(client.search_runs([found.info.experiment_id])),
        "status": found.info.status,
        "points": {key: points(client, run, key) for key in found.data.metrics},
        "params": found.data.params,
        "tags": found.data.tags,
        "inputs": [item.dataset.digest for item in found.inputs.dataset_inputs],
        "outputs": sorted(item.model_id for item in found.outputs.model_outputs),
        "models": [model.status for model in models],
        "of models": sorted(
            (metric.key, metric.step, metric.value)
            for model in models
            for metric in model.metrics or ()
        ),
        "versions": [v.version for v in client.search_model_versions("name = 'voc'")],
    }


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


@pytest.mark.parametrize(
    "call",
    [
        "create_run",
        "log_inputs",
        "create_logged_model",
        "finalize_logged_model",
        "log_outputs",
        "create_model_version",
        "set_terminated",
    ],
)
def test_a_kill_anywhere_leaves_nothing_twice_and_nothing_pending(
    storage: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    written, client = WrittenRun(storage), client_of(storage)
    written.log(1, 2)
    written.save(2)
    written.finish(miou=0.5)
    real = getattr(mlflow.MlflowClient, call)

    def die(*arguments: Any, **options: Any) -> Any:
        real(*arguments, **options)
        raise Killed

    monkeypatch.setattr(tracking.threading, "Thread", NoThread)
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, call, die)
        with pytest.raises(Killed):
            Tracker(storage, written.run)._synchronise()
    Tracker(storage, written.run)._synchronise()
    found = everything(client, run_id(written))
    losses = [(1, 1.0), (2, 0.5), (5, 0.2), (6, 1 / 6)]
    assert found["runs"] == 1
    assert found["points"]["train/loss"] == losses
    assert found["points"]["val/miou"] == [(6, 0.5)]
    assert found["models"] == ["READY", "READY"]
    assert len(found["outputs"]) == 2
    assert found["of models"] == [("val/iou/a _b_", 6, 0.5), ("val/miou", 6, 0.5)]
    assert found["inputs"] == ["1" * 32, "2" * 32]
    assert found["versions"] == [1]
    assert client.get_model_version_by_alias("voc", "best").version == 1
    assert found["status"] == "FINISHED"


class NoThread:
    """The test does what the thread would."""

    def __init__(self, **_: Any) -> None: ...

    def start(self) -> None: ...


def test_a_pending_model_whose_checkpoint_is_gone_is_deleted(storage: Path) -> None:
    written, client = WrittenRun(storage), client_of(storage)
    show(storage, written)
    experiment = client.get_run(run_id(written)).info.experiment_id
    left = client.create_logged_model(
        experiment, "voc-step-4", run_id(written), {registry.CHECKPOINT: "runs/gone"}
    )
    written.finish()
    show(storage, written)
    (model,) = client.search_logged_models([experiment])
    assert model.model_id != left.model_id


def test_a_name_that_the_registry_refuses_costs_the_version_only(
    storage: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise mlflow.MlflowException.invalid_parameter_value("write catalog.schema.name")

    monkeypatch.setattr(mlflow.MlflowClient, "create_registered_model", refuse)
    written = WrittenRun(storage)
    written.finish()
    show(storage, written)
    assert is_tracked(written.run)
    assert "no version in the model registry: write catalog.schema.name" in caplog.text
