"""Which worker this is, on what it computes, and how it speaks with the others."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.errors import RunError
from orchestrator.job.config import Precision


@dataclass(frozen=True, kw_only=True)
class Place:
    """One worker among `world`."""

    rank: int
    world: int
    device: torch.device
    autocast_dtype: torch.dtype | None = None  # None: everything in float32

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

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the loader, on this device.

        It goes to a GPU from pinned memory: from any other the host waits for the step before.
        """
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

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
        distributed = torch.nn.parallel.DistributedDataParallel(
            network, device_ids=devices, gradient_as_bucket_view=True
        )
        # Training does not read running statistics; evaluation shares the first worker's.
        distributed.broadcast_buffers = False
        return distributed

    def autocast(self) -> AbstractContextManager[None]:
        """Autocast as the job's precision says, or nothing."""
        dtype = self.autocast_dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)


def find_place(gpus: float, precision: Precision) -> Place:
    """This Ray Train worker's place, with the job's precision set for the whole process.

    Raises:
        RunError: GPUs are asked for and there is none, or it has not the precision.
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
    return Place(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=device,
        autocast_dtype=set_precision(precision, device),
    )


def set_precision(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Set how this process multiplies float32, and say what to autocast to (None: nothing).

    Without this, convolutions of float32 on Ampere and newer are in TensorFloat-32.

    Raises:
        RunError: the device has not this precision.
    """
    on_gpu = device.type == "cuda"
    if precision == "tf32" and not (on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)):
        raise RunError(
            f"precision: tf32 is of NVIDIA GPUs from Ampere (A100) on, this is {_name(device)}; "
            "take float32 or auto"
        )
    native = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bfloat16" and on_gpu and not native:
        raise RunError(
            f"precision: bfloat16 is only emulated, slowly, on this {_name(device)}; take float16"
        )
    tf32 = precision == "tf32"
    torch.backends.fp32_precision = "tf32" if tf32 else "ieee"  # type: ignore[attr-defined]
    # torch.compile reads the older flags, and fails where they say something else.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if precision == "float16":
        return torch.float16
    return torch.bfloat16 if precision == "bfloat16" or (precision == "auto" and native) else None


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
