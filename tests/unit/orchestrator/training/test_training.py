"""A stage in this process: exact after any kill, not run twice, refused when it cannot work."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipeline.errors import DataError
from orchestrator.errors import CheckpointError, RunError, StageFailed
from orchestrator.job.config import StageSettings
from orchestrator.launch.stage import (
    PlannedStage,
    StageResult,
    finished_result,
    open_run,
    plan_stage,
    train_stage,
)
from orchestrator.runs import checkpoint_writer, run_writer
from orchestrator.runs.checkpoint import checkpoint_paths
from orchestrator.runs.run import append_journal, read_journal
from orchestrator.training.worker import agreed_checkpoint
from tests.unit.orchestrator.jobs import stage

TIMED = ("second", "wait", "stall", "mfu")  # in names of metrics


def plan(root: Path, storage: Path, task: str = "segmentation", **changes: Any) -> PlannedStage:
    dataset = "tiny-voc" if task == "segmentation" else "tiny-imagenet"
    settings = StageSettings.model_validate(stage("tiny", task, dataset, **changes))
    return plan_stage(settings, storage, root)


def run(planned: PlannedStage) -> StageResult:
    open_run(planned)
    return train_stage(planned)


def series(planned: PlannedStage) -> list[tuple[int, dict[str, float]]]:
    """What the journal says, without the timings."""
    return [
        (
            record["step"],
            {k: v for k, v in record["metrics"].items() if not any(t in k for t in TIMED)},
        )
        for record in read_journal(planned.run.journal)
    ]


@pytest.fixture(scope="module")
def undisturbed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> PlannedStage:
    planned = plan(tiny_data, tmp_path_factory.mktemp("undisturbed"))
    run(planned)
    return planned


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6])
def test_killed_at_any_step_equals_undisturbed(
    undisturbed: PlannedStage,
    tiny_data: Path,
    tmp_path: Path,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def die(path: Path, record: dict[str, Any]) -> None:
        append_journal(path, record)
        if "metrics" in record and record["step"] == step:
            raise KeyboardInterrupt("killed")

    planned = plan(tiny_data, tmp_path)
    monkeypatch.setattr(run_writer, "append_journal", die)
    with pytest.raises(KeyboardInterrupt):
        run(planned)
    monkeypatch.undo()
    result = run(planned)
    assert series(planned) == series(undisturbed)
    expected = finished_result(undisturbed)
    assert expected is not None
    assert result.checkpoint.digest == expected.checkpoint.digest
    assert result.metrics == expected.metrics
    assert planned.run.read()["attempts"] == 2


def test_an_annealed_loss_goes_on_where_it_was(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every option of the loss; the share of hard pixels depends on the step alone."""

    def die(path: Path, record: dict[str, Any]) -> None:
        append_journal(path, record)
        if "metrics" in record and record["step"] == 3:
            raise KeyboardInterrupt("killed")

    hard = {"fraction": 0.25, "anneal": "2 epochs"}
    loss = {"class_weights": {"background": 0.5}, "label_smoothing": 0.1, "hard_pixels": hard}
    whole, interrupted = (plan(tiny_data, tmp_path / name, loss=loss) for name in ("a", "b"))
    run(whole)
    monkeypatch.setattr(run_writer, "append_journal", die)
    with pytest.raises(KeyboardInterrupt):
        run(interrupted)
    monkeypatch.undo()
    run(interrupted)
    assert series(interrupted) == series(whole)
    losses = [metrics["train/loss"] for _, metrics in series(whole)]
    assert losses[-1] > 1.1 * losses[0]  # the mean of ever fewer, ever harder pixels


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    undisturbed: PlannedStage, tiny_data: Path, tmp_path: Path
) -> None:
    planned = plan(tiny_data, tmp_path)
    newest = run(planned).checkpoint
    (newest.path / "model.safetensors").write_bytes(b"rot")
    assert finished_result(planned) is None
    again = run(planned)
    assert again.checkpoint.digest == newest.digest
    assert series(planned) == series(undisturbed)


def test_kept_pixels_change_nothing(
    undisturbed: PlannedStage, tiny_data: Path, tmp_path: Path
) -> None:
    """Nor the identity of the run."""
    data = stage("tiny", "segmentation", "tiny-voc")["data"]
    cache = {"keep_pixels": True, "cache": {"directory": str(tmp_path / "cache")}}
    planned = plan(tiny_data, tmp_path, data=data | cache)
    assert planned.fingerprint == undisturbed.fingerprint
    run(planned)
    assert list((tmp_path / "cache").glob("??/*"))
    assert series(planned) == series(undisturbed)


def test_a_finished_stage_is_found_by_its_fingerprint(
    undisturbed: PlannedStage, tiny_data: Path, tmp_path: Path
) -> None:
    storage = undisturbed.run.path.parents[1]
    for same in ({}, {"log_every": 2}, {"checkpoint": {"every": 6}}, {"cluster": {"workers": 2}}):
        found = finished_result(plan(tiny_data, storage, **same))
        assert found is not None
        assert found.reused
    for other in ({"seed": 1}, {"optimizer": {"lr": 0.01}}, {"global_batch": 6}, {"steps": 7}):
        assert finished_result(plan(tiny_data, storage, **other)) is None


