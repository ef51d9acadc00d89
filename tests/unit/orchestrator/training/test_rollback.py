"""A step whose loss is not finite: located, gone back from, passed over; killed or not."""

import errno
import json
import math
import os
import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from data_pipeline.loader import Batch
from data_pipeline.plan import Plan
from model.build import build_network
from model.losses import sigmoid_cross_entropy
from orchestrator.errors import NonFiniteError, StageFailed
from orchestrator.files import write_json
from orchestrator.job.config import StageSettings
from orchestrator.launch.stage import PlannedStage, StageResult, open_run, plan_stage, train_stage
from orchestrator.runs import run_writer
from orchestrator.runs.checkpoint import checkpoint_paths, read_checkpoint, save_checkpoint
from orchestrator.runs.run import Run, append_journal, read_journal
from orchestrator.training import rollback, worker
from orchestrator.training.learner import Learner
from orchestrator.training.meters import Meters
from orchestrator.training.place import Place
from orchestrator.training.rollback import (
    ROLLBACKS,
    TROUBLE,
    Window,
    agreed_windows,
    first_trained,
    read_windows,
    roll_back,
    with_gaps,
)
from orchestrator.training.task import Loss, make_loss
from orchestrator.training.train_state import make_state
from tests.unit.orchestrator.jobs import stage


def plan(root: Path, storage: Path, **changes: Any) -> PlannedStage:
    """A stage with checkpoints after steps 2, 4, 6, 8."""
    settings = stage("tiny", "classification", "tiny-imagenet", **({"steps": 8} | changes))
    return plan_stage(StageSettings.model_validate(settings), storage, str(root))


def run(planned: PlannedStage) -> StageResult:
    open_run(planned)
    return train_stage(planned)


def series(planned: PlannedStage) -> list[tuple[int, dict[str, float]]]:
    """What the journal says, without the timings."""
    untimed = ("train/loss", "train/lr", "train/gradient_norm", "train/rollbacks", "val/")
    return [
        (
            record["step"],
            {k: v for k, v in record["metrics"].items() if k.startswith(untimed)},
        )
        for record in read_journal(planned.run.journal)
    ]


def windows(planned: PlannedStage) -> list[tuple[int, int]]:
    return [(window.start, window.stop) for window in read_windows(planned.run)]


def die(*_: Any) -> None:
    raise KeyboardInterrupt("killed")


