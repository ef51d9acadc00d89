"""What memory there is, and what an error that it is used up looks like."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from orchestrator.errors import RunError

_SIGNS = ("out of memory", "can't allocate memory", "ALLOC_FAILED")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch, cuDNN or the CPU's allocator says so."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)


def describe(device: torch.device) -> str:
    """A device and its memory."""
    if device.type != "cuda":
        return "this node"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of RAM that this process can still have, within the limits of its control groups.

    Raises:
        RunError: the system does not say.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        known = dict(line.split(":", 1) for line in lines)
        free = [int(known["MemAvailable"].split()[0]) * 1024]
    except (OSError, KeyError):
        raise RunError(
            "micro_batch: auto: this system does not say how much memory is free "
            "(/proc/meminfo); give micro_batch a number"
        ) from None
    groups = root / "sys/fs/cgroup"
    free += _left(groups, "memory.max", "memory.current")
    free += _left(groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
    own = (root / "proc/self/cgroup").read_text().partition("0::/")[2].strip()
    while own:
        free += _left(groups / own, "memory.max", "memory.current")
        own = own.rpartition("/")[0]
    return min(free)


def _left(group: Path, limit: str, usage: str) -> list[int]:
    """What a control group leaves; pages of files in it can be given back."""
    try:
        most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        lines = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return []
    files = [int(line.split()[1]) for line in lines if line.startswith("inactive_file ")]
    return [] if most == "max" else [int(most) - used + sum(files)]


@contextmanager
def kept_for_backward(network: torch.nn.Module) -> Iterator[Callable[[], int]]:
    """Watch the forward passes within; the callable: bytes that they keep, the state apart.

    On the meta device too, where nothing is computed.
    """
    state = [*network.parameters(), *network.buffers()]
    known = {tensor.untyped_storage()._cdata for tensor in state}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in kept.values())
