"""Which worker this is, on what it computes, and how it speaks with the others."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from orchestrator.errors import RunError


@dataclass(frozen=True, kw_only=True)
class Place:
    """One worker among `world`."""

    rank: int
    world: int
    device: torch.device
    bfloat16: bool

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over all workers, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The values of all workers, on every worker."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def share_buffers(self, network: torch.nn.Module) -> None:
        """Give every worker the first one's running statistics, which are the ones checkpointed."""
        if self.world > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, src=0)

    def distribute(self, network: torch.nn.Module) -> torch.nn.Module:
        """The network as DDP trains it; the network itself where there is one worker."""
        if self.world == 1:
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(network, device_ids=devices)

    def autocast(self) -> AbstractContextManager[None]:
        """bfloat16 autocast, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)


def find_place(gpus: float, precision: Literal["auto", "float32", "bfloat16"]) -> Place:
    """This Ray Train worker's place; `precision` as in the job file.

    Raises:
        RunError: GPUs are asked for and there is none.
    """
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    device = get_device() if gpus else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif gpus:
        raise RunError(
            f"cluster.gpus_per_worker: {gpus:g}, but torch sees no GPU on this node; set it to 0 "
            "to train on CPUs"
        )
    capable = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return Place(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=device,
        bfloat16=precision == "bfloat16" or (precision == "auto" and capable),
    )
