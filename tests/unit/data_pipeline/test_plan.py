"""The data plan: its promises as properties, and its cost at 300 million samples."""

import tracemalloc
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.blocks import BlockReader
from data_pipeline.dataset import Dataset
from data_pipeline.formats.sample import Sample
from data_pipeline.manifest import Manifest, read_manifest, write_manifest
from data_pipeline.plan import (
    Plan,
    SampleIndex,
    eval_indices,
    hash_words,
    sample_seed,
    slots_of_rank,
)
from data_pipeline.shards import write_shard
from data_pipeline.storage import LocalStorage

repeatable = settings(deadline=None, derandomize=True)

PINNED_HASH = 15020427595393229491
PINNED_EPOCH = [
    ((0, 2), (2, 0), (1, 0)),
    ((0, 3), (2, 1), (1, 1)),
    ((0, 4), (2, 2), (0, 1)),
    ((1, 2), (2, 3), (0, 0)),
]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    shards = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any))
    return Plan(
        shard_samples=shards,
        block_size=draw(st.integers(1, 50)),
        seed=draw(st.integers(-(2**63), 2**64)),
        global_batch=draw(st.integers(1, sum(shards))),
    )


def again(plan: Plan) -> Plan:
    """The same plan in a fresh process."""
    return Plan(
        shard_samples=tuple(plan.shard_samples),
        block_size=plan.block_size,
        seed=plan.seed,
        global_batch=plan.global_batch,
    )


def epoch_of(plan: Plan, epoch: int) -> list[list[SampleIndex]]:
    """The global batches of one epoch."""
    first = epoch * plan.steps_per_epoch
    steps = range(first, first + plan.steps_per_epoch)
    return [plan.samples(step, range(plan.global_batch)) for step in steps]


@repeatable
@given(plans(), st.integers(0, 5))
def test_an_epoch_has_each_sample_at_most_once(plan: Plan, epoch: int) -> None:
    samples = [sample for batch in epoch_of(plan, epoch) for sample in batch]
    everything = {
        SampleIndex(shard, row)
        for shard, count in enumerate(plan.shard_samples)
        for row in range(count)
    }
    assert len(samples) == len(set(samples)) == plan.steps_per_epoch * plan.global_batch
    assert set(samples) <= everything
    assert len(everything) - len(samples) < plan.global_batch


@repeatable
@given(plans(), st.integers(1, 8), st.integers(0, 200))
def test_every_world_size_reads_the_same_global_batch(plan: Plan, world: int, step: int) -> None:
    world = min(world, plan.global_batch)
    ranks = [slots_of_rank(plan.global_batch, rank, world) for rank in range(world)]
    parts = [plan.samples(step, slots) for slots in ranks]
    assert list(chain(*parts)) == plan.samples(step, range(plan.global_batch))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
    assert min(map(len, ranks)) >= 1


@repeatable
@given(plans(), st.data())
def test_a_fresh_plan_starts_anywhere(plan: Plan, data: st.DataObject) -> None:
    walked = [batch for epoch in range(3) for batch in epoch_of(plan, epoch)]
    step = data.draw(st.integers(0, len(walked) - 1))
    slot = data.draw(st.integers(0, plan.global_batch - 1))
    assert again(plan).sample(step, slot) == walked[step][slot]


@repeatable
@given(plans(), st.data())
def test_a_run_may_change_its_world_size_at_any_step(plan: Plan, data: st.DataObject) -> None:
    """Every rank has a sample at every step, and together they read the same as one alone."""
    most = min(9, plan.global_batch)
    steps = range(2 * plan.steps_per_epoch)[:60]
    for step in steps:
        world = data.draw(st.integers(1, most))
        ranks = [slots_of_rank(plan.global_batch, rank, world) for rank in range(world)]
        parts = [again(plan).samples(step, slots) for slots in ranks[:2]]
        parts += [plan.samples(step, slots) for slots in ranks[2:]]
        assert all(parts)
        assert list(chain(*parts)) == plan.samples(step, range(plan.global_batch))