def die_at(step: int, what: Callable[..., None] = append_journal) -> Callable[..., None]:
    def log(path: Path, record: dict[str, Any]) -> None:
        what(path, record)
        if "metrics" in record and record["step"] == step:
            die()

    return log


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the loss of some steps NaN, or the gradient of some infinite."""

    def inject(*steps: int, gradients: tuple[int, ...] = ()) -> None:
        def make(*arguments: Any) -> Loss:
            good = make_loss(*arguments)

            def loss(outputs: torch.Tensor, labels: torch.Tensor, step: int) -> Any:
                if step in gradients:
                    outputs.register_hook(lambda gradient: gradient * math.inf)
                total, count = good(outputs, labels, step)
                return total * math.nan if step in steps else total, count

            return loss

        monkeypatch.setattr(worker, "make_loss", make)

    return inject


Poison = Callable[..., None]


def read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """What all workers agreed on in a step is read during the next one, as on a GPU."""
    make = Learner.__init__

    def make_late(self: Learner, *arguments: Any) -> None:
        make(self, *arguments)
        self._lag = 1

    monkeypatch.setattr(Learner, "__init__", make_late)


@pytest.mark.parametrize(
    ("bad", "expected", "late"),
    [
        ([0], [(0, 1)], False),  # no checkpoint yet
        ([3], [(2, 4)], True),
        ([4], [(4, 5)], True),
        ([7], [(6, 8)], True),  # nothing is left to train
        ([3, 5], [(2, 4), (4, 6)], False),
        ([4, 5], [(4, 5), (4, 6)], True),  # the next step is bad too
    ],
)
def test_the_steps_since_the_last_checkpoint_are_passed_over(
    tiny_data: Path,
    tmp_path: Path,
    poison: Poison,
    bad: list[int],
    expected: list[tuple[int, int]],
    late: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if late:
        read_late(monkeypatch)
    poison(*bad)
    poisoned = plan(tiny_data, tmp_path / "poisoned")
    result = run(poisoned)
    assert windows(poisoned) == expected
    assert result.checkpoint.step == 8
    assert all(tensor.isfinite().all() for tensor in result.checkpoint.weights().values())
    passed = {step for start, stop in expected for step in range(start, stop)}
    logged = {step - 1 for step, metrics in series(poisoned) if "train/loss" in metrics}
    assert logged == set(range(8)) - passed

    # The same as a run that never saw the bad steps.
    poison()
    clean = plan(tiny_data, tmp_path / "clean")
    clean.run.path.mkdir(parents=True)
    (clean.run.path / ROLLBACKS).write_text((poisoned.run.path / ROLLBACKS).read_text())
    assert run(clean).checkpoint.digest == result.checkpoint.digest
    assert series(clean) == series(poisoned)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_samples_of_the_bad_step_are_named(
    tiny_data: Path, tmp_path: Path, poison: Poison, what: str
) -> None:
    poison(*([3] if what == "loss" else []), gradients=(3,) if what == "gradient" else ())
    planned = plan(tiny_data, tmp_path)
    run(planned)
    (window,) = read_windows(planned.run)
    assert (window.start, window.stop, window.what) == (2, 4, what)
    samples = Plan(
        shard_samples=planned.train.shard_samples,
        block_size=planned.stage.data.train.block_size,
        seed=0,
        global_batch=8,
    ).samples(3, range(8))
    assert window.samples == {"0": [planned.train.read(*index).key for index in samples]}


@pytest.mark.parametrize("step", [2, 3, 5, 8])
def test_killed_at_any_step_equals_undisturbed(
    tiny_data: Path, tmp_path: Path, poison: Poison, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(3, 5)  # windows 2-3 and 4-5; step 3 is logged before the run goes back, 5 never again
    whole, killed = (plan(tiny_data, tmp_path / name) for name in ("whole", "killed"))
    expected = run(whole)
    monkeypatch.setattr(run_writer, "append_journal", die_at(step))
    with pytest.raises(KeyboardInterrupt):
        run(killed)
    monkeypatch.setattr(run_writer, "append_journal", append_journal)
    assert run(killed).checkpoint.digest == expected.checkpoint.digest
    assert series(killed) == series(whole)
    assert read_windows(killed.run) == read_windows(whole.run)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_while_it_goes_back_equals_undisturbed(
    tiny_data: Path, tmp_path: Path, poison: Poison, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after the window is recorded."""
    poison(3)
    whole, killed = (plan(tiny_data, tmp_path / name) for name in ("whole", "killed"))
    expected = run(whole)

    def write(path: Path, content: Any) -> None:
        if moment == "after":
            write_json(path, content)
        die()

    monkeypatch.setattr(rollback, "write_json", write)
    with pytest.raises(KeyboardInterrupt):
        run(killed)
    monkeypatch.setattr(rollback, "write_json", write_json)
    assert windows(killed) == ([(2, 4)] if moment == "after" else [])
    assert run(killed).checkpoint.digest == expected.checkpoint.digest
    assert series(killed) == series(whole)
    assert read_windows(killed.run) == read_windows(whole.run)


def test_a_window_that_cannot_be_recorded_is_told(
    tiny_data: Path, tmp_path: Path, poison: Poison
) -> None:
    """A full disk does not hide the loss; with room again, the same command goes on."""
    poison(3)
    whole, full = (plan(tiny_data, tmp_path / name) for name in ("whole", "full"))
    expected = run(whole)

    full_disk = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    told = r"the loss of step 3 is not finite .*recorded in .*No space left.* goes on from step 2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollback, "write_json", full_disk)
        with pytest.raises(StageFailed, match=told):
            run(full)
    assert run(full).checkpoint.digest == expected.checkpoint.digest
    assert series(full) == series(whole)


