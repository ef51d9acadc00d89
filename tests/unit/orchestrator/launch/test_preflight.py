"""Every kind of fault that can be known beforehand is found, and told with its cure."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_pipeline.dataset import open_dataset
from orchestrator.cli.main import app
from orchestrator.job.config import Job, PipelineJob, StageJob
from orchestrator.launch import forecast, machine, preflight
from orchestrator.launch.forecast import find_device
from orchestrator.launch.plan_view import explaining_lines, plan_tables
from orchestrator.launch.preflight import Report
from tests.unit.orchestrator.jobs import MODEL, SEGMENTER, pipeline_job, stage, write

Usage = namedtuple("Usage", "total used free")
ROOM = 2**40


@pytest.fixture(autouse=True)
def a_roomy_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(ROOM, 0, ROOM))
    monkeypatch.setenv("ATROUS_STORAGE", str(tmp_path / "storage"))
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


PARTS = ("backbone", "aspp", "decoder", "logits")


def check(job: Job) -> Report:
    return preflight.preflight(job)


def segmentation(root: Path, **changes: Any) -> StageJob:
    values = stage("tiny", "segmentation", "tiny-voc") | changes
    # What a stage of six steps is warned of, and rightly.
    values["model"] = values["model"] | {"batch_norm": {"momentum": 0.5}}
    values["model"] |= changes.get("model", {})
    return StageJob(kind="stage", data_root=str(root), **values)


def texts(report: Report, level: str) -> list[str]:
    return [one.text for one in report.findings if one.level == level]


def data_of(**changes: Any) -> dict[str, Any]:
    values = stage("tiny", "segmentation", "tiny-voc")["data"]
    for name, change in changes.items():
        values[name] |= change
    return values


def test_a_sound_job_has_no_errors_and_a_price(tiny_data: Path) -> None:
    cluster = {"workers": 0, "price_per_gpu_hour": 2.5}
    report = check(segmentation(tiny_data, global_batch=16, steps=7, cluster=cluster))
    assert report.findings == []
    (found,) = report.forecasts
    assert found.steps == 7
    assert found.hours > 0
    assert found.memory > found.checkpoint > 0
    assert (found.gpu_hours, found.money) == (0, 0)  # it asks for no GPU


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": data_of(train={"dataset": "tiny-vok"})}, "no prepared data set"),
        ({"data": data_of(train={"split": "trainagu"})}, "no prepared data set"),
        ({"task": "classification", "model": MODEL}, "is a data set of segmentation"),
        ({"global_batch": 4000}, "do not fill a global batch of 4000"),
        ({"loss": {"class_weights": {"persn": 2}}}, "did you mean 'person'?"),
        ({"data": data_of(val={"crop": 33})}, "is smaller than the largest image"),
        ({"data": data_of(val={"dataset": "tiny-imagenet"})}, "is a data set of classification"),
        ({"start_from": "pretrain-coco"}, "no finished run of it"),
        ({"start_from": "./nowhere/step-1"}, "holds no valid checkpoint"),
        ({"start_from": "weights.pth"}, "weights.pth"),
        ({"optimizer": {"lr": 1, "lr_multipliers": {"bakbone": 0.1}}}, "bakbone"),
        (
            {"optimizer": {"lr": 1, "lr_multipliers": dict.fromkeys(PARTS, 0)}},
            "so nothing is trained; give one of them more than 0",
        ),
        ({"global_batch": 1}, "batch normalisation"),
        ({"precision": "tf32"}, "precision: tf32 is of GPUs"),
        ({"cluster": {"workers": 0, "gpus_per_worker": 1}}, "1 worker of 1 GPU (room for 0): tiny"),
        (
            {"cluster": {"workers": 2, "gpus_per_worker": 1}},
            "2 workers of 1 CPU and 1 GPU (room for 0): tiny",
        ),
        ({"model": SEGMENTER | {"backbone": "timm:resnot18"}}, "resnot18"),
    ],
)
def test_errors(tiny_data: Path, changes: dict[str, Any], message: str) -> None:
    report = check(segmentation(tiny_data, **changes))
    assert any(message in text for text in texts(report, "error")), report.findings


def test_class_weights_that_are_all_0(tiny_data: Path) -> None:
    *others, last = open_dataset(str(tiny_data), "tiny-voc", "train").manifest.class_names
    zeros = dict.fromkeys(others, 0.0)
    assert check(segmentation(tiny_data, loss={"class_weights": zeros})).errors == []
    report = check(segmentation(tiny_data, loss={"class_weights": zeros | {last: 0.0}}))
    (error,) = report.errors
    assert "loss.class_weights: all 21 classes have the weight 0" in error.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": {"every": 100}}, "evaluate.every: 100 is longer than the training"),
        ({"checkpoint": {"every": "900 epochs"}}, "a failure costs all of it"),
        ({"schedule": {"name": "poly", "warmup": 50}}, "the rate never gets to lr"),
        ({"schedule": {"name": "steps", "milestones": [3, 70]}}, "[70] lie after the end"),
        ({"log_every": 50}, "one line is logged"),
        ({"loss": {"hard_pixels": {"fraction": 0.2, "anneal": 99}}}, "fraction is not reached"),
        ({"global_batch": 4}, "sees 4 images at a time"),
        ({"model": {"batch_norm": {"frozen": True}}}, "without start_from"),
        ({"model": {"batch_norm": {"momentum": 0.001}}}, "of their first values in the running"),
        ({"data": data_of(val={"split": "train"})}, "samples that were trained on"),
        ({"optimizer": {"lr": 0.1, "lr_for_batch": 4}}, "the rate is 0.2"),
        ({"data": data_of() | {"prefetch": 10_000_000}}, "lower data.prefetch"),
        ({"data": data_of(train={"block_size": 64})}, "of the 3 batches of an epoch: that hardly"),
        ({"evaluate": {"every": 1, "scales": [2, 4]}}, "of the time goes into evaluation"),
        ({"cluster": {"workers": 0, "hang_after": 1e-9}}, "workers would be taken for hung"),
        ({"steps": 10**15}, "years; is that what you want?"),
    ],
)
def test_warnings(tiny_data: Path, changes: dict[str, Any], message: str) -> None:
    report = check(segmentation(tiny_data, **changes))
    assert any(message in text for text in texts(report, "warning")), report.findings
    assert report.errors == []


def copied(tiny_data: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_data / "tiny-voc", tmp_path / "copy" / "tiny-voc")
    return tmp_path / "copy"


def test_a_missing_and_a_cut_shard(tiny_data: Path, tmp_path: Path) -> None:
    data = copied(tiny_data, tmp_path)
    (shard,) = (data / "tiny-voc/val").glob("*.tar")
    shard.unlink()
    (other,) = (data / "tiny-voc/train").glob("*.tar")
    other.write_bytes(other.read_bytes()[:-512])
    found = " ".join(texts(check(segmentation(data)), "error"))
    assert f"shard {shard.name} is missing" in found
    assert f"shard {other.name} has" in found


def test_a_damaged_manifest(tiny_data: Path, tmp_path: Path) -> None:
    data = copied(tiny_data, tmp_path)
    (data / "tiny-voc/train/manifest.parquet").write_bytes(b"nothing of the kind")
    assert "manifest" in " ".join(texts(check(segmentation(data)), "error"))


def test_a_storage_that_cannot_be_written_to(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    job = segmentation(tiny_data).model_copy(update={"storage": str(tmp_path / "file")})
    assert "cannot be written to" in " ".join(texts(check(job), "error"))


def test_a_full_disk(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(ROOM, ROOM, 1000))
    assert "0.0 GiB free, checkpoints need" in " ".join(
        texts(check(segmentation(tiny_data)), "error")
    )


def test_little_shared_memory(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"/dev/shm": Usage(64 << 20, 0, 64 << 20)}
    monkeypatch.setattr(
        shutil, "disk_usage", lambda place: sizes.get(str(place), Usage(ROOM, 0, ROOM))
    )
    report = check(segmentation(tiny_data, cluster={"workers": 1}))
    assert "/dev/shm has 64 MiB" in " ".join(texts(report, "warning"))


def test_a_tracking_server_that_is_down(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    report = check(segmentation(tiny_data))
    assert "no MLflow server answers at http://127.0.0.1:9" in " ".join(texts(report, "warning"))


def test_a_tracking_address_that_is_none(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "htp://tracking:5000")
    (error,) = check(segmentation(tiny_data)).errors
    assert "MLFLOW_TRACKING_URI: htp:// is nothing that MLflow writes to" in error.text
    for uri in ("postgresql+psycopg2://db/mlflow", "sqlite:////nowhere/mlflow.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert check(segmentation(tiny_data)).errors == []


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"data_root": "s3://bucket/data"}, "data_root"),
        ({"start_from": "s3://bucket/runs/a"}, "tiny"),
        ({"datasets": {"raw": {"format": "voc", "source": "s3://bucket/voc"}}}, "datasets.raw"),
    ],
)
def test_a_store_that_is_away_is_told_at_once(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], where: str
) -> None:
    monkeypatch.setattr(machine, "_HASTE", 0.1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    job = {"kind": "stage", "data_root": str(tiny_data)}
    job |= stage("tiny", "segmentation", "tiny-voc") | changes
    (error,) = check(StageJob.model_validate(job)).errors
    assert error.where == where
    assert error.text.startswith("start_from: ") == ("start_from" in changes)
    assert "Could not connect to the endpoint" in error.text
    assert "tried 1 times" in error.text


def test_no_cluster_at_the_address(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ConnectionError("refused")

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr(machine, "connect", refuse)
    report = check(segmentation(tiny_data))
    assert "no Ray cluster at 127.0.0.1:9 (refused)" in " ".join(texts(report, "error"))


@pytest.mark.parametrize(("part", "level"), [(10, "error"), (2, "warning")])
def test_more_than_the_device_holds(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, part: int, level: str
) -> None:
    cluster = {"workers": 1, "gpus_per_worker": 1, "price_per_gpu_hour": 3}
    (needed,) = check(segmentation(tiny_data, cluster=cluster)).forecasts
    small = forecast.Gpu("TINY", 100, needed.memory / 2**30 / part)
    monkeypatch.setattr(forecast, "GPUS", (small,))
    monkeypatch.setattr(forecast, "_REFERENCE", small)
    report = check(segmentation(tiny_data, cluster=cluster))
    assert any("set micro_batch" in text for text in texts(report, level))
    (found,) = report.forecasts
    assert found.money == pytest.approx(3 * found.hours)


def test_a_checkpoint_at_every_step(tiny_data: Path) -> None:
    many = texts(check(segmentation(tiny_data, steps=5000, checkpoint={"every": 1})), "warning")
    assert any("checkpoint.every: 1 writes 5000 checkpoints" in text for text in many)
    few = texts(check(segmentation(tiny_data, steps=100, checkpoint={"every": 1})), "warning")
    assert not any("checkpoint.every" in text for text in few)


def test_rare_checkpoints(tiny_data: Path) -> None:
    job = segmentation(tiny_data, steps=10**9, checkpoint={"every": 5 * 10**8})
    assert "which a failure would cost" in " ".join(texts(check(job), "warning"))


def test_stages_of_a_pipeline_must_fit_one_another(tiny_data: Path) -> None:
    job = pipeline_job(tiny_data)
    assert check(PipelineJob.model_validate(job)).errors == []
    job["stages"][2]["model"] = MODEL | {"width": 0.03}
    (error,) = check(PipelineJob.model_validate(job)).errors
    assert error.where == "tiny-coco"
    assert "tiny-imagenet does not fit" in error.text


def test_a_slip_in_the_name_of_a_stage_of_the_same_pipeline(tiny_data: Path) -> None:
    job = pipeline_job(tiny_data)
    job["stages"][0]["start_from"] = "tiny-cooc"
    (error,) = check(PipelineJob.model_validate(job)).errors
    assert error.text.startswith("start_from: 'tiny-cooc': no finished run of it")
    assert error.text.endswith("of this job, did you mean 'tiny-coco'?")


def test_sources_of_data_sets(tmp_path: Path) -> None:
    job = pipeline_job(tmp_path / "data") | {
        "datasets": {"tiny-imagenet": {"format": "imagenet", "source": str(tmp_path / "gone")}}
    }
    report = check(PipelineJob.model_validate(job))
    (error,) = (one for one in report.errors if one.where.endswith("tiny-imagenet"))
    assert "gone does not exist" in error.text
    assert [one.stage for one in report.forecasts] == ["tiny-imagenet"]  # by the published size


def one_stage_pipeline(data: Path) -> dict[str, Any]:
    values = segmentation(data).settings.model_dump(mode="json")
    return {"kind": "pipeline", "name": "one", "data_root": str(data), "stages": [values]}


def test_a_preparation_that_was_killed_between_splits_goes_on(
    tiny_data: Path, tmp_path: Path
) -> None:
    data = copied(tiny_data, tmp_path)
    (data / "tiny-voc/val/manifest.parquet").unlink()
    for source, errors in ((tiny_data / "raw/voc", 0), (tmp_path / "gone", 1)):
        datasets = {"tiny-voc": {"format": "voc", "source": str(source)}}
        job = one_stage_pipeline(data) | {"datasets": datasets}
        assert len(check(PipelineJob.model_validate(job)).errors) == errors


def test_shards_of_others_may_have_changed(tiny_data: Path, tmp_path: Path) -> None:
    """The launch indexes them again."""
    data = copied(tiny_data, tmp_path)
    (shard,) = (data / "tiny-voc/train").glob("*.tar")
    shard.write_bytes(shard.read_bytes() + bytes(512))
    job = one_stage_pipeline(data)
    assert len(check(PipelineJob.model_validate(job)).errors) == 1
    contents = {"splits": {"train": "*.tar"}, "task": "segmentation", "classes": 21}
    job["datasets"] = {
        "tiny-voc": {"format": "shards", "source": str(data), "shards": contents},
    }
    assert check(PipelineJob.model_validate(job)).errors == []


def test_what_was_done_costs_nothing(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.launch.stage import open_run, plan_stage, train_stage

    job = segmentation(tiny_data)
    planned = plan_stage(job.settings, Path(job.storage), job.data_directory)
    open_run(planned)
    train_stage(planned)
    report = check(job)
    assert report.done == ["tiny"]
    _, costs = plan_tables(job, report)
    assert "was done" in list(costs.columns[4].cells)


def test_the_command(tiny_data: Path, tmp_path: Path) -> None:
    job = pipeline_job(tiny_data)
    shown = CliRunner().invoke(app, ["plan", str(write(tmp_path / "job.yaml", job))])
    assert shown.exit_code == 0, shown.output
    assert "tiny-coco" in shown.output
    assert "tiny-voc starts from tiny-coco: " in shown.output
    job["stages"][0]["global_batch"] = 4000
    shown = CliRunner().invoke(app, ["plan", str(write(tmp_path / "job.yaml", job))])
    assert shown.exit_code == 1
    assert "tiny-voc: error: " in shown.output


@pytest.mark.parametrize("name", ["NVIDIA-H100", "A100", "Tesla T4"])
def test_gpus_are_recognised(name: str) -> None:
    assert find_device(1, (name,)).name in name


def test_an_unknown_gpu_is_a_guess_that_says_so() -> None:
    assert "no GPU is known here" in find_device(1, ("TPU",)).basis


def test_what_was_done_needs_no_cluster(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A finished job is found on a machine that could not run it."""
    from orchestrator.launch.stage import open_run, plan_stage, train_stage

    job = segmentation(tiny_data)
    planned = plan_stage(job.settings, Path(job.storage), job.data_directory)
    open_run(planned)
    train_stage(planned)
    large = segmentation(tiny_data, cluster={"workers": 1, "cpus_per_worker": 1000})
    assert check(large).errors == []


