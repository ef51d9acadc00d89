"""What a checkpoint of DeepLabv3+ on Xception-65 (weights and momentum) costs training.

Every contender saves after a step that changed all weights, in turns, on the same disk. Two
numbers: for how long the training thread stands still, and the processor time until the checkpoint
is complete (which training loses only where no processor is spare).

ours: `CheckpointWriter`, which copies, then writes, forces to disk and checksums in a thread.
peers: torch.save in the training thread and torch.distributed.checkpoint's async_save (one
process, gloo), which do neither of the latter; the first save of each is left out. floor: copying
the bytes into memory that is there. Unit: seconds, less is better; ratios above 1: ours is better.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.build import build_network
from model.config import ModelConfig
from orchestrator.job.sections import Checkpoints
from orchestrator.runs.checkpoint_writer import CheckpointWriter, Contents


class Training:
    """A network with momentum, and steps that change both."""

    def __init__(self) -> None:
        self.network = build_network(ModelConfig(backbone="xception65"), "segmentation", 21)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9)
        for parameter in self.network.parameters():
            parameter.grad = torch.rand_like(parameter)
        self.step()  # now there is momentum

    def step(self) -> None:
        """New weights."""
        self.optimizer.step()

    def contents(self) -> Contents:
        """What ours writes."""
        return Contents(
            weights=self.network.state_dict(),
            optimizer=self.optimizer.state_dict(),
            state={"step": 1, "metrics": {}},
            ema=None,
        )

    def tensors(self) -> list[Tensor]:
        """All that has to be copied."""
        found = list(self.network.state_dict().values())
        return found + [state["momentum_buffer"] for state in self.optimizer.state.values()]


class Ours:
    """`CheckpointWriter`."""

    def __init__(self, training: Training, directory: Path) -> None:
        self._training = training
        settings = Checkpoints(keep=1)
        self._writer = CheckpointWriter(directory, settings, lambda: None, print)

    def save(self) -> None:
        """What the training thread does."""
        self._writer.save(self._training.contents())

    def finish(self) -> None:
        """Wait for the rest."""
        self._writer.finish(lambda _: None)


class Synchronous:
    """torch.save in the training thread."""

    def __init__(self, training: Training, directory: Path) -> None:
        self._training, self._path = training, directory / "checkpoint.pt"

    def save(self) -> None:
        """Everything."""
        states = self._training.network.state_dict(), self._training.optimizer.state_dict()
        torch.save(states, self._path)

    def finish(self) -> None:
        """Nothing is left to do."""


class Distributed:
    """torch.distributed.checkpoint.async_save."""

    def __init__(self, training: Training, directory: Path) -> None:
        import torch.distributed as dist

        store = f"file://{directory}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        self._training, self._directory = training, directory / "checkpoint"
        self._future: Any = None

    def save(self) -> None:
        """What the training thread does."""
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict import get_state_dict
        from torch.distributed.checkpoint.state_dict_saver import async_save

        weights, optimizer = get_state_dict(self._training.network, self._training.optimizer)
        state = {"weights": weights, "optimizer": optimizer}
        writer = FileSystemWriter(self._directory, sync_files=False)
        self._future = async_save(state, storage_writer=writer)

    def finish(self) -> None:
        """Wait for the rest."""
        self._future.result()
        shutil.rmtree(self._directory)


PEERS: dict[str, Callable[[Training, Path], Any]] = {
    "torch.save": Synchronous,
    "torch.distributed.checkpoint.async_save": Distributed,
}


def measure(place: Path, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Name -> (seconds of standstill, processor seconds) of each round."""
    training = Training()
    contenders: dict[str, Any] = {}
    for name, make in {"ours": Ours, **PEERS}.items():
        directory = place / name
        directory.mkdir()
        contenders[name] = make(training, directory)
        save(contenders[name])  # memory is taken now
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in [*contenders, "floor"]}
    for _ in range(repeats):
        for name, contender in contenders.items():
            training.step()
            found[name].append(save(contender))
        found["floor"].append(copy(training.tensors()))
    return found


def save(contender: Any) -> tuple[float, float]:
    """Seconds of standstill, processor seconds."""
    began, processor = time.perf_counter(), time.process_time()
    contender.save()
    standstill = time.perf_counter() - began
    contender.finish()
    return standstill, time.process_time() - processor


def copy(tensors: list[Tensor]) -> tuple[float, float]:
    """Seconds and processor seconds of a copy into memory that is there."""
    copies = [tensor.clone() for tensor in tensors]
    began, processor = time.perf_counter(), time.process_time()
    for destination, tensor in zip(copies, tensors, strict=True):
        destination.copy_(tensor)
    return time.perf_counter() - began, time.process_time() - processor


def rows(found: dict[str, list[tuple[float, float]]], size: float) -> Iterator[dict[str, Any]]:
    for column, case in enumerate(("training stands still", "processor time")):
        of = {name: [pair[column] for pair in pairs] for name, pairs in found.items()}
        middle = {name: statistics.median(values) for name, values in of.items()}
        for peer in PEERS:
            ratios = [b / a for a, b in zip(of["ours"], of[peer], strict=True)]
            yield {
                "benchmark": "checkpoint",
                "case": f"{case}, {size:.0f} MB",
                "ours": round(middle["ours"], 4),
                "peer": round(middle[peer], 4),
                "peer_name": peer,
                "floor": round(middle["floor"], 4),
                "ratio_to_peer": round(middle[peer] / middle["ours"], 2),
                "ratio_to_floor": round(middle["floor"] / middle["ours"], 2),
                "unit": "s",
                "spread": [round(min(ratios), 2), round(max(ratios), 2)],
            }


def main() -> None:
    """Print four rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--directory", type=Path, help="where to write; a temporary one")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    place = Path(tempfile.mkdtemp(dir=arguments.directory))
    try:
        found = measure(place, arguments.repeats)
    finally:
        shutil.rmtree(place)
    size = sum(tensor.nbytes for tensor in Training().tensors()) / 1e6
    for row in rows(found, size):
        if arguments.json:
            print(json.dumps(row))
        else:
            print("\n".join(f"{key:16} {value}" for key, value in row.items()) + "\n")


if __name__ == "__main__":
    main()
