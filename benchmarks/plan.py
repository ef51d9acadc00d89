"""The data plan at 300 million samples in 20,000 shards and 4,096 ranks, and how well it shuffles.

Cost: a fresh process opens a manifest of that size, makes the plan, seeks to a random step of a
random rank and loads the rows of the shards that its slots read there. Bars: 1 s and 300 MB of
resident memory in all. `floor` is pyarrow's `read_metadata` alone. There is no peer: WebDataset
cannot seek, it replays.

Shuffling: the sequence of global batches of one epoch beside a full shuffle (`floor`) and
WebDataset's own `detshuffle` and `shuffle` with their defaults (100 shards, 1,000 samples), one
stream for each of 8 ranks. Counted: distinct shards in a global batch; the mean distance between a
sample's place in storage and in time, as a share of the epoch (1/3 when independent); Spearman's
correlation of the two.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.dataset import Dataset
from data_pipeline.manifest import FILE_NAME, SCHEMA, Manifest, Shard, read_manifest, write_manifest
from data_pipeline.plan import Plan, slots_of_rank

SHARDS, SAMPLES, RANKS, SLOTS = 20_000, 15_000, 4_096, 4  # samples of a shard, slots of a rank
STEPS = 200  # timed, after the first
SMALL = {"shards": 400, "samples": 1_000, "global_batch": 256, "ranks": 8}  # for shuffling
SEED = 0


def write_large_manifest(directory: Path, shards: int) -> None:
    """A manifest as preparation writes it; a tenth of the shards has real rows, others zeros."""
    empty = _table(real=False)
    real = _table(real=True)
    manifest = Manifest(
        dataset="large",
        split="train",
        task="multilabel",
        class_names=tuple(f"class {i}" for i in range(18_291)),  # JFT's
        ignore_label=None,
        shards=tuple(
            Shard(name=f"shard-{i:06d}.tar", size=1 << 31, sha256=f"{i:064x}", num_samples=SAMPLES)
            for i in range(shards)
        ),
    )
    write_manifest(directory, manifest, (real if i % 50 < 5 else empty for i in range(shards)))


def _table(real: bool) -> pa.Table:
    rng = np.random.default_rng(0)
    size = rng.integers(20_000, 200_000, SAMPLES) * real
    offset = np.cumsum(size + 3 * 1024) * real
    columns: dict[str, Any] = {
        "key": [f"picture{i:012d}" * real for i in range(SAMPLES)],
        "offset": offset,
        "size": size + 3 * 1024,
        "crc32": rng.integers(0, 1 << 32, SAMPLES) * real,
        "image_offset": offset + 512,
        "image_size": size,
        "label_offset": offset + size + 1024,
        "label_size": np.full(SAMPLES, 7),
        "width": rng.integers(200, 800, SAMPLES) * real,
        "height": rng.integers(200, 800, SAMPLES) * real,
        "labels": [[3, 7] * real] * SAMPLES,
    }
    arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
    return pa.table(arrays, schema=SCHEMA)


def be_a_rank(directory: Path, block_size: int, seed: int) -> dict[str, float]:
    """What it costs this process, which must be fresh."""
    imported = _peak_memory()
    rng = random.Random(seed)
    began, worked = time.perf_counter(), time.process_time()
    dataset = Dataset(read_manifest(directory))
    opened = time.perf_counter()
    ranks = min(RANKS, dataset.num_samples // SLOTS)
    plan = Plan(
        shard_samples=dataset.shard_samples,
        block_size=block_size,
        seed=SEED,
        global_batch=ranks * SLOTS,
    )
    slots = slots_of_rank(plan.global_batch, rng.randrange(ranks), ranks)
    step = rng.randrange(100 * plan.steps_per_epoch)
    samples = plan.samples(step, slots)
    planned = time.perf_counter()
    for sample in samples:
        dataset.manifest.read_rows(sample.shard - sample.shard % 50)  # one with real rows
    loaded, worked = time.perf_counter(), time.process_time() - worked
    peak = _peak_memory()
    first = step - step % plan.steps_per_epoch  # of the epoch, so that it does not end meanwhile
    walked = time.perf_counter()
    for later in range(first, first + min(STEPS, plan.steps_per_epoch)):
        plan.samples(later, slots)
    per_step = (time.perf_counter() - walked) / min(STEPS, plan.steps_per_epoch)
    return {
        "open": opened - began,
        "plan_and_seek": planned - opened,
        "rows": loaded - planned,
        "total": loaded - began,
        "processor": worked,  # below the total where others use the cores
        "step": per_step,
        "imports_megabytes": imported,
        "peak_megabytes": peak,
    }


def _peak_memory() -> float:
    """In megabytes; not getrusage's, which a process inherits from the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def cost_rows(shards: int, block_sizes: list[int], repeats: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as place:
        write_large_manifest(Path(place), shards)
        for block_size in block_sizes:
            runs, floors = [], []
            for repeat in range(repeats):
                runs.append(_spawn("--rank", place, "--blocks", block_size, "--seed", repeat))
                floors.append(_spawn("--floor", place)["total"])
            yield from _cost_rows_of(runs, floors, f"blocks of {block_size}", shards)


