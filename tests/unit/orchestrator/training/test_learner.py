"""The gradient is that of the global batch, however it is cut over workers and passes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loader import Batch
from data_pipeline.plan import slots_of_rank
from model.build import build_network
from model.losses import sigmoid_cross_entropy, softmax_cross_entropy
from model.sync_batch_norm import synchronize_batch_norm
from orchestrator.errors import NonFiniteError
from orchestrator.job.config import Precision, StageSettings
from orchestrator.training.learner import Learner
from orchestrator.training.place import Place, set_precision
from orchestrator.training.train_state import make_state
from tests.unit.orchestrator.jobs import MODEL, SEGMENTER, stage

FROZEN = {"batch_norm": {"frozen": True}}
SYNCED = {"batch_norm": {"sync": True}, "image_level_features": False}
WORLDS = {2: "two", 3: "three"}
# name -> changes of the stage; synchronised statistics are those of a pass, so there the passes of
# one worker are given the samples that the passes of two and three have.
CASES: dict[str, dict[str, Any]] = {
    "whole parts": {"model": FROZEN},
    "passes of one": {"model": FROZEN, "micro_batch": 1},
    "passes of two": {"model": FROZEN, "micro_batch": 2},
    "synchronised": {"model": SYNCED},
    "synchronised, passes of one": {"model": SYNCED, "micro_batch": 1},
}


def settings(model: dict[str, Any], **changes: Any) -> StageSettings:
    still = SEGMENTER | {"dropout": 0.0} | model
    optimizer = {"lr": 0.002, "lr_multipliers": {"logits.bias": 2.0}, "weight_decay": 0.01}
    merged = {"model": still, "optimizer": optimizer, "global_batch": 5} | changes
    return StageSettings.model_validate(stage("tiny", "segmentation", "tiny-voc", **merged))


def place(rank: int = 0, world: int = 1, dtype: torch.dtype | None = None) -> Place:
    return Place(rank=rank, world=world, device=torch.device("cpu"), autocast_dtype=dtype)


def global_batches(order: tuple[int, ...] = (0, 1, 2, 3, 4)) -> Iterator[tuple[Tensor, Tensor]]:
    """Three steps of five images whose shares of labelled pixels differ much."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        images = torch.randint(256, (5, 3, 33, 33), generator=generator, dtype=torch.uint8)
        labels = torch.randint(3, (5, 33, 33), generator=generator, dtype=torch.uint8)
        ignored = torch.rand(labels.shape, generator=generator)
        labels[ignored < torch.tensor([0.0, 0.9, 0.5, 1.0, 0.2]).view(5, 1, 1)] = 255
        channels_last = images.contiguous(memory_format=torch.channels_last)
        yield channels_last[list(order)], labels[list(order)]