@repeatable
@given(plans(), st.integers(1, 8), st.data())
def test_resuming_reads_the_tail_of_the_sequence(
    plan: Plan, world: int, data: st.DataObject
) -> None:
    """Each rank of any world size, from any step on, over the end of epochs."""
    world = min(world, plan.global_batch)
    slots = slots_of_rank(plan.global_batch, data.draw(st.integers(0, world - 1)), world)
    total = min(3 * plan.steps_per_epoch, 80)
    whole = [plan.samples(step, slots) for step in range(total)]
    start = data.draw(st.integers(0, total))
    resumed = again(plan)
    assert [resumed.samples(step, slots) for step in range(start, total)] == whole[start:]


@settings(repeatable, max_examples=20)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.integers(1, 15),
    st.integers(1, 4),
    st.data(),
)
def test_a_manifest_is_read_whole(
    shards: list[int], block: int, world: int, data: st.DataObject
) -> None:
    """From files: the keys that all ranks read in an epoch are of different samples of it."""
    batch = data.draw(st.integers(1, sum(shards)))
    with TemporaryDirectory() as place:
        dataset = write_keys(Path(place), shards)
        plan = Plan(
            shard_samples=dataset.shard_samples, block_size=block, seed=0, global_batch=batch
        )
        world = min(world, batch)
        keys = []
        for rank in range(world):
            slots = slots_of_rank(batch, rank, world)
            with BlockReader(dataset, block, 2) as reader:
                for step in range(plan.steps_per_epoch):
                    keys += [reader.read(*sample).key for sample in plan.samples(step, slots)]
    assert len(keys) == len(set(keys)) == plan.steps_per_epoch * batch
    assert set(keys) <= {f"{shard}-{row}" for shard, n in enumerate(shards) for row in range(n)}


def write_keys(directory: Path, shards: Sequence[int]) -> Dataset:
    """A data set whose keys say where a sample lies."""
    storage, written, tables = LocalStorage(directory), [], []
    for shard, count in enumerate(shards):
        samples = [
            Sample(
                key=f"{shard}-{row}", image=b"\xff", image_extension="jpg", label=b"0",
                label_extension="cls", width=1, height=1, labels=(0,),
            )
            for row in range(count)
        ]  # fmt: skip
        one, table = write_shard(storage, f"{shard}.tar", samples)
        written.append(one)
        tables.append(table)
    manifest = Manifest(
        dataset="keys", split="train", task="classification", class_names=("a",),
        ignore_label=None, shards=tuple(written),
    )  # fmt: skip
    write_manifest(directory, manifest, tables)
    return Dataset(read_manifest(directory))


