import pytest
import torch
from torch import nn

from orchestrator.training.ema import MovingAverage


def test_the_average_follows_as_in_tensorflow() -> None:
    """num_updates is the step: decays 0.1, 2/11, 3/12, then the one asked for."""
    network = nn.BatchNorm1d(1)
    average = MovingAverage(network, 0.2)
    expected = 1.0
    for step, decay in enumerate((0.1, 2 / 11, 0.2, 0.2)):
        with torch.no_grad():
            network.weight.fill_(10.0 * step)
            assert network.running_mean is not None
            network.running_mean.fill_(step)
        average.update(step)
        expected = decay * expected + (1 - decay) * 10.0 * step
        state = average.state_dict()
        assert state["weight"].item() == pytest.approx(expected)
        assert state["running_mean"].item() == step  # not averaged
    assert network.weight.item() == 30


def test_it_starts_at_the_weights_it_is_given() -> None:
    network = nn.Linear(2, 1)
    average = MovingAverage(network, 0.9)
    other = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
    network.load_state_dict(other)
    assert not average.state_dict()["weight"].equal(other["weight"])
    average.restart()
    assert average.state_dict()["weight"].equal(other["weight"])
    average.load_state_dict({"weight": 2 * other["weight"], "bias": other["bias"]})
    assert average.state_dict()["weight"].equal(2 * other["weight"])
    assert network.weight.equal(other["weight"])
