"""What the first worker writes down for the bill."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model.build import build_network
from orchestrator.job.config import StageSettings
from orchestrator.runs.run import Run
from orchestrator.training import ledger as module
from orchestrator.training.ledger import Ledger, measure_peak, note_device
from orchestrator.training.place import Place
from tests.unit.orchestrator.jobs import stage

CPU = Place(rank=0, world=2, device=torch.device("cpu"))


class Writer:
    """A run's writer, as far as the ledger needs it."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, dict[str, Any]]] = []

    def note(self, kind: str, text: str = "", **fields: Any) -> None:
        self.notes.append((kind, fields))


class FakeMeters:
    first_wait = 0.5

    def not_trained(self) -> dict[str, float]:
        return {"start-up": 1.0}


def test_entries_after_the_first_step_now_and_then_and_at_checkpoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writer = Writer()
    ledger = Ledger(writer, FakeMeters())  # type: ignore[arg-type]
    for step in (1, 2, 3):
        ledger.step(step)
    ledger.save(3)
    monkeypatch.setattr(module, "EVERY", 0.0)
    ledger.step(4)
    assert [(kind, fields["step"]) for kind, fields in writer.notes] == [
        ("time", 1),
        ("time", 3),
        ("time", 4),
    ]
    Ledger(None, FakeMeters()).save(1)  # type: ignore[arg-type]


def test_the_ideal_step_counts_three_passes_of_the_global_batch() -> None:
    settings = StageSettings.model_validate(stage("tiny", "segmentation", "tiny-voc"))
    network, writer = build_network(settings.model, "segmentation", 5), Writer()
    seconds = note_device(writer, settings, 5, network, CPU)  # type: ignore[arg-type]
    ((kind, fields),) = writer.notes
    assert kind == "device"
    images = torch.zeros(1, 3, 33, 33)
    counted = 0

    def count(layer: torch.nn.Conv2d, _: Any, output: torch.Tensor) -> None:
        nonlocal counted
        counted += output.numel() * layer.weight[0].numel()

    for layer in network.eval().modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(count)
    network(images)
    assert fields["multiply_adds_of_step"] == 3 * 8 * counted
    assert seconds == pytest.approx(3 * 8 * counted / (2 * fields["multiply_adds_per_second"]))


def test_the_peak_is_of_the_largest_pointwise_convolution() -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(300, 300, 3),
        torch.nn.Conv2d(64, 128, 1),
        torch.nn.Conv2d(128, 32, 1),
        torch.nn.Conv2d(256, 256, 1, groups=256),
    )
    found = measure_peak(network, CPU)
    assert found["product"][1:] == [64, 128]
    assert found["dtype"] == "float32"
    assert found["multiply_adds_per_second"] > 0
    assert measure_peak(torch.nn.Flatten(), CPU)["product"][1:] == [1024, 1024]


def test_a_full_disk_costs_the_bill_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    module.came_up(run, 1, 3)
    assert run.events() == []
    module.came_up(run, 0, 3)
    assert run.events()[0]["world"] == 3
    module.came_up(Run(tmp_path / "gone"), 0, 3)
    assert "gone" in caplog.text
