import pytest
import torch

from orchestrator.job.sections import AdamW, Cosine, Poly, Sgd, StepExponential, Steps
from orchestrator.training.optimizer import base_rate, make_optimizer, make_schedule


def test_poly_is_the_reference_formula() -> None:
    rate = make_schedule(Poly(name="poly", power=0.9), 0.007, 30000, 661)
    assert rate(0) == 0.007
    assert rate(15000) == pytest.approx(0.007 * 0.5**0.9)
    assert 0 < rate(29999) < 1e-6


def test_cosine_falls_to_its_end() -> None:
    rate = make_schedule(Cosine(name="cosine", end=0.1), 2.0, 100, 10)
    assert [rate(step) for step in (0, 50, 100)] == pytest.approx([2.0, 1.1, 0.2])
    assert rate(25) == pytest.approx(0.2 + 1.8 * (1 + 0.5**0.5) / 2)


def test_step_exponential_decays_every_two_epochs() -> None:
    rate = make_schedule(StepExponential(name="step_exponential"), 0.05, 1000, 10)
    assert [rate(step) for step in (0, 19, 20, 40)] == pytest.approx(
        [0.05, 0.05, 0.05 * 0.94, 0.05 * 0.94**2]
    )


def test_steps_decay_at_every_milestone() -> None:
    rate = make_schedule(Steps(name="steps", milestones=("3 epochs", 60)), 1.0, 100, 10)
    assert [rate(step) for step in (29, 30, 59, 60, 99)] == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(
    "schedule",
    [
        StepExponential(name="step_exponential", every=100, warmup=3),
        Steps(name="steps", milestones=(100,), warmup=3),
        Poly(name="poly", warmup=3),
        Cosine(name="cosine", warmup=3),
    ],
)
def test_warmup_rises_linearly_to_the_schedule(
    schedule: Poly | Cosine | StepExponential | Steps,
) -> None:
    rate = make_schedule(schedule, 1.0, 10**6, 100)
    assert [rate(step) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0], abs=1e-5)


def test_the_rate_is_in_proportion_to_the_batch_it_is_meant_for() -> None:
    assert base_rate(Sgd(lr=0.1, lr_for_batch=256), 1600) == pytest.approx(0.625)
    assert base_rate(Sgd(lr=0.007), 1600) == 0.007


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


def test_adamw_decays_weights_apart_from_the_gradient() -> None:
    """Without a gradient a weight shrinks by rate * decay, and only in a group that decays."""
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    config = AdamW(name="adamw", lr=0.1, betas=(0.8, 0.9), eps=1e-6)
    groups = [{"params": [w], "weight_decay": d} for w, d in zip(weights, (0.5, 0), strict=True)]
    optimizer = make_optimizer(config, groups)
    assert [optimizer.defaults[name] for name in ("betas", "eps")] == [(0.8, 0.9), 1e-6]
    for weight in weights:
        weight.grad = torch.zeros(1)
    optimizer.step()
    assert [weight.item() for weight in weights] == pytest.approx([0.95, 1.0])
