"""Which trial is best, from decisions alone."""

import math

import pytest

from orchestrator.job.sweep import Objective
from orchestrator.sweep.results import Trial, brief, fold, front, ranked, winner
from tests.unit.orchestrator.sweep.finished import begin, ended, evaluated

MIOU = (Objective(metric="val/miou", mode="max"),)
BOTH = (*MIOU, Objective(metric="multiply_adds", mode="min"))


def finished(number: int, miou: float, **metrics: float) -> Trial:
    return Trial(
        number=number, state="finished", step=6, metrics={"val/miou": miou} | metrics, steps=6
    )


def test_a_trial_is_what_its_decisions_say() -> None:
    told = [
        *begin(0, lr=0.01),
        *begin(1, lr=0.1),
        evaluated(0, 3, 0.2),
        evaluated(1, 3, 0.1),
        {"kind": "decide", "trial": 1, "step": 3, "action": "stop", "why": "0.1 is below 0.2"},
        ended(1, "stopped"),
        evaluated(0, 6, 0.4),
        ended(0, metrics={"val/miou": 0.4}),
        {"kind": "budget", "why": "2 trials"},
        {"kind": "suggest", "trial": 2, "values": {"optimizer.lr": 1.0}},
        ended(2, "invalid", error="optimizer.lr: too large"),
    ]
    good, stopped, invalid = fold(told)
    assert (good.state, good.step, good.metrics, good.why) == (
        "finished",
        6,
        {"val/miou": 0.4},
        "",
    )
    assert (stopped.state, stopped.step, stopped.why) == ("stopped", 3, "0.1 is below 0.2")
    assert (invalid.state, invalid.run, invalid.why) == ("invalid", None, "optimizer.lr: too large")


def test_a_trial_that_goes_on_from_another_has_its_new_values_and_run() -> None:
    exploit = {"kind": "decide", "trial": 0, "step": 2, "action": "exploit", "from": 3, "why": ""}
    again = {"kind": "start", "trial": 0, "run": "runs/tiny-voc-x", "steps": 6}
    [trial] = fold([*begin(0, lr=0.01), exploit | {"values": {"optimizer.lr": 0.012}}, again])
    assert trial.values == {"optimizer.lr": 0.012, "model.output_stride": 16}
    assert (trial.copied_from, trial.run) == (3, "runs/tiny-voc-x")


def test_finished_trials_come_first_and_broken_ones_last() -> None:
    trials = [
        Trial(number=0, state="failed", metrics={"val/miou": 0.9}),
        Trial(number=1, state="nan", metrics={"val/miou": math.nan}),
        Trial(number=2, state="stopped", metrics={"val/miou": 0.8}),
        finished(3, 0.3),
        finished(4, 0.5),
        finished(5, math.nan),
        Trial(number=6, state="invalid"),
    ]
    assert [trial.number for trial in ranked(trials, MIOU)] == [4, 3, 5, 2, 1, 0, 6]
    best = winner(trials, MIOU)
    assert best is not None
    assert best.number == 4
    smallest = winner(trials, (Objective(metric="val/miou", mode="min"),))
    assert smallest is not None
    assert smallest.number == 3


@pytest.mark.parametrize("state", ["failed", "nan", "stopped", "invalid", "running"])
def test_nothing_wins_where_nothing_finished(state: str) -> None:
    assert winner([Trial(number=0, state=state, metrics={"val/miou": 0.9})], MIOU) is None
    assert winner([], MIOU) is None


def test_the_front_is_what_no_other_trial_beats_in_both() -> None:
    trials = [
        finished(0, 0.5, multiply_adds=10),
        finished(1, 0.6, multiply_adds=20),
        finished(2, 0.4, multiply_adds=15),  # beaten by 0
        finished(3, 0.6, multiply_adds=25),  # as good as 1, and larger
        finished(4, 0.5, multiply_adds=10),  # the same as 0
        Trial(number=5, state="stopped", metrics={"val/miou": 0.9, "multiply_adds": 1}),
    ]
    assert [trial.number for trial in front(trials, BOTH)] == [0, 1, 4]
    assert [trial.number for trial in ranked(trials, BOTH)] == [1, 0, 4, 3, 2, 5]


def test_values_are_told_in_a_few_characters() -> None:
    told = [brief(value) for value in (0.000123456, 16, None, {"sync": True}, [97, 161], "poly")]
    assert told == ["0.0001235", "16", "-", "{sync: true}", "[97, 161]", "poly"]
