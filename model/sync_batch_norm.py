"""Batch normalisation over the batches of all workers, on every device."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as _OnGpu
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch normalisation (B, C, H, W) with the statistics of all workers' batches, of any sizes.

    It takes over the parameters, buffers and what follows within (the activation of timm's) of the
    one it replaces. In evaluation, and where there is one worker, it is plain batch normalisation.
    No torch.nn.SyncBatchNorm, because DDP refuses those on the CPU.
    """

    def __init__(self, replaced: nn.BatchNorm2d) -> None:
        with torch.device("meta"):
            super().__init__(replaced.num_features, eps=replaced.eps, momentum=replaced.momentum)
        self._parameters, self._buffers = replaced._parameters, replaced._buffers
        self.affine, self.track_running_stats = replaced.affine, replaced.track_running_stats
        self.training = replaced.training
        for name, child in replaced.named_children():
            self.add_module(name, child)

    @property
    def num_workers(self) -> int:
        """Workers that take part in the statistics."""
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); in training all workers must call it together."""
        together = self.training and self.num_workers > 1
        x = self._synchronized(x) if together else super().forward(x)
        for child in self.children():
            x = child(x)
        return x

    def _synchronized(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / int(self.num_batches_tracked)
        if x.device.type != "cuda":
            return self._elsewhere(x, momentum)
        return self._on_gpu(x, momentum)

    def _on_gpu(self, x: Tensor, momentum: float) -> Tensor:
        tensors = (self.weight, self.bias, self.running_mean, self.running_var)
        workers = dist.group.WORLD, self.num_workers
        # Torch's sums are float32, but of an empty batch of the batch's type: workers would hang.
        values = x if len(x) else x.float()
        return _OnGpu.apply(values, *tensors, self.eps, momentum, *workers).to(x.dtype)

    def _elsewhere(self, x: Tensor, momentum: float) -> Tensor:
        """What torch has a kernel for on GPUs alone, differentiable, in float32 or better."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        if len(x):
            own_var, own_mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
        else:  # zeros that pass gradients on, as those of the others do
            own_var = own_mean = values.sum(dim=(0, 2, 3))
        own_count = own_mean.new_full((1,), x.numel() // x.shape[1])
        rows = _rows_of_workers(torch.cat([own_count, own_mean, own_var]))
        counts, means, variances = rows.split((1, x.shape[1], x.shape[1]), dim=1)
        # Deviations about the common mean, not squares less its square: nothing cancels.
        count = counts.sum()
        mean = (counts * means).sum(dim=0) / count
        deviations = (counts * (variances + (means - mean).square())).sum(dim=0)
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            self.running_mean.lerp_(mean.to(self.running_mean), momentum)
            unbiased = deviations / (count - 1)
            self.running_var.lerp_(unbiased.to(self.running_var), momentum)
        scale = self.weight * (deviations / count + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (values * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(x.dtype)


class _SumOverWorkers(torch.autograd.Function):
    """all_reduce whose gradient is all_reduce: each worker's input is in every worker's loss."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


def _rows_of_workers(own: Tensor) -> Tensor:
    """(N,) of each worker -> (workers, N) on all of them."""
    rows = [torch.zeros_like(own)] * dist.get_world_size()
    rows[dist.get_rank()] = own
    return _SumOverWorkers.apply(torch.stack(rows))


def synchronize_batch_norm(network: nn.Module) -> None:
    """Replace every BatchNorm2d within a network; names, parameters and buffers stay.

    Raises:
        ValueError: the network has batch normalisation of another kind.
    """
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, _BatchNorm) or isinstance(child, SyncBatchNorm):
                continue
            whole = child.affine and child.track_running_stats
            if not (isinstance(child, nn.BatchNorm2d) and whole):
                raise ValueError(
                    f"batch_norm.sync: {child} is not of images, or has no scale or no running "
                    "statistics: leave batch_norm.sync out or choose another backbone"
                )
            setattr(parent, name, SyncBatchNorm(child))