def test_a_job_whose_data_is_not_there_has_a_price_too(tmp_path: Path) -> None:
    """As the data set is published, which is said."""
    report = check(segmentation(tmp_path, data=data_of(train={"dataset": "voc2012"})))
    assert "data.train: " in " ".join(texts(report, "error"))
    assert report.forecasts == []  # the size of tiny-voc/val is anybody's guess
    both = data_of(train={"dataset": "voc2012"}, val={"dataset": "voc2012"})
    report = check(segmentation(tmp_path, data=both))
    assert [one.steps for one in report.forecasts] == [6]
    assert report.assumed == {"voc2012/train": 1464}


def test_more_workers_take_less_time_and_more_money(tiny_data: Path) -> None:
    gpus = {"workers": [1, 4], "gpus_per_worker": 1, "price_per_gpu_hour": 2}
    job = segmentation(tiny_data, global_batch=16, cluster=gpus)
    report = check(job)
    (found,) = report.forecasts
    assert found.on_most.hours <= found.hours
    assert found.on_most.money == pytest.approx(found.on_most.hours * 4 * 2)
    lines = " ".join(explaining_lines(job, report))
    assert "on an A100" in lines
    assert "For the money" not in lines
    free = segmentation(tiny_data, cluster={"workers": 1, "gpus_per_worker": 1})
    assert "For the money: --set 'cluster.price" in " ".join(explaining_lines(free, check(free)))


def test_a_machine_that_cannot_reach_the_hub_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    machine.wait_for_no_hub()
    assert constants.HF_HUB_OFFLINE