def test_training_learns(tiny_data: Path, tmp_path: Path) -> None:
    settings = stage("tiny", "classification", "tiny-imagenet")
    settings["data"]["train"] |= {"area": [0.9, 1.0], "flip": False}
    planned = plan(
        tiny_data,
        tmp_path,
        task="classification",
        data=settings["data"],
        steps=200,
        optimizer={"lr": 0.2},
        evaluate={"every": 200},
        log_every=40,
    )
    run(planned)
    losses = [metrics["train/loss"] for _, metrics in series(planned)]
    assert losses[-1] < 0.9 * losses[0]


def test_frozen_batch_norm_keeps_its_statistics(tiny_data: Path, tmp_path: Path) -> None:
    frozen = {"batch_norm": {"frozen": True}}
    settings = stage("tiny", "segmentation", "tiny-voc")
    planned = plan(tiny_data, tmp_path, model=settings["model"] | frozen, steps=2)
    weights = run(planned).checkpoint.weights()
    means = [tensor for name, tensor in weights.items() if name.endswith("running_mean")]
    assert means
    assert all(tensor.abs().max() == 0 for tensor in means)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"global_batch": 999}, RunError, "do not fill a global batch of 999"),
        ({"start_from": {"checkpoint": "nowhere"}}, CheckpointError, "no finished run of it under"),
        ({"start_from": {"checkpoint": "/no/where"}}, CheckpointError, "/no/where"),
        ({"model": {"backbone": "timm:resnet1o"}}, RunError, "tiny: model: .*resnet1"),
        (
            {"global_batch": 1},
            RunError,
            "over 1 workers, micro_batch: null, leaves one image at a time",
        ),
        (
            {"loss": {"class_weights": {"background": 1.0, "aeroplan": 2.0}}},
            RunError,
            r"loss\.class_weights: tiny-voc has no class 'aeroplan'; did you mean 'aeroplane'\?",
        ),
        (
            {"optimizer": {"lr": 0.1, "lr_multipliers": {"decodr": 2.0}}},
            RunError,
            r"optimizer\.lr_multipliers: no parameter's name begins with 'decodr'; did you mean "
            r"'decoder'\? names begin with aspp, backbone, decoder, logits",
        ),
        (
            {"loss": {"class_weights": {"qqqq": 2.0}}},
            RunError,
            "has no class 'qqqq'; it has background, aeroplane, ",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_it_starts(
    tiny_data: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan(tiny_data, tmp_path, **changes)
    assert not (tmp_path / "runs").exists()


def test_one_image_to_a_worker_needs_synchronised_batch_norm(
    tiny_data: Path, tmp_path: Path
) -> None:
    settings = stage("tiny", "segmentation", "tiny-voc")
    two = {"global_batch": 2, "cluster": {"workers": [1, 2]}}
    with pytest.raises(RunError, match=r"over 2 workers, .*leaves one image.*batch_norm\.sync"):
        plan(tiny_data, tmp_path, **two)
    synced = settings["model"] | {"batch_norm": {"sync": True}}
    assert plan(tiny_data, tmp_path, model=synced, **two).steps == 6
    with pytest.raises(RunError, match=r"over 1 workers, .*leaves one image"):
        plan(tiny_data, tmp_path, model=synced, global_batch=1)


def test_data_that_is_not_there_or_does_not_fit(tiny_data: Path, tmp_path: Path) -> None:
    settings = stage("tiny", "segmentation", "tiny-voc")
    settings["data"]["val"]["crop"] = 33
    with pytest.raises(RunError, match=r"data\.val\.crop: \[33, 33\] is smaller than the largest"):
        plan_stage(StageSettings.model_validate(settings), tmp_path, tiny_data)
    wrong = stage("tiny", "classification", "tiny-voc")
    with pytest.raises(RunError, match="tiny-voc/train is a data set of segmentation"):
        plan_stage(StageSettings.model_validate(wrong), tmp_path, tiny_data)
    settings["data"]["train"]["split"] = "tra"
    with pytest.raises(DataError, match="train"):
        plan_stage(StageSettings.model_validate(settings), tmp_path, tiny_data)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_silent_fall_back_to_the_cpu(tiny_data: Path, tmp_path: Path) -> None:
    planned = plan(tiny_data, tmp_path, cluster={"workers": 0, "gpus_per_worker": 1})
    with pytest.raises(StageFailed, match=r"gpus_per_worker: 1, but torch sees no GPU"):
        run(planned)


def test_a_failure_is_told_and_kept(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise TypeError("not what was expected")

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", fail)
    planned = plan(tiny_data, tmp_path)
    with pytest.raises(StageFailed, match="tiny: not what was expected"):
        run(planned)
    assert planned.run.read()["status"] == "failed"
    assert "save_checkpoint" in (planned.run.path / "error.txt").read_text()


def test_all_workers_go_on_from_the_checkpoint_that_the_first_one_sees(
    undisturbed: PlannedStage,
) -> None:
    """Nodes may cache what a shared directory holds."""
    of_run = undisturbed.run
    newest, older = checkpoint_paths(of_run.checkpoints)
    for seen in (older, None):
        others: Any = SimpleNamespace(rank=1, gather=lambda own, seen=seen: [seen, own])
        found = agreed_checkpoint(of_run, others)
        assert (found.path if found else None) == seen
    first: Any = SimpleNamespace(rank=0, gather=lambda own: [own, older])
    found = agreed_checkpoint(of_run, first)
    assert found is not None
    assert found.path == newest
