from typing import Any

import pytest

from orchestrator.job.sweep import Pbt
from orchestrator.sweep.decisions import Entry
from orchestrator.sweep.schedulers import boundary, decide, next_generation
from tests.unit.orchestrator.sweep.simulation import sweep_job

PBT = {"name": "pbt", "population": 4, "every": 0.25}


def log_of(results: list[tuple[int, int, float]], steps: int = 100) -> list[Entry]:
    """A log of results (trial, step, score)."""
    log: list[Entry] = []
    for trial in sorted({trial for trial, _, _ in results}):
        values = {"optimizer.lr": 0.01 * (trial + 1)}
        log += [
            {"kind": "suggest", "trial": trial, "values": values},
            {"kind": "start", "trial": trial, "run": f"runs/{trial}", "steps": steps},
        ]
    for trial, step, score in results:
        log.append({"kind": "result", "trial": trial, "step": step, "metrics": {"val/miou": score}})
    return log


def action(scheduler: dict[str, Any], results: list[tuple[int, int, float]]) -> str:
    return decide(sweep_job(scheduler=scheduler), log_of(results)).action


ASHA = {"name": "asha", "reduction": 2, "grace": 0.25}


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([(0, 25, 0.1)], "continue"),  # the first has nobody to be compared with
        ([(0, 25, 0.5), (1, 25, 0.4)], "stop"),
        ([(0, 25, 0.5), (1, 25, 0.6)], "continue"),
        ([(0, 25, 0.5), (1, 20, 0.1)], "continue"),  # no rung yet
        ([(0, 25, 0.5), (1, 20, 0.1), (1, 40, 0.4)], "stop"),  # over the rung
        ([(0, 25, 0.5), (1, 25, 0.6), (1, 40, 0.1)], "continue"),  # between rungs
        ([(0, 25, 0.5), (0, 50, 0.7), (1, 25, 0.6), (1, 50, 0.65)], "stop"),  # the next rung
        ([(0, 25, 0.5), (1, 25, float("nan"))], "stop"),
        ([(0, 25, 0.5), (0, 100, 0.7), (1, 100, 0.1)], "continue"),  # it is done anyway
    ],
)
def test_asha(results: list[tuple[int, int, float]], expected: str) -> None:
    assert action(ASHA, results) == expected


def test_asha_of_trials_of_different_lengths_compares_shares() -> None:
    log = log_of([(0, 25, 0.5)]) + [
        entry | {"trial": 1} for entry in log_of([(0, 5, 0.4)], steps=20)
    ]
    assert decide(sweep_job(scheduler=ASHA), log).action == "stop"


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([(0, 50, 0.5), (1, 50, 0.4)], "stop"),
        ([(0, 50, 0.5), (1, 50, 0.6)], "continue"),
        ([(0, 50, 0.5), (1, 10, 0.4)], "continue"),  # grace
        ([(0, 30, 0.5), (1, 50, 0.4)], "continue"),  # nobody else is as far
        ([(0, 50, 0.5), (1, 30, 0.6), (1, 50, 0.1)], "continue"),  # its best counts
        ([(0, 30, 0.1), (0, 50, 0.5), (1, 50, 0.4)], "continue"),  # the others' means
    ],
)
def test_median(results: list[tuple[int, int, float]], expected: str) -> None:
    assert action({"name": "median", "min_trials": 1, "grace": 0.2}, results) == expected


def test_less_may_be_better() -> None:
    job = sweep_job(scheduler=ASHA, objective={"metric": "val/miou", "mode": "min"})
    assert decide(job, log_of([(0, 25, 0.5), (1, 25, 0.6)])).action == "stop"
    assert decide(job, log_of([(0, 25, 0.5), (1, 25, 0.4)])).action == "continue"


def test_generations_end_with_an_evaluation() -> None:
    pbt = Pbt(name="pbt", every=0.25)
    assert [boundary(pbt, step, 100, 10) for step in (0, 29, 30, 50, 79, 80)] == [
        30,
        30,
        50,
        80,
        80,
        None,
    ]
    assert boundary(pbt, 0, 12, 3) == 3


def test_the_worst_go_on_from_the_best_with_values_near_theirs() -> None:
    space = {"optimizer.lr": {"loguniform": [1e-3, 1]}}
    job = sweep_job(scheduler=PBT | {"resample": 0}, budget={}, space=space)
    log = log_of([(0, 25, 0.1), (1, 25, 0.4), (2, 25, 0.2), (3, 25, 0.3)])
    decided = next_generation(job, log, [0, 1, 2, 3])
    assert [entry["action"] for entry in decided] == ["exploit", *["continue"] * 3]
    assert decided[0]["from"] == 1
    assert decided[0]["values"]["optimizer.lr"] in (
        pytest.approx(0.02 * 0.8),
        pytest.approx(0.02 * 1.2),
    )
    assert next_generation(job, log, [0, 1, 2, 3]) == decided
