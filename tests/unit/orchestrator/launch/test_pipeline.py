"""A pipeline in this process, end to end: stages, tracking, lineage, doing nothing twice."""

import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
from rich.console import Console
from typer.testing import CliRunner

from orchestrator.cli import main as cli
from orchestrator.errors import StageFailed
from orchestrator.files import read_json
from orchestrator.job.config import Job
from orchestrator.job.job_file import load_job
from orchestrator.launch.pipeline import run_job
from orchestrator.launch.preflight import preflight
from orchestrator.launch.report import Display, result_table
from orchestrator.launch.stage import StageResult
from orchestrator.runs.lineage import find_checkpoint, trace
from orchestrator.runs.run import Run, all_runs, read_journal
from tests.unit.orchestrator.jobs import pipeline_job, write


@dataclass(frozen=True)
class Ran:
    job_file: Path
    storage: Path
    results: dict[str, StageResult]
    output: str


def run(job: Job) -> tuple[list[StageResult], str]:
    stream = io.StringIO()
    console = Console(file=stream, width=200)
    with Display(console) as display:
        results = run_job(job, display)
    for part in result_table(results, Path(job.storage)):
        console.print(part)
    return results, stream.getvalue()


@pytest.fixture(scope="module")
def ran(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    place = tmp_path_factory.mktemp("pipeline")
    job = pipeline_job(tiny_data) | {"storage": str(place / "storage")}
    job_file = write(place / "job.yaml", job)
    results, output = run(load_job(job_file))
    return Ran(job_file, place / "storage", {result.name: result for result in results}, output)


def test_stages_run_in_the_order_of_their_links(ran: Ran) -> None:
    created = [run.read()["stage"] for run in reversed(all_runs(ran.storage))]
    assert created == ["tiny-imagenet", "tiny-coco", "tiny-voc"]
    coco, voc = ran.results["tiny-coco"], ran.results["tiny-voc"]
    assert coco.start is not None
    assert coco.start.take == "backbone"
    assert coco.start.digest == ran.results["tiny-imagenet"].checkpoint.digest
    assert voc.start is not None
    assert voc.start.take == "network"
    hand_over = voc.run.read()["hand_over"]
    assert (hand_over["left_out"], hand_over["fresh"]) == ([], [])


def test_the_table_tells_metric_origin_checkpoint_and_mlflow(ran: Ran) -> None:
    assert "val/miou" in ran.output
    assert "ui --backend-store-uri" in ran.output
    for result in ran.results.values():
        assert result.checkpoint.digest in ran.output
        assert str(result.checkpoint.path.relative_to(ran.storage)) in ran.output
        assert _run_id(result) in ran.output
        if result.start:
            assert f"@ {result.start.digest[:12]}" in ran.output


def test_a_second_run_does_nothing_again(ran: Ran) -> None:
    results, output = run(load_job(ran.job_file))
    assert all(result.reused for result in results)
    assert output.count("was done before, not run again") == 3
    assert [run.read()["attempts"] for run in all_runs(ran.storage)] == [1, 1, 1]


def test_a_changed_stage_runs_alone(ran: Ran) -> None:
    job = load_job(ran.job_file, ("stages.tiny-voc.optimizer.lr=0.01",))
    results, _ = run(job)
    assert [result.reused for result in results] == [False, True, True]


def test_a_pipeline_hands_over_its_own_results_not_the_newest(ran: Ran) -> None:
    changed, _ = run(load_job(ran.job_file, ("stages.tiny-coco.seed=5",)))
    assert [result.reused for result in changed] == [False, False, True]
    results, _ = run(load_job(ran.job_file))
    assert all(result.reused for result in results)
    assert results[0].checkpoint.digest == ran.results["tiny-voc"].checkpoint.digest


def test_a_start_by_mlflows_name_is_the_same_run(ran: Ran) -> None:
    coco = ran.results["tiny-coco"]
    client = mlflow.MlflowClient(f"sqlite:///{ran.storage / 'mlflow.db'}")
    own = next(
        version
        for version in client.search_model_versions("name = 'tiny-coco'")
        if version.run_id == _run_id(coco)
    )
    for place in (f"models:/tiny-coco/{own.version}", f"runs:/{_run_id(coco)}"):
        job = load_job(ran.job_file, (f"stages.tiny-voc.start_from={place}",))
        report = preflight(job)
        assert report.errors == []
        assert "tiny-voc" in report.done
    job = load_job(ran.job_file, ("stages.tiny-voc.start_from=models:/tiny-coco@gone",))
    (error,) = preflight(job).errors
    assert error.where == "tiny-voc"
    assert "start_from: models:/tiny-coco@gone: MLflow at" in error.text


def test_a_moved_storage_keeps_its_lineage(ran: Ran, tmp_path: Path) -> None:
    shutil.copytree(ran.storage / "runs", tmp_path / "moved" / "runs")
    link = trace(find_checkpoint(ran.results["tiny-voc"].run.path.name, tmp_path / "moved"))
    assert link.parent is not None
    assert link.parent.checkpoint.path.is_relative_to(tmp_path / "moved")


def test_a_dead_tracking_server_delays_what_it_shows_only(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = pipeline_job(tiny_data) | {"storage": str(tmp_path / "storage")}
    job["stages"] = job["stages"][2:]
    path = write(tmp_path / "job.yaml", job)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    results, output = run(load_job(path))
    assert not results[0].reused
    assert "not yet sent" in output
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    results, output = run(load_job(path))
    assert results[0].reused
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'storage' / 'mlflow.db'}")
    history = client.get_metric_history(_run_id(results[0]), "train/loss")
    assert [point.step for point in history] == [1, 2, 3, 4, 5, 6]


def test_mlflow_has_the_runs_linked(ran: Ran) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{ran.storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("atrous")
    assert experiment is not None
    runs = {
        run.info.run_id: run
        for run in client.search_runs([experiment.experiment_id], max_results=50)
    }
    ids = {name: _run_id(result) for name, result in ran.results.items()}
    voc = runs[ids["tiny-voc"]]
    parent = runs[voc.data.tags["mlflow.parentRunId"]]
    assert parent.info.run_name == "tiny"
    assert runs[ids["tiny-imagenet"]].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert voc.info.status == "FINISHED"
    assert voc.data.tags["atrous.start_from.run_id"] == ids["tiny-coco"]
    start = ran.results["tiny-voc"].start
    assert start is not None
    assert voc.data.tags["atrous.start_from.digest"] == start.digest
    assert voc.data.params["optimizer.lr"] == "0.05"
    assert len(parent.data.params) > 100  # more than a tracking server takes in one request
    assert parent.data.params["stages.tiny-coco.optimizer.lr"] == "0.05"
    inputs = {item.dataset.name: item.dataset.digest for item in voc.inputs.dataset_inputs}
    data = ran.results["tiny-voc"].run.read()["data"]
    assert inputs == {
        "tiny-voc/train": data["train"]["digest"][:32],
        "tiny-voc/val": data["val"]["digest"][:32],
    }


def _run_id(result: StageResult) -> str:
    record = read_json(result.run.tracking)
    assert record is not None
    return record["run_id"]


def test_mlflow_has_every_point_once(ran: Ran) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{ran.storage / 'mlflow.db'}")
    result = ran.results["tiny-voc"]
    expected: dict[str, list[tuple[int, float]]] = {}
    for record in read_journal(result.run.journal):
        for key, value in record["metrics"].items():
            expected.setdefault(key, []).append((record["step"], value))
    for key in ("train/loss", "train/lr", "val/miou"):
        history = client.get_metric_history(_run_id(result), key)
        assert sorted((point.step, point.value) for point in history) == expected[key]


def test_mlflow_and_the_records_have_the_bill(ran: Ran) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{ran.storage / 'mlflow.db'}")
    total = 0.0
    for result in ran.results.values():
        bill = result.run.read()["bill"]
        metrics = client.get_run(_run_id(result)).data.metrics
        assert metrics["bill/goodput"] == bill["goodput"]
        assert metrics["bill/lost_seconds.start-up"] == bill["lost_seconds"]["start-up"]
        assert "bill/money" not in metrics
        total += bill["cpu_hours"]
    records = [Run(path).read() for path in (ran.storage / "pipelines").iterdir()]
    first = min(records, key=lambda record: record["created"])  # other tests changed stages
    assert first["bill"]["cpu_hours"] == pytest.approx(total)
    assert "The bill" in ran.output


def test_mlflow_has_a_model_for_each_kept_checkpoint(ran: Ran) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{ran.storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("atrous")
    assert experiment is not None
    result = ran.results["tiny-voc"]
    models = [
        model
        for model in client.search_logged_models([experiment.experiment_id])
        if model.source_run_id == _run_id(result)
    ]
    paths = {model.tags["atrous.checkpoint"] for model in models}
    kept = {path.relative_to(ran.storage) for path in result.run.checkpoints.iterdir()}
    assert paths == {str(path) for path in kept}
    newest = next(m for m in models if m.tags["atrous.digest"] == result.checkpoint.digest)
    metrics = {metric.key: metric.value for metric in newest.metrics or []}
    assert metrics["val/miou"] == result.metrics["val/miou"]
    versions = client.search_model_versions("name = 'tiny-voc'")
    own = next(version for version in versions if version.run_id == _run_id(result))
    assert own.tags["atrous.digest"] == result.checkpoint.digest
    (picture,) = client.list_artifacts(_run_id(result), "predictions")
    assert picture.path == "predictions/val.png"


def test_lineage_leads_back_to_raw_data(ran: Ran) -> None:
    target = ran.results["tiny-voc"]
    for name in ("tiny-voc", str(target.checkpoint.path), target.run.path.name):
        found = find_checkpoint(name, ran.storage)
        assert found.state["stage"] == "tiny-voc"
    link = trace(target.checkpoint)
    chain = []
    step: Any = link
    while step:
        chain.append(step.checkpoint.state["stage"])
        step = step.parent
    assert chain == ["tiny-voc", "tiny-coco", "tiny-imagenet"]
    shown = CliRunner().invoke(
        cli.app, ["lineage", str(target.checkpoint.path), "--storage", str(ran.storage)]
    )
    assert shown.exit_code == 0
    text = shown.output
    for result in ran.results.values():
        assert result.checkpoint.digest in text
        assert result.run.read()["data"]["train"]["digest"] in text
    assert "raw data: imagenet layout in" in text
    assert "started from scratch" in text


def test_the_rest_still_runs_when_a_stage_fails(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And why is told, though the disk is too full for the pipeline's record of it."""
    update = Run.update

    def full(self: Run, **fields: Any) -> None:
        if self.path.parent.name == "pipelines" and fields["status"] == "failed":
            raise OSError("No space left on device")
        update(self, **fields)

    monkeypatch.setattr(Run, "update", full)
    job = pipeline_job(tiny_data) | {"storage": str(tmp_path / "storage")}
    voc, coco, imagenet = job["stages"]
    coco["start_from"] = {"checkpoint": "tiny-imagenet", "take": "network"}
    other = imagenet | {"name": "other", "steps": 2}
    job["stages"] = [voc, coco, imagenet, other]
    with pytest.raises(StageFailed) as error:
        run(load_job(write(tmp_path / "job.yaml", job)))
    assert "tiny-coco:" in str(error.value)
    assert "tiny-voc: not run: tiny-coco failed" in str(error.value)
    finished = {r.read()["stage"] for r in all_runs(tmp_path / "storage") if r.finished}
    assert finished == {"tiny-imagenet", "other"}