def test_a_window_ahead_of_an_older_checkpoint_is_passed_over_again(
    tiny_data: Path, tmp_path: Path, poison: Poison
) -> None:
    poison(5)
    planned = plan(tiny_data, tmp_path)
    newest = run(planned).checkpoint
    before = series(planned)
    for path in checkpoint_paths(planned.run.checkpoints):
        (path / "model.safetensors").write_bytes(b"rot")
    poison()
    again = run(planned).checkpoint
    assert again.digest == newest.digest
    assert series(planned) == before


def test_a_rate_that_diverges_fails_with_a_report(tiny_data: Path, tmp_path: Path) -> None:
    checkpoint = {"every": 2, "max_rollbacks": 2}
    planned = plan(tiny_data, tmp_path, optimizer={"lr": 1e30}, steps=40, checkpoint=checkpoint)
    with pytest.raises(
        StageFailed,
        match=r"of step \d+ is not finite .*max_rollbacks: 2 allows.*lower optimizer\.lr",
    ) as failure:
        run(planned)
    report = json.loads((planned.run.path / TROUBLE).read_text())
    assert str(planned.run.path / TROUBLE) in str(failure.value)
    assert len(report["windows"]) == 3
    assert len(windows(planned)) == 2
    assert all(window["samples"]["0"] for window in report["windows"])
    for path in checkpoint_paths(planned.run.checkpoints):
        weights = read_checkpoint(path).weights()
        assert all(tensor.isfinite().all() for tensor in weights.values())


def test_one_more_rollback_may_be_allowed_to_a_run_that_failed(
    tiny_data: Path, tmp_path: Path, poison: Poison
) -> None:
    poison(3)
    none = plan(tiny_data, tmp_path, checkpoint={"every": 2, "max_rollbacks": 0})
    with pytest.raises(StageFailed, match="max_rollbacks: 0 allows"):
        run(none)
    one = plan(tiny_data, tmp_path, checkpoint={"every": 2, "max_rollbacks": 1})
    assert one.run.path == none.run.path
    assert run(one).checkpoint.step == 8


def test_a_run_that_failed_for_good_is_not_trained_again_in_the_same_attempt(
    tiny_data: Path, tmp_path: Path, poison: Poison
) -> None:
    """Ray Train starts workers again after an error."""
    poison(3)
    planned = plan(tiny_data, tmp_path, checkpoint={"every": 2, "max_rollbacks": 0})
    with pytest.raises(StageFailed, match="max_rollbacks: 0 allows"):
        run(planned)
    poison()
    with pytest.raises(StageFailed, match="max_rollbacks: 0 allows"):
        train_stage(planned)
    assert run(planned).checkpoint.step == 8


