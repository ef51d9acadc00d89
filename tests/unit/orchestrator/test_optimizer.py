import pytest
import torch

from orchestrator.sections import Poly, Sgd, StepExponential
from orchestrator.optimizer import make_optimizer, make_schedule


def test_poly_is_the_reference_formula() -> None:
    rate = make_schedule(Poly(name="poly", power=0.9), 0.007, 30000, 661)
    assert rate(0) == 0.007
    assert rate(15000) == pytest.approx(0.007 * 0.5**0.9)
    assert 0 < rate(29999) < 1e-6


def test_step_exponential_decays_every_two_epochs() -> None:
    rate = make_schedule(StepExponential(name="step_exponential"), 0.05, 1000, 10)
    assert [rate(step) for step in (0, 19, 20, 40)] == pytest.approx(
        [0.05, 0.05, 0.05 * 0.94, 0.05 * 0.94**2]
    )


def test_warmup_rises_linearly_to_the_schedule() -> None:
    rate = make_schedule(StepExponential(name="step_exponential", warmup=3), 1.0, 1000, 100)
    assert [rate(step) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_momentum_accumulates_as_in_tensorflow() -> None:
    """accumulator = momentum * accumulator + gradient; weight -= rate * accumulator."""
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = make_optimizer(Sgd(lr=0.1, momentum=0.9), [{"params": [weight]}])
    accumulator, expected = 0.0, 1.0
    for gradient in (1.0, 2.0, -1.0):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        accumulator = 0.9 * accumulator + gradient
        expected -= 0.1 * accumulator
    assert weight.item() == pytest.approx(expected)
