"""Sweeps whose trials are formulas: any kill at any moment, in milliseconds."""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from orchestrator.files import digest
from orchestrator.job.config import StageSettings
from orchestrator.job.sweep import SweepJob
from orchestrator.runs.run import Run, truncate_journal
from orchestrator.sweep import decisions
from orchestrator.sweep.engine import Engine
from orchestrator.sweep.trial import Unit
from tests.unit.orchestrator.jobs import stage

STEPS, EVALUATE_EVERY, CHECKPOINT_EVERY = 12, 2, 3


class Killed(BaseException):
    """The driver dies."""


def sweep_job(**changes: Any) -> SweepJob:
    """A sweep over three fields of one stage."""
    settings = stage("seg", "segmentation", "tiny-voc", start_from=None, steps=STEPS)
    settings |= {"global_batch": 4, "evaluate": {"every": EVALUATE_EVERY}}
    raw = {
        "kind": "sweep",
        "name": "simulated",
        "storage": "/nowhere",
        "stages": [settings],
        "space": {
            "optimizer.lr": {"loguniform": [1e-4, 1]},
            "optimizer.weight_decay": {"uniform": [0, 1e-3]},
            "model.output_stride": {"choice": [8, 16]},
        },
        "objective": {"metric": "val/miou", "mode": "max"},
        "budget": {"trials": 4},
    }
    return SweepJob.model_validate(raw | changes)


def formula(fingerprint: str, values: StageSettings, step: int) -> float:
    """Grows with the steps, best at some rate; a rate that is too high is not a number."""
    if values.optimizer.lr > 0.5 and step > 4:
        return math.nan
    noise = int(digest([fingerprint, step])[:6], 16) / 16**6
    fit = 1 - abs(math.log10(values.optimizer.lr) + 2) / 3
    return fit * step / STEPS + 0.05 * noise


def fake_plan(settings: StageSettings, storage: Path, *_: Any) -> SimpleNamespace:
    """As `plan_stage`, without data."""
    fingerprint = digest(settings.model_dump(mode="json"))
    return SimpleNamespace(
        stage=settings,
        steps=STEPS,
        fingerprint=fingerprint,
        train=SimpleNamespace(num_samples=400),
        run=run_of(storage, fingerprint),
    )


def run_of(storage: Path, fingerprint: str) -> Run:
    """Where a trial's journal is."""
    return Run(storage / "runs" / f"seg-{fingerprint[:12]}")


class SimulatedEngine(Engine):
    """An engine whose copies of checkpoints are only names."""

    def _plan(self, trial: int) -> Any:
        return fake_plan(self._stage(trial), self._storage)

    def _copy(self, planned: Any, decided: Any) -> Any:
        donor = self._find(decided["from"], "start")
        planned.fingerprint = digest([planned.fingerprint, donor["fingerprint"], decided["step"]])
        planned.run = run_of(self._storage, planned.fingerprint)
        return planned


@dataclass
class Cluster:
    """What outlives the driver: checkpoints of trials. Of 100 news it never hears `lost`."""

    directory: Path
    job: SweepJob
    most: int = 1
    seed: int = 0
    lost: int = 0
    checkpoints: dict[str, int] = field(default_factory=dict)
    trained: list[tuple[str, int]] = field(default_factory=list)  # every step that was trained
    starts: int = 0

    def drive(self, entries: int | None = None) -> list[dict[str, Any]]:
        """Run until the end, or until so many entries of the log; the whole log."""
        self.starts += 1
        rng = random.Random(self.seed + 1000 * self.starts)

        def tell(_: Any) -> None:
            if entries is not None and len(driven.entries) >= entries:
                raise Killed

        self.directory.mkdir(parents=True, exist_ok=True)
        driven = SimulatedEngine(self.job, self.directory, {}, tell)
        running: dict[int, Iterator[tuple[str, Any]]] = {}
        while True:
            while len(running) < self.most and (unit := driven.next_unit()):
                running[unit.trial] = self._train(unit, driven)
            if not running:
                return decisions.read(self.directory)
            trial = rng.choice(sorted(running))
            what, value = next(running[trial])
            if what == "ended":
                del running[trial]
                driven.ended(trial, value)
            elif rng.randrange(100) >= self.lost:
                driven.take(trial, int(what), value)

    def _train(self, unit: Unit, driven: Engine) -> Iterator[tuple[str, Any]]:
        settings = StageSettings.model_validate(unit.stage)
        name = unit.fingerprint
        begin = self.checkpoints.get(name, 0)
        if unit.copied and not begin:
            begin = driven._find(unit.trial, "start")["from"]["step"]
        journal = driven.run_of(unit.trial).journal
        journal.parent.mkdir(parents=True, exist_ok=True)
        truncate_journal(journal, begin)
        yield str(begin), {}
        until = unit.pause_at or STEPS
        for step in range(begin + 1, until + 1):
            self.trained.append((name, step))
            if driven.stops(unit.trial):
                yield "ended", "stopped"
            score = formula(name, settings, step)
            metrics = {"val/miou": score, "val/pixel_accuracy": 1 - score}
            if step % EVALUATE_EVERY == 0:
                with journal.open("a") as file:
                    file.write(json.dumps({"step": step, "metrics": metrics}) + "\n")
            if step % CHECKPOINT_EVERY == 0 or step == until:
                self.checkpoints[name] = step
            if step % EVALUATE_EVERY == 0:
                yield str(step), metrics
        yield "ended", "paused" if unit.pause_at else "finished"