class Sums:
    """What a learner tells the meters."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def add(self, total: Tensor, count: Tensor, norm: Tensor) -> None:
        self.losses.append(float(total / count))
        self.norms.append(float(norm))


def loss(logits: Tensor, labels: Tensor, _: int) -> tuple[Tensor, Tensor]:
    return softmax_cross_entropy(logits, labels, 255)


def make_learner(config: StageSettings, where: Place, **changes: Any) -> Learner:
    torch.manual_seed(0)
    network = build_network(config.model, config.task, 3)
    if config.model.batch_norm.sync:
        synchronize_batch_norm(network)
    network.to(where.device).to(memory_format=torch.channels_last)
    state = make_state(network, config, where)
    options = {"loss": loss, "meters": Sums(), "asked_to_stop": lambda: False} | changes
    return Learner(state, config, where, **options)


def batch(images: Tensor, labels: Tensor) -> Batch:
    keys = tuple(str(i) for i in range(len(images)))
    return Batch(images=images, labels=labels, keys=keys, bad=())


def learn(
    config: StageSettings, where: Place, order: tuple[int, ...] = (0, 1, 2, 3, 4)
) -> dict[str, Any]:
    """What three steps leave behind."""
    learner = make_learner(config, where)
    slots = slots_of_rank(5, where.rank, where.world)
    for step, (images, labels) in enumerate(global_batches(order)):
        part = batch(images[slots.start : slots.stop], labels[slots.start : slots.stop])
        learner.update(step, part, config.optimizer.lr)
    sums: Any = learner._meters
    weights = dict(learner._state.network.named_parameters())
    return {"losses": sums.losses, "norms": sums.norms} | {
        name: parameter.detach().cpu() for name, parameter in weights.items()
    }


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    for world, name in WORLDS.items():
        if rank < world:
            dist.init_process_group(
                "gloo", init_method=f"file://{directory}/{name}", rank=rank, world_size=world
            )
            found = {case: learn(settings(**c), place(rank, world)) for case, c in CASES.items()}
            torch.save(found, f"{directory}/{name}-{rank}.pt")
            dist.barrier()
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_workers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """The results of all cases, of each worker of two and of three."""
    directory = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(worker, args=(str(directory),), nprocs=3)
    return {
        world: [torch.load(directory / f"{name}-{rank}.pt") for rank in range(world)]
        for world, name in WORLDS.items()
    }


def assert_equal_up_to_rounding(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            torch.as_tensor(found[name]),
            torch.as_tensor(value),
            rtol=1e-4,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_any_number_of_workers_takes_the_steps_of_one(
    by_workers: dict[int, list[dict[str, Any]]], world: int, case: str
) -> None:
    """Parts of 2 and 3, and of 1, 2 and 2; one image has no labels at all."""
    first, *others = (results[case] for results in by_workers[world])
    for other in others:
        for name, value in first.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name
    changes, order = CASES[case], (0, 1, 2, 3, 4)
    if case == "synchronised, passes of one":
        # Two: the passes are 0 and 2, 1 and 3, none and 4. Three: 0, 1 and 3, then none, 2 and 4.
        order, size = ((0, 2, 1, 3, 4), 2) if world == 2 else ((0, 1, 3, 2, 4), 3)
        changes = changes | {"micro_batch": size}
    assert_equal_up_to_rounding(first, learn(settings(**changes), place(), order))


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])
def test_passes_take_the_step_of_the_whole_batch(micro_batch: int) -> None:
    whole = learn(settings(FROZEN), place())
    assert_equal_up_to_rounding(learn(settings(FROZEN, micro_batch=micro_batch), place()), whole)


WEIGHTED = torch.tensor([0.5, 1.0, 3.0])
IMAGE_LABELS = {
    "classification": (
        torch.tensor([0, 2, 1, 2, 0]),
        lambda *_: softmax_cross_entropy(*_[:2], None, class_weights=WEIGHTED, label_smoothing=0.1),
    ),
    "multilabel": (
        torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0]]),
        lambda *_: sigmoid_cross_entropy(*_[:2]),
    ),
}


@pytest.mark.parametrize("task", IMAGE_LABELS)
def test_passes_of_weighted_and_of_many_labels(task: str) -> None:
    labels, of_task = IMAGE_LABELS[task]
    images, _ = next(global_batches())
    found = []
    for micro_batch in (None, 2):
        model = MODEL | FROZEN | {"dropout": 0.0}
        changes = {"model": model, "global_batch": 5, "micro_batch": micro_batch}
        config = StageSettings.model_validate(stage("tiny", task, "tiny-imagenet", **changes))
        learner = make_learner(config, place(), loss=of_task)
        learner.update(0, batch(images, labels), 0.05)
        sums: Any = learner._meters
        found.append({"losses": sums.losses, "norms": sums.norms} | parameters(learner))
    assert_equal_up_to_rounding(*found)


def update(learner: Learner, step: int = 0) -> None:
    learner.update(step, batch(*next(global_batches())), 1.0)


def values_of(*learners: Learner) -> list[list[Tensor]]:
    return [list(parameters(learner).values()) for learner in learners]


def parameters(learner: Learner) -> dict[str, Tensor]:
    named = learner._state.network.named_parameters()
    return {name: parameter.detach().clone() for name, parameter in named}


def test_the_gradient_is_clipped_to_its_norm() -> None:
    plain = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    learner = make_learner(settings(FROZEN, optimizer=plain | {"clip_norm": 0.001}), place())
    before = parameters(learner)
    update(learner)
    moved = [value - before[name] for name, value in parameters(learner).items()]
    assert torch.nn.utils.get_total_norm(moved).item() == pytest.approx(0.001, rel=1e-3)
    sums: Any = learner._meters
    assert sums.norms[0] > 0.005  # what the meters have is the norm before


def test_rates_of_zero_keep_parts_as_they_are() -> None:
    optimizer = {"lr": 1.0, "lr_multipliers": {"backbone": 0.0}}
    learner = make_learner(settings(FROZEN, optimizer=optimizer), place())
    before = parameters(learner)
    update(learner)
    moved = {n.split(".")[0] for n, p in parameters(learner).items() if not p.equal(before[n])}
    assert moved == {"aspp", "decoder", "logits"}


def test_not_finite_in_float32_is_an_error() -> None:
    learner = make_learner(settings(FROZEN), place(), loss=lambda *_: _poisoned(loss(*_), "loss"))
    with pytest.raises(NonFiniteError, match="the loss of step 4 is not finite"):
        update(learner, 4)
    learner = make_learner(settings(FROZEN), place(), loss=lambda *_: _poisoned(loss(*_), "grad"))
    with pytest.raises(NonFiniteError, match="the gradient of step 5 is not finite"):
        update(learner, 5)


def _poisoned(found: tuple[Tensor, Tensor], what: str) -> tuple[Tensor, Tensor]:
    total, count = found
    if what == "loss":
        return total * torch.nan, count
    total.register_hook(lambda gradient: gradient * torch.inf)
    return total, count


def test_float16_takes_the_steps_of_float32() -> None:
    exact = learn(settings(FROZEN), place())
    half = learn(settings(FROZEN), place(dtype=torch.float16))
    torch.testing.assert_close(half["losses"], exact["losses"], rtol=1e-2, atol=0)
    torch.testing.assert_close(half["norms"], exact["norms"], rtol=5e-2, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(
    ("precision", "error"),
    [("float32", 1e-4), ("tf32", 1e-2), ("bfloat16", 5e-2), ("float16", 1e-2)],
)
def test_a_gpu_takes_the_steps_of_a_cpu(precision: Precision, error: float) -> None:
    device = torch.device("cuda", 0)
    dtype = set_precision(precision, device)
    config = settings(FROZEN, micro_batch=2, ema={})
    found = learn(config, Place(rank=0, world=1, device=device, autocast_dtype=dtype))
    expected = learn(config, place())
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=error, atol=0)
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=10 * error, atol=0)


def test_an_overflow_in_float16_lowers_the_loss_scale() -> None:
    learner = make_learner(settings(FROZEN), place(dtype=torch.float16))
    state = learner._state
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 2.0**60})
    before = parameters(learner)
    update(learner)
    assert all(value.equal(before[name]) for name, value in parameters(learner).items())
    assert learner.read() == {"train/loss_scale": 2.0**59}
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 1024.0})
    update(learner, 1)
    assert learner.read() == {"train/loss_scale": 1024.0}
    assert not all(value.equal(before[name]) for name, value in parameters(learner).items())


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_overflow_in_the_first_step_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.full_like(like, torch.nan))
    config = settings(FROZEN, optimizer={"name": name, "lr": 0.1})
    learner = make_learner(config, place(dtype=torch.float16))
    fresh, scaler = make_learner(config, place(dtype=torch.float16)), learner._state.scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**60})
    update(learner)
    for value, before in zip(*values_of(learner, fresh), strict=True):
        assert value.equal(before)
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**16})
    for one in (learner, fresh):
        update(one)
    for value, expected in zip(*values_of(learner, fresh), strict=True):
        assert value.equal(expected)


def test_a_loss_scale_that_collapses_is_an_error() -> None:
    poisoned = {"loss": lambda *_: _poisoned(loss(*_), "grad")}
    learner = make_learner(settings(FROZEN), place(dtype=torch.float16), **poisoned)
    for step in range(16):
        update(learner, step)
    with pytest.raises(NonFiniteError, match="whatever the loss scale of float16, of step 16"):
        update(learner, 16)  # from 2 ** 16 down to below 1
    learner = make_learner(
        settings(FROZEN),
        place(dtype=torch.float16),
        loss=lambda *_: _poisoned(loss(*_), "loss"),
    )
    with pytest.raises(NonFiniteError, match="the loss of step 0"):
        update(learner)


def test_the_average_is_evaluated_without_a_copy() -> None:
    learner = make_learner(settings(FROZEN, ema={"decay": 0.5}), place())
    state = learner._state
    assert state.average is not None
    start = parameters(learner)
    for step in range(2):
        update(learner, step)
    trained, averaged = parameters(learner), state.averaged_weights
    assert averaged is not None
    tensors = {name: p.data_ptr() for name, p in state.network.named_parameters()}
    with learner.evaluating():
        inside = parameters(learner)
        for name, parameter in state.network.named_parameters():
            assert parameter.data_ptr() != tensors[name]
            assert not inside[name].equal(trained[name]) or trained[name].equal(start[name])
    assert {name: p.data_ptr() for name, p in state.network.named_parameters()} == tensors
    assert all(value.equal(trained[name]) for name, value in parameters(learner).items())
    with pytest.raises(KeyboardInterrupt), learner.evaluating():
        raise KeyboardInterrupt
    assert all(value.equal(trained[name]) for name, value in parameters(learner).items())
    assert averaged.keys() == state.network.state_dict().keys()
    assert all(averaged[name].equal(value) for name, value in inside.items())
    update(learner, 2)
    assert not all(value.equal(trained[name]) for name, value in parameters(learner).items())


def test_blocks_are_compiled_for_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """And again after an evaluation, in which timm's may have been built anew."""
    compiled: list[object] = []
    monkeypatch.setattr("orchestrator.training.learner.compile_blocks", compiled.append)
    learner = make_learner(settings(FROZEN), place())
    with learner.evaluating():
        pass
    assert compiled == []
    learner = make_learner(settings(FROZEN, compile=True), place())
    assert compiled == [learner._state.network]
    runs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        runs.append("compiled")
        return graph

    doubled = torch.compile(lambda x: 2 * x, backend=backend)
    with learner.evaluating():
        doubled(torch.ones(1))
        assert not runs
    doubled(torch.ones(1))
    assert runs == ["compiled"]
    assert compiled == [learner._state.network] * 2
