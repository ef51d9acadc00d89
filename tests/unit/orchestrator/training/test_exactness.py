"""Killed after every step and restarted == undisturbed, to the last bit, whatever the options."""

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.loader import Batch
from orchestrator.launch.stage import StageResult
from orchestrator.training.learner import Learner
from tests.unit.orchestrator.jobs import SEGMENTER
from tests.unit.orchestrator.training.test_training import plan, run, series

SGD = {
    "ema": {"decay": 0.9},
    "micro_batch": 3,
    "optimizer": {"lr": 0.05, "clip_norm": 0.05, "lr_multipliers": {"logits.bias": 2}},
}
ADAMW = {
    "optimizer": {"name": "adamw", "lr": 0.001, "lr_for_batch": 4},
    "schedule": {"name": "cosine", "warmup": 3},
    "ema": {"decay": 0.9999},
}
FLOAT16 = {
    "precision": "float16",
    "schedule": {"name": "steps", "milestones": [2, "1 epochs", 5]},
}
BFLOAT16 = {
    "precision": "bfloat16",
    "optimizer": {"lr": 0.05, "nesterov": True},
    "schedule": {"name": "step_exponential", "every": 2},
    "loss": {"hard_pixels": {"fraction": 0.3, "anneal": 6}, "class_weights": {"background": 0.5}},
    "model": SEGMENTER | {"batch_norm": {"frozen": True}},
    "micro_batch": 5,
}
EVENTS = {
    "steps": 8,
    "log_every": 4,
    "evaluate": {"every": 5},
    "checkpoint": {"every": 3},
    "global_batch": 7,
}


def die_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends after each step, once: before anything is made of it."""
    update, died = Learner.update, set()

    def interrupted(self: Learner, step: int, batch: Batch, rate: float) -> None:
        update(self, step, batch, rate)
        if step not in died:
            died.add(step)
            raise KeyboardInterrupt("killed")

    monkeypatch.setattr(Learner, "update", interrupted)


def content(result: StageResult) -> dict[str, Any]:
    """All numbers of a checkpoint."""
    checkpoint = result.checkpoint
    assert checkpoint.step == EVENTS["steps"]
    files = {name: file["sha256"] for name, file in checkpoint.files.items()}
    tensors = {name: digest for name, digest in files.items() if name.endswith(".safetensors")}
    state = {name: checkpoint.state[name] for name in ("metrics", "meters", "seed")}
    return tensors | state


def assert_equal(first: Any, second: Any) -> None:
    """Nested values with tensors in them."""
    if isinstance(first, torch.Tensor):
        assert first.equal(second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert_equal(value, second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert first == second


@pytest.mark.parametrize(
    "options", [SGD, ADAMW, FLOAT16, BFLOAT16], ids=["sgd", "adamw", "float16", "bfloat16"]
)
def test_killed_after_every_step_equals_undisturbed(
    tiny_data: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = (plan(tiny_data, tmp_path / name, **EVENTS, **options) for name in ("a", "b"))
    expected = run(whole)
    die_after_every_step(monkeypatch)
    for _ in range(EVENTS["steps"]):
        with pytest.raises(KeyboardInterrupt):
            run(killed)
    result = run(killed)
    assert killed.run.read()["attempts"] == EVENTS["steps"] + 1
    assert content(result) == content(expected)
    assert_equal(result.checkpoint.optimizer(), expected.checkpoint.optimizer())
    assert series(killed) == series(whole)
    assert ("ema.safetensors" in content(result)) == ("ema" in options)


@pytest.mark.parametrize("backbone", ["xception41", "timm:test_resnet"])
def test_evaluation_leaves_training_as_it_was(
    tiny_data: Path, tmp_path: Path, backbone: str
) -> None:
    """At another output stride, with the average in the network, after every step or never."""
    small = SEGMENTER | {"backbone": backbone}
    if backbone != SEGMENTER["backbone"]:
        small = {name: small[name] for name in small if name not in ("width", "middle_units")}
    results = []
    for every in (1, 100):
        evaluate = {"every": every, "output_stride": 8}
        changes = {"model": small, "ema": {}, "evaluate": evaluate}
        results.append(run(plan(tiny_data, tmp_path / str(every), **EVENTS | changes)))
    often, once = (content(result) for result in results)
    assert often["model.safetensors"] == once["model.safetensors"]
    assert often["ema.safetensors"] == once["ema.safetensors"]
    assert often["metrics"] == once["metrics"]
