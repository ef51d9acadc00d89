"""What a sweep does next: a function of its decision log, which it alone adds to.

The last entry of a trial says where it stands, so that a sweep which was killed at any moment goes
on as if it had not been: nothing recorded is decided again, and what is not recorded was not done.

    suggest              its values are checked and its run is named; then it starts
    start, continue      it is trained, from its run's last checkpoint
    result               it waits for a decision (of PBT: for its whole generation)
    stop                 it ends
    exploit              it starts again, from a copy of the donor's checkpoint
    end                  nothing more

Disk: each trial that runs or pauses has `checkpoint.keep` + `keep_best` checkpoints and one that is
being written; each that has ended, its last one and the `keep_best` best.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_pipeline.config import as_size
from data_pipeline.errors import DataError
from orchestrator.errors import AtrousError, CheckpointError, JobFileError
from orchestrator.files import digest
from orchestrator.job.config import StageSettings
from orchestrator.job.duration import to_steps
from orchestrator.job.space import as_text, with_values
from orchestrator.job.sweep import MULTIPLY_ADDS, Pbt, SweepJob
from orchestrator.launch.stage import PlannedStage, plan_stage
from orchestrator.runs.bill import add_bills, end, read_bill
from orchestrator.runs.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from orchestrator.runs.record import evaluated
from orchestrator.runs.run import Run, read_journal, run_directory
from orchestrator.runs.start import Start
from orchestrator.sweep import decisions
from orchestrator.sweep.decisions import Entry
from orchestrator.sweep.results import fold
from orchestrator.sweep.schedulers import boundary, decide, next_generation
from orchestrator.sweep.searchers import suggest
from orchestrator.sweep.trial import Unit

log = logging.getLogger(__name__)

_GIVE_UP = 5  # trials that all fail, before any other came to something
_MOST_REFUSED = 50  # suggestions in a row whose values are invalid
_BILL_EVERY = 5.0  # seconds


class Engine:
    """Gives out units, and takes their results.

    Args:
        job: the sweep.
        directory: where its decisions are.
        results: the last checkpoints of the stages that all trials share.
        tell: called with each new entry of the log.
        overrides: of the command line, for the record of each run.
    """

    def __init__(
        self,
        job: SweepJob,
        directory: Path,
        results: Mapping[str, Checkpoint],
        tell: Callable[[Entry], None] = lambda _: None,
        overrides: Sequence[str] = (),
    ) -> None:
        self._job, self._directory, self._results = job, directory, results
        self._tell, self._overrides = tell, overrides
        self._storage = directory.parents[1]
        self.entries = decisions.read(directory)
        self._last = {entry["trial"]: entry for entry in self.entries}
        self.running: set[int] = set()
        self._billed = (-math.inf, "")  # when, and what of the budget was used up

    def next_unit(self) -> Unit | None:
        """Work that can be done now; None: there is none before a running one ends, or no more."""
        spent = self.spent()
        self._settle(spent)
        for trial, entry in sorted(self._last.items()):
            waits = trial not in self.running and entry["kind"] != "end" and not spent
            if waits and (unit := self._unit(trial)):
                return unit
        while not spent and (values := self._next_values()) is not None:
            trial = len(self._last)
            self._add({"kind": "suggest", "trial": trial, "values": values})
            if unit := self._unit(trial):
                return unit
        return None

    def has_work(self) -> bool:
        """Whether there is anything to train; what was due of ended trials is done."""
        unit = self.next_unit()
        if unit is not None:
            self.running.discard(unit.trial)
        return unit is not None

    def take(self, trial: int, step: int, metrics: Mapping[str, float]) -> None:
        """A trial is at a step, where it was evaluated if there are metrics."""
        self._catch_up(trial, step)
        if metrics:
            self._take(trial, step, metrics)

    def _catch_up(self, trial: int, until: float = math.inf) -> None:
        """Take what nobody told of a trial, from its run's journal."""
        for line in read_journal(self.run_of(trial).journal, fold(self.entries)[trial].step):
            if line["step"] <= until and (metrics := evaluated(line["metrics"])):
                self._take(trial, line["step"], metrics)

    def _take(self, trial: int, step: int, metrics: Mapping[str, float]) -> None:
        """Record an evaluation; what is known already, or comes after a stop, is passed over."""
        if self.stops(trial) or step <= fold(self.entries)[trial].step:
            return
        start = self._find(trial, "start")
        metrics = dict(metrics) | {k: start[k] for k in (MULTIPLY_ADDS,) if k in start}
        for objective in self._job.objectives:
            if objective.metric not in metrics:
                known = ", ".join(sorted(metrics))
                raise JobFileError(
                    f"objective.metric: no {objective.metric} was evaluated; there are {known}"
                )
        wanted = {one.metric for one in self._job.objectives}
        kept = {k: v for k, v in metrics.items() if k in wanted or k.count("/") < 2}  # no classes
        self._add({"kind": "result", "trial": trial, "step": step, "metrics": kept})
        if not self._pauses(trial):
            self._decide(trial)

    def stops(self, trial: int) -> str | None:
        """Why a trial is to stop, if it is."""
        entry = self._last[trial]
        if entry["kind"] == "decide" and entry["action"] == "stop":
            return str(entry["why"])
        return "ended" if entry["kind"] == "end" else None

    def ended(self, trial: int, outcome: str, error: str = "") -> None:
        """A unit has come to its end; one that was interrupted is given out again."""
        self._catch_up(trial)
        self.running.discard(trial)
        if self.stops(trial):
            self._end(trial, self._status_of_stop(trial), "")
        elif outcome not in ("paused", "interrupted"):
            self._end(trial, outcome, error)

    def run_of(self, trial: int) -> Run:
        """The run of a trial that has started."""
        return Run(self._storage / self._find(trial, "start")["run"])

    def spent(self) -> str:
        """What of the budget is used up, of hours and money; empty: nothing."""
        budget, (when, spent) = self._job.budget, self._billed
        if not (budget.gpu_hours or budget.cost):
            return ""
        if not spent and time.monotonic() - when > _BILL_EVERY:
            runs = {entry["run"] for entry in self.entries if entry["kind"] == "start"}
            bill = add_bills([read_bill(Run(self._storage / run)) for run in sorted(runs)])
            hours, money = bill.gpu_seconds / 3600, bill.money or 0.0
            if budget.gpu_hours and hours >= budget.gpu_hours:
                spent = f"budget: {hours:.3g} of {budget.gpu_hours:g} GPU-hours are used"
            elif budget.cost and money >= budget.cost:
                spent = f"budget: {money:.2f} of {budget.cost:g} are spent"
            self._billed = (time.monotonic(), spent)
        return spent

    def stop_running(self, why: str) -> None:
        """Have all trials that run stop for good."""
        for trial in sorted(self.running):
            if not self.stops(trial):
                self._stop(trial, why)

    def _stop(self, trial: int, why: str) -> None:
        step = fold(self.entries)[trial].step
        self._add({"kind": "decide", "trial": trial, "step": step, "action": "stop", "why": why})

    def _add(self, entry: Entry) -> None:
        decisions.add(self._directory, entry)
        self.entries.append(entry)
        self._last[entry["trial"]] = entry
        self._tell(entry)

    def _find(self, trial: int, kind: str) -> Entry:
        """The last entry of a kind, which there is."""
        return next(e for e in reversed(self.entries) if e["trial"] == trial and e["kind"] == kind)

    def _settle(self, spent: str) -> None:
        """Do what was recorded or is due of the trials that do not run."""
        for trial in sorted(set(self._last) - self.running):
            if self._last[trial]["kind"] == "result" and not self._pauses(trial):
                self._decide(trial)
            begun = self._last[trial]["kind"] not in ("end", "suggest")
            if spent and begun and not self.stops(trial):
                self._stop(trial, spent)
            if self._last[trial]["kind"] != "end" and self.stops(trial):
                self._end(trial, self._status_of_stop(trial), "")
        if isinstance(self._job.scheduler, Pbt) and not self.running:
            self._settle_generation()

    def _decide(self, trial: int) -> None:
        """Decide on the trial's result, which is the last entry of the log but for those after a
        kill."""
        entry = self._last[trial]
        until = self.entries.index(entry) + 1
        decision = decide(self._job, self.entries[:until])
        self._add(decision.as_entry(trial, entry["step"]))

    def _pauses(self, trial: int) -> bool:
        """Whether its last result ends a generation of PBT."""
        entry = self._last[trial]
        if not isinstance(self._job.scheduler, Pbt) or entry["kind"] != "result":
            return False
        first = self._job.objectives[0].metric
        return self._pause_at(trial, entry["step"] - 1) == entry["step"] and math.isfinite(
            entry["metrics"][first]
        )

    def _pause_at(self, trial: int, step: int) -> int | None:
        """The step after `step` at which it pauses."""
        if not isinstance(self._job.scheduler, Pbt):
            return None
        start = self._find(trial, "start")
        return boundary(self._job.scheduler, step, start["steps"], start["evaluate_every"])

    def _settle_generation(self) -> None:
        """Decide on a generation once all of it is there, and make the copies, before any goes on.

        A kill may have come between two of these decisions: they are made from the results alone.
        """
        results = [i for i, entry in enumerate(self.entries) if entry["kind"] == "result"]
        known = self.entries[: results[-1] + 1] if results else []
        trials = {trial.number: trial for trial in fold(known)}
        alive = [t for t in sorted(self._last) if self._last[t]["kind"] != "end"]
        waiting = [t for t in alive if self._last[t]["kind"] == "result"]
        if waiting:
            if self._next_values() is not None:
                return  # the population is not complete
            step = max(trials[trial].step for trial in waiting)
            if len(trials) < len(self._last) or any(trials[t].step < step for t in alive):
                return
            for entry in next_generation(self._job, known, alive):
                if entry["trial"] in waiting:
                    self._add(entry)
        for trial in alive:
            if self._last[trial].get("action") == "exploit":
                self._start(trial)

    def _next_values(self) -> dict[str, Any] | None:
        return suggest(self._job, self.entries) if self._may_suggest() else None

    def _may_suggest(self) -> bool:
        """Whether the budget has room for one more trial, and trials come to something."""
        ended = [e for e in self.entries if e["kind"] == "end"]
        refused = sum(entry["status"] == "invalid" for entry in ended)
        limit = self._job.num_trials
        if limit is not None and len(self._last) - refused >= limit:
            return False
        last = [entry["status"] for entry in ended[-_MOST_REFUSED:]]
        if len(last) == _MOST_REFUSED and set(last) == {"invalid"}:
            return False
        came = [e["status"] for e in ended if e["status"] != "invalid"]
        return not (len(came) >= _GIVE_UP and set(came) == {"failed"})

    def _unit(self, trial: int) -> Unit | None:
        """Work on a trial, which is started if it is new; None where it waits or cannot run."""
        entry = self._last[trial]
        if entry["kind"] == "result" or (entry["kind"] == "suggest" and not self._start(trial)):
            return None
        if self._last[trial]["kind"] == "end":
            return None
        start, now = self._find(trial, "start"), fold(self.entries)[trial]
        self.running.add(trial)
        return Unit(
            trial=trial,
            stage=self._stage(trial).model_dump(mode="json"),
            storage=self._job.storage,
            data_directory=self._job.data_directory,
            results={name: str(result.path) for name, result in self._results.items()},
            fingerprint=start["fingerprint"],
            copied="from" in start,
            pause_at=self._pause_at(trial, now.step),
            overrides=self._overrides,
        )

    def _start(self, trial: int) -> bool:
        """Name the run of a trial, with the copy it goes on from; False where it cannot run."""
        decided = self._last[trial]
        try:
            planned = self._plan(trial)
            if decided["kind"] == "decide":
                planned = self._copy(planned, decided)
                self._leave(self.run_of(trial), "stopped", decided["why"])
        except ValidationError as error:
            self._end(trial, "invalid", as_text(error))
            return False
        except (AtrousError, DataError) as error:
            self._end(trial, "invalid", str(error).removeprefix(f"{self._job.tuned.name}: "))
            return False
        same = [
            entry["trial"]
            for entry in self.entries
            if entry["kind"] == "start" and entry["fingerprint"] == planned.fingerprint
        ]
        if same:
            self._end(trial, "invalid", f"would be the very run of trial {same[0]}")
            return False
        self._add(self._start_entry(trial, planned, decided))
        return True

    def _stage(self, trial: int) -> StageSettings:
        return with_values(self._job.tuned, fold(self.entries)[trial].values)

    def _plan(self, trial: int) -> PlannedStage:
        place = self._job.data_directory
        return plan_stage(self._stage(trial), self._storage, place, self._results)

    def _start_entry(self, trial: int, planned: PlannedStage, decided: Entry) -> Entry:
        stage = planned.stage
        per_epoch = planned.train.num_samples // stage.global_batch
        entry = {
            "kind": "start",
            "trial": trial,
            "run": str(planned.run.path.relative_to(self._storage)),
            "fingerprint": planned.fingerprint,
            "steps": planned.steps,
            "evaluate_every": to_steps(stage.evaluate.every, per_epoch),
        }
        if decided["kind"] == "decide":
            entry["from"] = {"trial": decided["from"], "step": decided["step"]}
        if any(one.metric == MULTIPLY_ADDS for one in self._job.objectives):
            entry[MULTIPLY_ADDS] = multiply_adds(planned)
        return entry

    def _copy(self, planned: PlannedStage, decided: Entry) -> PlannedStage:
        """Put a copy of the donor's checkpoint into a run of its own, if it is not there yet."""
        donor = self._find(decided["from"], "start")
        fingerprint = digest([planned.fingerprint, donor["fingerprint"], decided["step"]])
        run = run_directory(self._storage, planned.stage.name, fingerprint)
        if newest_checkpoint(run.checkpoints) is None:
            name = f"step-{decided['step']:08d}"
            source = read_checkpoint(self._storage / donor["run"] / "checkpoints" / name)
            state = {
                **source.state,
                "fingerprint": fingerprint,
                "parents": [as_start(source).as_json()],
            }
            write_checkpoint(
                run.checkpoints / name, source.weights(), source.optimizer(), state, source.ema()
            )
        return replace(planned, run=run, fingerprint=fingerprint)

    def _status_of_stop(self, trial: int) -> str:
        results = [e for e in self.entries if e["kind"] == "result" and e["trial"] == trial]
        first = self._job.objectives[0].metric
        return "stopped" if not results or math.isfinite(results[-1]["metrics"][first]) else "nan"

    def _end(self, trial: int, status: str, error: str) -> None:
        found = fold(self.entries)[trial]
        if found.run is not None:
            self._leave(Run(self._storage / found.run), status, found.why)
        entry = {"kind": "end", "trial": trial, "status": status, "metrics": found.metrics}
        self._add(entry | ({"error": error} if error else {}))

    def _leave(self, run: Run, status: str, why: str) -> None:
        """Close the record of a run that a killed command left open, and prune its checkpoints."""
        try:
            if run.read().get("status") == "running":
                end(run, "stopped" if status == "stopped" else "failed", reason=why)
            if newest := newest_checkpoint(run.checkpoints):
                best = self._job.tuned.checkpoint.keep_best
                prune_checkpoints(run.checkpoints, newest.path, keep=1, keep_best=best)
        except (OSError, CheckpointError) as error:
            log.warning("%s: not tidied up: %s", run.path, error)


def as_start(checkpoint: Checkpoint) -> Start:
    """A whole checkpoint as what another run starts from; the donor will delete it."""
    state = checkpoint.state
    return Start(
        weights=str(checkpoint.result),
        digest=checkpoint.digest,
        take="network",
        step=state["step"],
        fingerprint=state["fingerprint"],
        class_names=tuple(state["class_names"]),
        origin=f"a copy of {checkpoint.path.parents[1].name}, step {state['step']}",
    )


def multiply_adds(planned: PlannedStage) -> float:
    """Of one image of the training crop, in billions."""
    from model.complexity import complexity

    stage, classes = planned.stage, len(planned.train.manifest.class_names)
    found = complexity(stage.model, stage.task, classes, as_size(stage.data.train.crop))
    return round(found.multiply_adds / 1e9, 6)
