"""A training step through `atrous run` with Ray against a bare loop of torch, and the way to it.

Both train the same network with the same optimizer, loss, schedule and batches, which both read
with the same loader from the same shards. ours: `atrous run`, whose journal has a line for each
turn (one in twenty steps by default). peer: `benchmarks.bare_loop`, processes of their own as
torchrun starts them, one forward and backward of the batch and `optimizer.step()`;
DistributedDataParallel and gloo (NCCL on GPUs) from two workers on, nothing around the network
where there is one.

Both are alive at the same time, and take turns: while one does some steps, the workers of the other
are stopped (SIGSTOP), at equal priority. A turn lasts from SIGCONT to the line that ends its steps.
Step times are means over a turn; ratios are of turns next to each other. Processor times are of
all threads of the workers, which other processes disturb least. `total_to_peer` is of all turns
together, which `turns` lists.

The second row is the time from the command to the end of the first step, by part. Unit: seconds.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SMALL = {"width": 0.25, "middle_units": 2, "aspp_channels": 64}
Job = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What both are measured at."""

    workers: int
    gpus: bool
    crop: int
    batch: int  # of each worker
    turns: int
    steps: int  # of a turn
    model: Mapping[str, Any]


def make_job(settings: Settings, place: Path) -> Job:
    decoder = {"low_level_channels": 16, "channels": 64} if settings.model else {}
    return {
        "kind": "stage",
        "name": "overhead",
        "storage": str(place / "storage"),
        "data_root": str(place),
        "task": "segmentation",
        "model": {"backbone": "xception65", "output_stride": 16, "decoder": decoder}
        | dict(settings.model),
        "data": {
            "train": {"dataset": "drawn", "split": "train", "crop": settings.crop},
            "val": {"dataset": "drawn", "split": "val"},
            "threads": 1,
        },
        "optimizer": {"name": "sgd", "lr": 0.007},
        "schedule": {"name": "poly"},
        "global_batch": settings.batch * settings.workers,
        "steps": 100_000,
        "evaluate": {"every": 100_000},
        "checkpoint": {"every": 100_000},
        "log_every": settings.steps,
        "cluster": {"workers": settings.workers, "gpus_per_worker": int(settings.gpus)},
    }


def make_data(place: Path) -> None:
    """Pictures of about 320 pixels a side."""
    from data_pipeline.formats.synthetic import synthesize
    from data_pipeline.prepare import prepare

    counts = {"voc/train": 64, "voc/val": 2}
    source = synthesize(place / "raw", layouts=["voc"], counts=counts, size=320)["voc"]
    prepare("voc", source, place / "drawn", workers=1)


