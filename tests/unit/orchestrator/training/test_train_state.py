import pytest
import torch

from model.build import build_network
from orchestrator.errors import CheckpointError
from orchestrator.job.config import StageSettings
from orchestrator.training.place import Place
from orchestrator.training.train_state import TrainState, make_state
from tests.unit.orchestrator.jobs import stage

HERE = Place(rank=0, world=1, device=torch.device("cpu"))


def fresh(seed: int = 0, **changes: object) -> TrainState:
    config = stage("tiny", "classification", "tiny-imagenet", **changes)
    settings = StageSettings.model_validate(config)
    torch.manual_seed(seed)
    return make_state(build_network(settings.model, "classification", 3), settings, HERE)


def test_it_goes_on_from_what_it_gives() -> None:
    first, second = fresh(0, ema={}), fresh(1, ema={})
    for parameter in first.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    first.optimizer.step()
    assert first.average is not None
    first.average.update(0)
    second.load(first.network.state_dict(), first.optimizer_state(), first.averaged_weights)
    for name, tensor in first.network.state_dict().items():
        assert tensor.equal(second.network.state_dict()[name])
    assert first.averaged_weights is not None
    assert second.averaged_weights is not None
    for name, tensor in first.averaged_weights.items():
        assert tensor.equal(second.averaged_weights[name])
    momenta = [list(state.optimizer.state.values()) for state in (first, second)]
    for one, other in zip(*momenta, strict=True):
        assert one["momentum_buffer"].equal(other["momentum_buffer"])


def test_what_does_not_fit_is_refused_before_anything_is_loaded() -> None:
    state = fresh(ema={})
    grouped = {"lr": 0.05, "lr_multipliers": {"classifier": 2.0}}
    other = fresh(1, optimizer=grouped)
    before = state.network.classifier.weight.clone()
    with pytest.raises(CheckpointError, match="is of other parameters, or in other groups"):
        state.load(other.network.state_dict(), other.optimizer_state(), None)
    assert state.network.classifier.weight.equal(before)
    with pytest.raises(CheckpointError, match="ema: the checkpoint has no average"):
        state.load(state.network.state_dict(), state.optimizer_state(), None)