def _spawn(*arguments: object) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.plan", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _cost_rows_of(
    runs: list[dict[str, float]], floors: list[float], case: str, shards: int
) -> Iterator[dict[str, Any]]:
    case = f"{shards * SAMPLES:,} samples, {shards:,} shards, {RANKS:,} ranks, {case}"
    middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    floor = statistics.median(floors)
    total = [run["total"] for run in runs]
    yield _row(
        f"start and seek, {case}",
        ours=middle["total"],
        floor=floor,
        ratio_to_floor=floor / middle["total"],
        unit="s",
        spread=[min(total), max(total)],
        bar=1.0,
    ) | {name: round(middle[name], 4) for name in ("open", "plan_and_seek", "rows", "processor")}
    memory = [run["peak_megabytes"] for run in runs]
    yield _row(
        f"resident memory at its peak, {case}",
        ours=middle["peak_megabytes"],
        unit="MB",
        spread=[min(memory), max(memory)],
        bar=300,
        imports=round(middle["imports_megabytes"], 1),
    )
    steps = [1e6 * run["step"] for run in runs]
    yield _row(
        f"one step of {SLOTS} slots, {case}",
        ours=1e6 * middle["step"],
        unit="us",
        spread=[min(steps), max(steps)],
    )


def _row(case: str, **values: Any) -> dict[str, Any]:
    fields = ("ours", "peer", "peer_name", "floor", "ratio_to_peer", "ratio_to_floor")
    row = {"benchmark": "plan", "case": case} | dict.fromkeys(fields) | values
    rounded = {name: round(value, 4) for name, value in row.items() if isinstance(value, float)}
    return row | rounded | {"spread": [round(value, 4) for value in values.get("spread", ())]}


Batches = NDArray[np.int64]  # (steps, global batch): numbers of samples in storage


def planned_batches(block_size: int, seed: int) -> Batches:
    plan = Plan(
        shard_samples=[SMALL["samples"]] * SMALL["shards"],
        block_size=block_size,
        seed=seed,
        global_batch=SMALL["global_batch"],
    )
    slots = range(plan.global_batch)
    steps = [np.array(plan.samples(step, slots)) for step in range(plan.steps_per_epoch)]
    places = np.stack(steps)
    return places[..., 0] * SMALL["samples"] + places[..., 1]


def fully_shuffled_batches(seed: int) -> Batches:
    order = np.random.default_rng(seed).permutation(SMALL["shards"] * SMALL["samples"])
    return order[: len(order) // SMALL["global_batch"] * SMALL["global_batch"]].reshape(
        -1, SMALL["global_batch"]
    )


