"""Networks as programs that need none of this code: ONNX files and PyTorch exported programs."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

FORMATS = (".onnx", ".pt2")
# Sides that differ, so that they are not taken for one size, and give every feature map more than
# one position at output stride 32; a batch of 2, because one of 1 would be taken for a constant.
_EXAMPLE = (2, 3, 97, 129)


def trace(network: nn.Module) -> ExportedProgram:
    """Record an evaluation-mode network as a program of (B, 3, H, W) images of any B, H and W.

    The program takes float32 RGB in 0..255. As .pt2, not as ONNX, it refuses sides that leave a
    feature map one position high or wide (sides up to the output stride), because PyTorch's
    analysis of shapes holds 1 for a special case.
    """
    images = torch.rand(_EXAMPLE).mul(255)
    sizes = dict.fromkeys((0, 2, 3), Dim.AUTO)
    with torch.no_grad(), _integer_padding():
        return torch.export.export(network, (images,), dynamic_shapes=(sizes,))


def save_program(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write what `trace` recorded, as the suffix of path says: .onnx or .pt2.

    Input `images`, output `logits`. metadata become ONNX metadata properties, or the extra files
    of a .pt2 (`torch.export.load(path, extra_files={name: ""})` reads them).
    """
    if path.suffix == ".pt2":
        torch.export.save(program, path, extra_files=dict(metadata))
        return
    exported = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),  # names of the free axes
        verbose=False,
    )
    assert exported is not None
    exported.model.metadata_props.update(metadata)
    exported.save(path)


def open_program(path: Path) -> Callable[[Tensor], Tensor]:
    """A file that `save_program` wrote, as a function of images (B, 3, H, W) on the CPU."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def largest_difference(
    network: Callable[[Tensor], Tensor],
    program: Callable[[Tensor], Tensor],
    size: tuple[int, int, int],
) -> float:
    """Largest difference of two networks' outputs over the first's largest value, in magnitude.

    Both see the same noise of size (batch, height, width). Outputs of other shapes are infinitely
    far apart; the result is not a number where an output is not.
    """
    batch, height, width = size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((batch, 3, height, width), generator=generator).mul(255)
    expected, actual = network(images), program(images)
    if expected.shape != actual.shape:
        return float("inf")
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return ((actual - expected).abs().max() / scale).item()


@contextmanager
def _integer_padding() -> Iterator[None]:
    """Have timm reckon TensorFlow's SAME padding in whole numbers while a network is traced.

    Its own division and rounding up cannot be saved as .pt2, and the sizes that follow from it
    take minutes to simplify.
    """
    padding: Any = sys.modules.get("timm.layers.padding")
    if padding is None:  # then nothing of timm is in the network
        yield
        return
    original, padding.get_same_padding = padding.get_same_padding, _same_padding
    try:
        yield
    finally:
        padding.get_same_padding = original


def _same_padding(side: int, kernel_size: int, stride: int, dilation: int) -> int | torch.SymInt:
    """Pixels to add to a side. Nothing negative is divided: ONNX rounds that towards zero."""
    extent = dilation * (kernel_size - 1) + 1
    missing = (side - 1) // stride * stride + extent - side
    return missing if extent >= stride else torch.sym_max(missing, 0)