@repeatable
@given(plans(), st.integers(0, 3))
def test_a_slot_reads_a_block_in_one_go(plan: Plan, epoch: int) -> None:
    batches = epoch_of(plan, epoch)
    for slot in range(plan.global_batch):
        blocks = [(batch[slot].shard, batch[slot].row // plan.block_size) for batch in batches]
        changes = sum(a != b for a, b in pairwise(blocks))
        assert changes == len(set(blocks)) - 1


@repeatable
@given(plans(), st.integers(0, 3))
def test_whole_blocks_lie_together_in_the_permuted_sequence(plan: Plan, epoch: int) -> None:
    batches = epoch_of(plan, epoch)
    sequence = [batch[slot] for slot in range(plan.global_batch) for batch in batches]
    blocks = [(sample.shard, sample.row // plan.block_size) for sample in sequence]
    changes = sum(a != b for a, b in pairwise(blocks))
    assert changes == len(set(blocks)) - 1


def test_epochs_and_seeds_differ_in_block_order_and_row_order() -> None:
    def walk(seed: int, epoch: int) -> list[list[SampleIndex]]:
        plan = Plan(shard_samples=[64] * 8, block_size=16, seed=seed, global_batch=4)
        return epoch_of(plan, epoch)

    walks = [walk(0, 0), walk(0, 1), walk(1, 0), walk(1, 1), walk(-1, 0)]
    assert all(a != b for i, a in enumerate(walks) for b in walks[:i])
    orders = [[batch[0].row % 16 for batch in w[:16]] for w in walks]
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert list(range(16)) not in orders


def test_the_order_is_pinned() -> None:
    """A release that changes this changes every running experiment: never without a decision."""
    plan = Plan(shard_samples=[5, 3, 4], block_size=2, seed=7, global_batch=3)
    assert hash_words(1, 2, 3) == PINNED_HASH
    assert [tuple(map(tuple, batch)) for batch in epoch_of(plan, 1)] == PINNED_EPOCH


@pytest.mark.parametrize("num_blocks", [1, 65_536, 70_001])
def test_blocks_are_in_the_order_of_their_hashes(num_blocks: int) -> None:
    """The definition of the order, for numbers of blocks that are worked through in parts."""
    plan = Plan(shard_samples=[num_blocks], block_size=1, seed=5, global_batch=num_blocks)
    key = hash_words(1, 5, 2)  # 1: order of blocks; epoch 2
    rows = [sample.row for sample in plan.samples(2, range(num_blocks))]
    assert rows == sorted(range(num_blocks), key=lambda block: hash_words(block ^ key))


def test_positions_of_a_sample_are_uniform() -> None:
    """Over 2,000 epochs each of 16 samples comes first about equally often (chi-square, 99.9 %)."""
    plan = Plan(shard_samples=[16], block_size=1, seed=3, global_batch=1)
    first = [plan.sample(16 * epoch, 0).row for epoch in range(2000)]
    counts = np.bincount(first, minlength=16)
    assert ((counts - 125) ** 2 / 125).sum() < 37.7


@pytest.mark.parametrize(
    ("shards", "block", "batch", "steps"),
    [
        ([8], 3, 8, 1),  # N == batch
        ([9], 100, 4, 2),  # block bigger than the shard, one sample left over
        ([1] * 100, 64, 10, 10),  # many tiny shards
        ([0, 5, 0], 2, 1, 5),  # empty shards
    ],
)
def test_edges(shards: list[int], block: int, batch: int, steps: int) -> None:
    plan = Plan(shard_samples=shards, block_size=block, seed=0, global_batch=batch)
    samples = [sample for step in epoch_of(plan, 0) for sample in step]
    assert plan.steps_per_epoch == steps
    assert len(set(samples)) == steps * batch


def test_too_few_samples_name_both_numbers_and_the_cure() -> None:
    with pytest.raises(ValueError, match=r"7 samples .* global batch of 8; lower global_batch"):
        Plan(shard_samples=[3, 4], block_size=1, seed=0, global_batch=8)


@pytest.mark.parametrize(("block", "batch"), [(0, 1), (1, 0)])
def test_sizes_below_one_are_refused(block: int, batch: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Plan(shard_samples=[3], block_size=block, seed=0, global_batch=batch)


@pytest.mark.parametrize(("step", "slot"), [(-1, 0), (0, 4), (0, -1)])
def test_outside_the_plan_is_refused(step: int, slot: int) -> None:
    plan = Plan(shard_samples=[8], block_size=1, seed=0, global_batch=4)
    with pytest.raises(ValueError, match="outside a global batch of 4"):
        plan.sample(step, slot)


def test_more_ranks_than_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="9 workers cannot share a global batch of 8"):
        slots_of_rank(8, 0, 9)
    with pytest.raises(ValueError, match="rank 4 is outside a world of 4"):
        slots_of_rank(8, 4, 4)


@repeatable
@given(st.integers(0, 100), st.integers(1, 20))
def test_evaluation_reads_each_sample_once(samples: int, world: int) -> None:
    parts = [list(eval_indices(samples, rank, world)) for rank in range(world)]
    assert list(chain(*parts)) == list(range(samples))


def test_sample_seeds_differ_in_every_argument() -> None:
    seeds = {
        sample_seed(seed, epoch, shard, row)
        for seed in range(6)
        for epoch in range(6)
        for shard in range(6)
        for row in range(6)
    }
    assert len(seeds) == 6**4
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_300_million_samples_fit_in_40_megabytes() -> None:
    shards = [15_000] * 20_000
    tracemalloc.start()
    try:
        plan = Plan(shard_samples=shards, block_size=128, seed=0, global_batch=1024)
        plan.samples(123_456, range(256))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert plan.num_samples == 300_000_000
    assert peak < 40e6