def webdataset_batches(seed: int) -> Batches:
    """WebDataset's order: shards split among ranks, shuffled by it; a buffer of samples each."""
    import webdataset as wds

    def read(shards: Iterator[int]) -> Iterator[int]:
        for shard in shards:
            yield from range(shard * SMALL["samples"], (shard + 1) * SMALL["samples"])

    shards = list(wds.detshuffle(seed=seed).run(iter(range(SMALL["shards"]))))
    streams = []
    for rank in range(SMALL["ranks"]):
        mine = iter(shards[rank :: SMALL["ranks"]])  # as its split_by_node does
        rng = random.Random(1000 * seed + rank)
        streams.append(np.fromiter(wds.shuffle(1000, rng=rng)(read(mine)), np.int64))
    share = SMALL["global_batch"] // SMALL["ranks"]
    steps = min(map(len, streams)) // share
    return np.concatenate([s[: steps * share].reshape(steps, share) for s in streams], axis=1)


def distinct_shards(batches: Batches) -> float:
    return float(np.mean([len(np.unique(batch)) for batch in batches // SMALL["samples"]]))


def displacement(batches: Batches) -> float:
    storage = batches / (SMALL["shards"] * SMALL["samples"])
    times = (np.arange(len(batches)) + 0.5) / len(batches)
    return float(np.abs(storage - times[:, None]).mean())


def correlation(batches: Batches) -> float:
    """Of ranks; storage numbers and steps are their own ranks, but for constant factors."""
    steps = np.broadcast_to(np.arange(len(batches))[:, None], batches.shape)
    return float(np.corrcoef(batches.ravel(), steps.ravel())[0, 1])


def shuffle_rows(block_sizes: list[int], repeats: int) -> Iterator[dict[str, Any]]:
    measures: dict[str, tuple[Callable[[Batches], float], str]] = {
        "distinct shards in a global batch": (distinct_shards, "shards"),
        "mean displacement": (displacement, "share of an epoch"),
        "rank correlation of storage and time": (correlation, "1"),
    }
    installed = find_spec("webdataset") is not None
    seeds = range(repeats)
    full = [fully_shuffled_batches(seed) for seed in seeds]
    peers = [webdataset_batches(seed) for seed in seeds] if installed else []
    floors = {name: statistics.mean(map(one, full)) for name, (one, _) in measures.items()}
    others = {name: [one(batches) for batches in peers] for name, (one, _) in measures.items()}
    for block_size in block_sizes:
        ours = [planned_batches(block_size, seed) for seed in seeds]
        for name, (measure, unit) in measures.items():
            mine, floor = [measure(batches) for batches in ours], floors[name]
            values: dict[str, Any] = {"peer_name": "webdataset is not installed"}
            if peers:
                values = {"peer_name": "webdataset", "peer": statistics.mean(others[name])}
            if measure is not correlation:  # whose ratios mean nothing: it is best at 0
                values["ratio_to_floor"] = statistics.mean(mine) / floor
                values["ratio_to_peer"] = statistics.mean(mine) / values["peer"] if peers else None
            batch, shards = SMALL["global_batch"], SMALL["shards"]
            yield _row(
                f"{name}, blocks of {block_size}, global batch {batch}, {shards} shards",
                ours=statistics.mean(mine),
                floor=floor,
                unit=unit,
                spread=[min(mine), max(mine)],
                **values,
            )


def main() -> None:
    """Print the rows of cost and of shuffling."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--shards", type=int, default=SHARDS, help="of the large manifest")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--floor", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        print(json.dumps(be_a_rank(arguments.rank, arguments.blocks[0], arguments.seed)))
        return
    if arguments.floor:
        began = time.perf_counter()
        pq.read_metadata(arguments.floor / FILE_NAME)
        print(json.dumps({"total": time.perf_counter() - began}))
        return
    for rows in (
        shuffle_rows([1, *arguments.blocks], arguments.repeats),
        cost_rows(arguments.shards, arguments.blocks, arguments.repeats),
    ):
        for row in rows:
            if arguments.json:
                print(json.dumps(row), flush=True)
            else:
                print("\n".join(f"{key:18} {value}" for key, value in row.items()) + "\n")


if __name__ == "__main__":
    main()
