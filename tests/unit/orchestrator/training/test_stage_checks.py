"""What is refused, and what is warned of, before a stage runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from data_pipeline.loader import Batch
from model.build import build_network
from model.losses import softmax_cross_entropy
from orchestrator.cli.main import app
from orchestrator.errors import RunError
from orchestrator.job.config import StageSettings
from orchestrator.training.learner import Learner
from orchestrator.training.place import Place
from orchestrator.training.stage_checks import check_batch_norm, stage_warnings
from orchestrator.training.train_state import make_state
from tests.unit.orchestrator.jobs import MODEL, SEGMENTER, stage, write


def settings(task: str = "segmentation", **changes: Any) -> StageSettings:
    """A stage without anything to warn of."""
    good = {"global_batch": 16, "steps": 600, "start_from": {"checkpoint": "earlier"}}
    return StageSettings.model_validate(stage("tiny", task, "tiny-voc", **(good | changes)))


def data(crop: Any, val_crop: Any = None) -> dict[str, Any]:
    return {
        "train": {"dataset": "d", "split": "train", "crop": crop},
        "val": {"dataset": "d", "split": "val", "crop": val_crop},
    }


def refused(stage: StageSettings) -> str | None:
    with torch.device("meta"):
        network = build_network(stage.model, stage.task, 3)
    try:
        check_batch_norm(stage, network)
    except RunError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("changes", "sync", "fits"),
    [
        ({"global_batch": 2}, False, True),
        ({"global_batch": 1}, False, False),
        ({"global_batch": 1}, True, False),
        ({"global_batch": 4, "cluster": {"workers": 2}}, False, True),
        ({"global_batch": 3, "cluster": {"workers": 2}}, False, False),  # parts of 2 and 1
        ({"global_batch": 3, "cluster": {"workers": 2}}, True, True),
        ({"global_batch": 8, "cluster": {"workers": [1, 5]}}, False, False),
        ({"global_batch": 4, "micro_batch": 2}, False, True),
        ({"global_batch": 4, "micro_batch": 1}, False, False),
        ({"global_batch": 5, "micro_batch": 2}, False, False),  # passes of 2, 2 and 1
        ({"global_batch": 5, "micro_batch": 1, "cluster": {"workers": 2}}, True, False),  # 1 and 0
        ({"global_batch": 6, "micro_batch": 1, "cluster": {"workers": 2}}, True, True),
    ],
)
def test_one_image_to_batch_normalisation_in_any_pass_of_any_worker(
    changes: dict[str, Any], sync: bool, fits: bool
) -> None:
    message = refused(settings(model=SEGMENTER | {"batch_norm": {"sync": sync}}, **changes))
    assert (message is None) == fits
    assert fits or "leaves one image at a time to a worker" in str(message)
    frozen = settings(model=SEGMENTER | {"batch_norm": {"frozen": True}}, **changes)
    assert refused(frozen) is None


def test_one_value_per_channel_depends_on_the_features_too() -> None:
    no_pooling = {"image_level_features": False}
    assert refused(settings(global_batch=1, model=SEGMENTER | no_pooling)) is None
    data = {
        "train": {"dataset": "d", "split": "train", "crop": 32},
        "val": {"dataset": "d", "split": "val"},
    }
    message = refused(settings("classification", model=MODEL, global_batch=1, data=data))
    assert "batch normalisation of 32x32 needs two" in str(message)
    data["train"]["crop"] = 33  # two by two features
    assert refused(settings("classification", model=MODEL, global_batch=1, data=data)) is None


def test_nothing_to_warn_of() -> None:
    assert stage_warnings(settings()) == []
    assert stage_warnings(settings(optimizer={"lr": 0.1, "lr_for_batch": 16})) == []
    small = {"global_batch": 2, "cluster": {"workers": 2}}
    assert stage_warnings(settings("classification", model=MODEL)) == []
    frozen = SEGMENTER | {"batch_norm": {"frozen": True}}
    assert stage_warnings(settings(model=frozen, **small)) == []
    synced = SEGMENTER | {"batch_norm": {"sync": True, "momentum": 0.1}}
    assert stage_warnings(settings(model=synced, cluster={"workers": [1, 8]})) == []


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"cluster": {"workers": [1, 4]}},
            [
                "sees 4 images at a time (global_batch: 16, workers: 4), which costs accuracy",
                "77.2 with 16, 76.5 with 12, 75.8 with 8 and 64.4 with 4",
                "Cures: set model.batch_norm.sync: true, or raise global_batch",
            ],
        ),
        (
            {"micro_batch": 4},
            ["sees 4 images", "workers: 1, micro_batch: 4)", "Cures: raise micro_batch, or"],
        ),
        ({"global_batch": 12}, ["sees 12 images"]),
        ({"task": "classification", "model": MODEL, "global_batch": 8}, ["34.7 with 2"]),
        (
            {"task": "classification", "model": MODEL, "global_batch": 9000},
            ["global_batch: 9000 is more than the linear rule", "24.8 with 16,384"],
        ),
        ({"optimizer": {"lr": 7}}, ["a rate of 7 is outside", "1e-06 to 5: is it a slip?"]),
        ({"optimizer": {"name": "adamw", "lr": 0.1, "weight_decay": 0}}, ["1e-07 to 0.05"]),
        (
            {"optimizer": {"lr": 0.01, "weight_decay": 4.0}},
            ["weight_decay: 4 takes 4.0% of the weights away in each step; usual is 4e-5"],
        ),
        (
            {"model": SEGMENTER | {"batch_norm": {"momentum": 0.9997}}},
            ["a decay of 0.9997, as TensorFlow counts, is 0.0003 here"],
        ),
        ({"start_from": "tiny"}, ["start_from: tiny is the name of this stage too"]),
        ({"data": data(512)}, ["data.train.crop: 512: at output stride 16", "such as 513"]),
        ({"data": data([33, 60])}, ["such as [33, 65]"]),
        ({"data": data(8)}, ["such as 17"]),
        ({"data": data(33, 100)}, ["data.val.crop: 100: at", "such as 97"]),
        (
            {"optimizer": {"lr": 0.1, "lr_for_batch": 32}},
            ["optimizer.lr: 0.1 is for batches of 32; with global_batch: 16 the rate is 0.05"],
        ),
        (
            {"optimizer": {"lr": 0.1, "lr_for_batch": 8}},
            ["the rate is 0.2; a larger rate needs schedule.warmup"],
        ),
        (
            {"model": SEGMENTER | {"batch_norm": {"frozen": True}}, "start_from": None},
            ["frozen: true without start_from"],
        ),
        (
            {"model": SEGMENTER | {"batch_norm": {}}, "steps": 1000, "start_from": None},
            ["momentum: 0.0003 leave 74%", "raise momentum to 0.003"],
        ),
        (
            {
                "data": {
                    "train": {"dataset": "d", "split": "val", "crop": 33},
                    "val": {"dataset": "d", "split": "val"},
                }
            },
            ["data.val is data.train (d/val)"],
        ),
    ],
)
def test_what_makes_results_worse_is_said(changes: dict[str, Any], parts: list[str]) -> None:
    (warning,) = stage_warnings(settings(**({"task": "segmentation"} | changes)))
    for part in parts:
        assert part in warning


def test_warnings_are_in_a_dry_run_once(tmp_path: Path) -> None:
    job = {"kind": "stage"} | stage("tiny", "segmentation", "tiny-voc")
    result = CliRunner().invoke(app, ["run", str(write(tmp_path / "job.yaml", job)), "--dry-run"])
    assert result.exit_code == 0
    assert result.output.count("batch normalisation sees 8 images at a time") == 1


@pytest.mark.parametrize("hard", [None, 0.25])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_batch_whose_pixels_are_all_ignored_teaches_nothing(
    hard: float | None, clip_norm: float | None
) -> None:
    optimizer = {"lr": 0.1, "weight_decay": 0.0, "clip_norm": clip_norm}
    one = settings(optimizer=optimizer, global_batch=4, micro_batch=2)
    network = build_network(one.model, "segmentation", 3)
    place = Place(rank=0, world=1, device=torch.device("cpu"))

    def loss(outputs: torch.Tensor, labels: torch.Tensor, _: int) -> Any:
        return softmax_cross_entropy(outputs, labels, 255, hard_fraction=hard)

    class Recorded:
        sums: tuple[torch.Tensor, ...] = ()

        def add(self, *sums: torch.Tensor) -> None:
            self.sums = sums

    before = [parameter.detach().clone() for parameter in network.parameters()]
    recorded = Recorded()
    state = make_state(network, one, place)
    learner = Learner(state, one, place, loss, recorded, lambda: False)  # type: ignore[arg-type]
    batch = Batch(
        images=torch.randint(256, (4, 3, 33, 33), dtype=torch.uint8),
        labels=torch.full((4, 33, 33), 255, dtype=torch.uint8),
        keys=("a", "b", "c", "d"),
    )
    learner.update(0, batch, 0.1)
    assert [float(value) for value in recorded.sums] == [0, 0, 0]
    for old, new in zip(before, network.parameters(), strict=True):
        assert torch.equal(old, new)