class Contender:
    """Training in other processes, which write a line of JSON every few steps."""

    def __init__(self, name: str, command: list[str], place: Path) -> None:
        self.name, self._place = name, place
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_worker_niceness": "0",  # as the bare loop; Ray's own is 15
        }
        self.began = time.time()
        self._log = (place / f"{name}.log").open("w")
        self._process = subprocess.Popen(
            command, env=environment, stdout=self._log, stderr=self._log, start_new_session=True
        )
        self._read = 0  # bytes of its lines

    def lines(self) -> Path | None:
        """The file, once it is there."""
        raise NotImplementedError

    def workers(self) -> list[int]:
        """Process ids."""
        raise NotImplementedError

    def next_time(self) -> float:
        """When the next line was written."""
        while True:
            if self._process.poll() is not None:
                log = (self._place / f"{self.name}.log").read_text()
                raise RuntimeError(f"{self.name} ended: {log[-2000:]}")
            if path := self.lines():
                with path.open("rb") as file:
                    file.seek(self._read)
                    line = file.readline()
                if line.endswith(b"\n"):
                    self._read += len(line)
                    return json.loads(line)["time"]
            time.sleep(0.02)

    def turn(self, steps: int) -> tuple[float, float]:
        """Seconds and processor seconds of a step."""
        began, cpu = time.time(), sum(map(processor_seconds, self.workers()))
        self._signal(signal.SIGCONT)
        ended = self.next_time()
        self._signal(signal.SIGSTOP)
        cpu = sum(map(processor_seconds, self.workers())) - cpu
        return (ended - began) / steps, cpu / steps

    def pause(self) -> None:
        """Until the first turn."""
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.workers():
            os.kill(pid, number)

    def close(self) -> None:
        """End all its processes."""
        self._signal(signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()


def processor_seconds(pid: int) -> float:
    """Of all threads, those of the GPU's driver and those that ended too."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class Ours(Contender):
    """`atrous run`, with marks of what its command does before workers start."""

    def __init__(self, place: Path) -> None:
        self.marks = place / "marks.json"
        command = [sys.executable, "-m", "benchmarks.overhead"]
        super().__init__(
            "ours", [*command, "--atrous", str(place / "job.yaml"), str(self.marks)], place
        )

    @property
    def run(self) -> Path | None:
        """Its run directory, once it is there."""
        return next((self._place / "storage" / "runs").glob("overhead-*"), None)

    def lines(self) -> Path | None:
        """The journal."""
        run = self.run
        return run / "journal.jsonl" if run and (run / "journal.jsonl").exists() else None

    def workers(self) -> list[int]:
        """From their heartbeats."""
        beats = (self.run / "workers").glob("rank-*.json") if self.run else ()
        return [json.loads(path.read_text())["pid"] for path in beats]

    def parts(self) -> dict[str, float]:
        """Seconds from the command to the end of the first step."""
        assert self.run is not None
        lines = (self.run / "events.jsonl").read_text().splitlines()
        events = {event["kind"]: event for event in reversed([json.loads(line) for line in lines])}
        marks = json.loads(self.marks.read_text())
        at = {kind: event["time"] for kind, event in events.items()}
        first_wait = events["time"]["first_wait"]
        return {
            "interpreter and imports": marks["plan"] - self.began,
            "plan": marks["planned"] - marks["plan"],
            "Ray start": marks["connected"] - marks["connect"],
            "worker start": at["workers"] - marks["connected"],
            "imports of the worker, data, network": at["start"] - at["workers"],
            "peak of the device": at["device"] - at["start"],
            "first batch": first_wait,
            "first step": at["time"] - at["device"] - first_wait,
            "all": at["time"] - self.began,
        }


class Bare(Contender):
    """The loop of torch alone."""

    def __init__(self, place: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.bare_loop", str(place / "job.yaml")]
        super().__init__("bare", [*command, str(free_port()), str(place)], place)

    def lines(self) -> Path | None:
        """What its first worker writes."""
        path = self._place / "bare.jsonl"
        return path if path.exists() else None

    def workers(self) -> list[int]:
        """From a file of each."""
        return [int(path.read_text()) for path in self._place.glob("bare-*.pid")]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run_atrous(job_file: str, marks_file: str) -> None:
    """The command line, with the times of planning and of Ray's start written down."""
    from orchestrator.cli import main as cli
    from orchestrator.launch import graph

    marks: dict[str, float] = {}

    def marked(function: Callable[..., Any], before: str, after: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            marks.setdefault(before, time.time())  # the first call: it is the one that imports
            result = function(*args, **options)
            marks.setdefault(after, time.time())
            Path(marks_file).write_text(json.dumps(marks))
            return result

        return call

    graph.plan_stage = marked(graph.plan_stage, "plan", "planned")
    graph.cluster.connect = marked(graph.cluster.connect, "connect", "connected")
    sys.argv = ["atrous", "run", job_file]
    cli.main()


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """A row of step times, and one of the way to the first step."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make_data(place)
        (place / "job.yaml").write_text(yaml.safe_dump(make_job(settings, place)))
        ours = Ours(place)
        try:
            ours.next_time()
            ours.pause()
            parts = ours.parts()
            bare = Bare(place)
            try:
                first = bare.next_time() - bare.began
                bare.pause()
                turns = take_turns(ours, bare, settings)
            finally:
                bare.close()
        finally:
            ours.close()
    where = f"{settings.workers} workers, {'GPU' if settings.gpus else 'CPU, one thread each'}"
    network = f"xception65 {dict(settings.model) or 'of full width'}"
    case = f"{where}, {network}, {settings.batch} of {settings.crop} px each"
    peer = "torch, same loader" if settings.workers == 1 else "DDP, same loader"
    yield step_row(case, peer, *turns)
    yield {
        "benchmark": "overhead",
        "case": f"{case}: from the command to the end of the first step",
        "ours": round(parts["all"], 2),
        "peer": round(first, 2),
        "peer_name": peer,
        "floor": None,
        "ratio_to_peer": round(first / parts["all"], 3),
        "ratio_to_floor": None,
        "unit": "s",
        "spread": None,
        "parts": {part: round(seconds, 2) for part, seconds in parts.items()},
    }


Turns = list[tuple[float, float]]


def take_turns(ours: Contender, bare: Contender, settings: Settings) -> tuple[Turns, Turns]:
    results: dict[str, Turns] = {"ours": [], "bare": []}
    pair = [ours, bare]
    for _ in range(settings.turns + 1):
        for one in pair:
            results[one.name].append(one.turn(settings.steps))
        pair.reverse()
    return results["ours"][1:], results["bare"][1:]  # the first one warms up


def step_row(case: str, peer: str, ours: Turns, bare: Turns) -> dict[str, Any]:
    ratios = [a[0] / b[0] for a, b in zip(ours, bare, strict=True)]
    seconds = [statistics.median(turn[0] for turn in turns) for turns in (ours, bare)]
    cpu = [statistics.median(turn[1] for turn in turns) for turns in (ours, bare)]
    return {
        "benchmark": "overhead",
        "case": f"{case}: a step",
        "ours": round(seconds[0], 4),
        "peer": round(seconds[1], 4),
        "peer_name": peer,
        "floor": round(seconds[1], 4),
        "ratio_to_peer": round(1 / statistics.median(ratios), 4),
        "ratio_to_floor": round(1 / statistics.median(ratios), 4),
        "unit": "s",
        "spread": [round(1 / max(ratios), 3), round(1 / min(ratios), 3)],
        "step_time_to_peer": round(statistics.median(ratios), 4),
        "total_to_peer": round(sum(a[0] for a in ours) / sum(b[0] for b in bare), 4),
        "turns": [[round(a[0], 3), round(b[0], 3)] for a, b in zip(ours, bare, strict=True)],
        "load": [round(load, 1) for load in os.getloadavg()],
        "processor_seconds": [round(value, 4) for value in cpu],
        "processor_time_to_peer": round(
            statistics.median(a[1] / b[1] for a, b in zip(ours, bare, strict=True)), 4
        ),
    }


def main() -> None:
    """Print two rows for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--gpus", action="store_true", help="one for each worker")
    parser.add_argument("--crop", type=int, default=257)
    parser.add_argument("--batch", type=int, default=2, help="of each worker")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--quick", action="store_true", help="a small network, few turns")
    parser.add_argument("--atrous", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.atrous:
        run_atrous(*arguments.atrous)
        return
    model = SMALL if arguments.quick else {}
    turns = 4 if arguments.quick else arguments.turns
    for workers in arguments.workers:
        settings = Settings(
            workers=workers,
            gpus=arguments.gpus,
            crop=arguments.crop,
            batch=arguments.batch,
            turns=turns,
            steps=arguments.steps,
            model=model,
        )
        for row in measure(settings):
            if arguments.json:
                print(json.dumps(row), flush=True)
            else:
                print("\n".join(f"{key:22} {value}" for key, value in row.items()) + "\n")


if __name__ == "__main__":
    main()
