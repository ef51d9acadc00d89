import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.job.space import Domain
from orchestrator.sweep.decisions import Entry
from orchestrator.sweep.searchers import draw, suggest
from tests.unit.orchestrator.sweep.simulation import sweep_job

DOMAINS = {
    "choice": Domain(choice=("a", None, 3)),
    "uniform": Domain(uniform=(-1, 2)),
    "loguniform": Domain(loguniform=(1e-4, 1e-1)),
    "quniform": Domain(quniform=(0, 1, 0.25)),
    "randint": Domain(randint=(2, 5)),
    "lograndint": Domain(lograndint=(1, 100)),
}


@pytest.mark.parametrize("name", DOMAINS)
@given(seed=st.integers(0, 2**31))
def test_values_lie_within_their_domain(name: str, seed: int) -> None:
    domain, value = DOMAINS[name], draw(DOMAINS[name], random.Random(seed))
    if domain.finite is not None:
        assert value in domain.finite
    else:
        low, high = domain.uniform or domain.loguniform or (0, 0)
        assert low <= value <= high


def entries(count: int, score: Any) -> list[Entry]:
    """A log of so many finished trials at different rates."""
    log: list[Entry] = []
    for trial in range(count):
        lr = 10 ** (-4 + 4 * trial / count)
        values = {"optimizer.lr": lr}
        log += [
            {"kind": "suggest", "trial": trial, "values": values},
            {"kind": "start", "trial": trial, "run": "r", "fingerprint": "f", "steps": 8},
            {"kind": "result", "trial": trial, "step": 8, "metrics": {"val/miou": score(lr)}},
            {"kind": "end", "trial": trial, "status": "finished", "metrics": {}},
        ]
    return log


@pytest.mark.parametrize("name", ["random", "optuna"])
def test_a_suggestion_depends_on_the_log_and_the_seed_alone(name: str) -> None:
    job = sweep_job(search={"name": name, "seed": 3})
    log = entries(12, lambda lr: -lr)
    assert suggest(job, log) == suggest(job, log)
    assert suggest(job, log) != suggest(sweep_job(search={"name": name, "seed": 4}), log)
    assert suggest(job, log) != suggest(job, log[:-4])


def test_optuna_goes_where_results_are_good() -> None:
    space = {"optimizer.lr": {"loguniform": [1e-4, 1]}}
    log = entries(24, lambda lr: -lr)

    def mean(name: str) -> float:
        jobs = [sweep_job(space=space, search={"name": name, "seed": s}) for s in range(8)]
        return sum((suggest(job, log) or {})["optimizer.lr"] for job in jobs) / len(jobs)

    assert mean("optuna") < mean("random")


def test_a_grid_has_every_combination_once() -> None:
    space = {
        "optimizer.momentum": {"choice": [0.5, 0.9], "when": {"optimizer.name": ["sgd"]}},
        "optimizer.name": {"choice": ["sgd", "adamw"]},
    }
    job = sweep_job(space=space, search={"name": "grid"}, budget={})
    log: list[Entry] = []
    while (values := suggest(job, log)) is not None:
        log.append({"kind": "suggest", "trial": len(log), "values": values})
    assert [entry["values"] for entry in log] == [
        {"optimizer.name": "sgd", "optimizer.momentum": 0.5},
        {"optimizer.name": "sgd", "optimizer.momentum": 0.9},
        {"optimizer.name": "adamw"},
    ]


@pytest.mark.parametrize("name", ["random", "optuna"])
def test_a_space_that_is_used_up_ends_the_search(name: str) -> None:
    job = sweep_job(space={"model.output_stride": {"choice": [8, 16]}}, search={"name": name})
    log: list[Entry] = []
    while (values := suggest(job, log)) is not None:
        log.append({"kind": "suggest", "trial": len(log), "values": values})
    assert sorted(entry["values"]["model.output_stride"] for entry in log) == [8, 16]