def test_workers_of_a_run_that_is_given_up_end_without_an_error(
    tiny_data: Path, tmp_path: Path, poison: Poison, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error Ray Train would start them `max_failures` times again."""
    train_worker, ended = worker.train_worker, list[str]()

    def watched(config: dict[str, Any]) -> None:
        train_worker(config)
        ended.append("without an error")

    monkeypatch.setattr(worker, "train_worker", watched)
    poison(3)
    planned = plan(tiny_data, tmp_path, checkpoint={"every": 2, "max_rollbacks": 0})
    with pytest.raises(StageFailed, match="max_rollbacks: 0 allows"):
        run(planned)
    assert ended == ["without an error"]


def test_running_statistics_that_are_not_finite_are_never_kept(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Learner.update

    def spoil(self: Learner, step: int, *rest: Any) -> None:
        update(self, step, *rest)
        if step == 3:
            next(b for b in self._state.network.buffers() if b.ndim)[0] = math.inf

    monkeypatch.setattr(Learner, "update", spoil)
    planned = plan(tiny_data, tmp_path, evaluate={"every": 8})
    weights = run(planned).checkpoint.weights()
    assert [(w.start, w.stop, w.what) for w in read_windows(planned.run)] == [(2, 4, "weights")]
    assert all(tensor.isfinite().all() for tensor in weights.values())


ALONE = Place(rank=0, world=1, device=torch.device("cpu"))


def saved(directory: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(directory, {"w": torch.zeros(1)}, {}, {"step": step})


@pytest.mark.parametrize(
    ("steps", "bad", "start", "left"),
    [
        ((4, 8), 9, 8, {4, 8}),
        ((4, 6), 7, 4, {4}),  # 6 is of a stop: an undisturbed run has none
        ((6,), 7, 6, {6}),  # but better than nothing
        ((3,), 3, 0, set()),  # as an undisturbed run, which has none yet
        ((), 9, 0, set()),
    ],
)
def test_where_a_run_goes_back_to(
    tiny_data: Path, tmp_path: Path, steps: tuple[int, ...], bad: int, start: int, left: set[int]
) -> None:
    planned = plan(tiny_data, tmp_path)
    open_run(planned)
    saved(planned.run.checkpoints, *steps)
    error = NonFiniteError(bad, "loss", here=True)
    roll_back(planned.run, ALONE, 4, planned.stage, error, ["a"])
    assert read_windows(planned.run) == [
        Window(start=start, stop=bad + 1, what="loss", samples={"0": ["a"]})
    ]
    assert {read_checkpoint(p).step for p in checkpoint_paths(planned.run.checkpoints)} == left


def test_gaps_in_the_batches() -> None:
    two = [Window(start=s, stop=e, what="loss", samples={}) for s, e in ((2, 4), (6, 7))]
    assert [first_trained(start, two) for start in range(8)] == [0, 1, 4, 4, 4, 5, 7, 7]
    batches: Any = iter([4, 5, 6, 7])
    given = list(islice(with_gaps(batches, 2, two), 7))
    assert given == [None, None, 4, 5, None, 7, None]


def test_the_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(NonFiniteError(3, "loss", here=True)))
    assert (error.step, error.what, error.here) == (3, "loss", True)
    assert str(error) == "the loss of step 3 is not finite"


def one_of_two(rank: int, run_path: str) -> None:
    """A step whose loss is NaN on worker 1 alone."""
    torch.set_num_threads(1)
    rendezvous = f"file://{run_path}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    place = Place(rank=rank, world=2, device=torch.device("cpu"))
    settings = StageSettings.model_validate(stage("tiny", "classification", "tiny-imagenet"))
    network = build_network(settings.model, "classification", 3)
    good = sigmoid_cross_entropy

    def loss(outputs: torch.Tensor, labels: torch.Tensor, step: int) -> Any:
        total, count = good(outputs, labels)
        return total * math.nan if (rank, step) == (1, 5) else total, count

    batch = Batch(
        images=torch.zeros(4, 3, 33, 33, dtype=torch.uint8),
        labels=torch.zeros(4, 3),
        keys=tuple(f"{rank}-{i}" for i in range(4)),
    )
    meters = Meters(SimpleNamespace(wait_seconds=0.0), 8, place.device)  # type: ignore[arg-type]
    state = make_state(network, settings, place)
    learner = Learner(state, settings, place, loss, meters, asked_to_stop=lambda: False)
    learner.update(4, batch, 0.1)
    with pytest.raises(NonFiniteError) as error:
        learner.update(5, batch, 0.1)
    roll_back(Run(Path(run_path)), place, 2, settings, error.value, batch.keys)
    assert [w.stop for w in agreed_windows(Run(Path(run_path)), place)] == [6]
    dist.barrier()
    dist.destroy_process_group()


def test_the_worker_with_the_bad_loss_is_named(tmp_path: Path) -> None:
    Run(tmp_path).update(attempts=1)
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    (window,) = read_windows(Run(tmp_path))
    assert window.samples == {"1": [f"1-{i}" for i in range(4)]}
    assert "workers: 1;" in str(window)
