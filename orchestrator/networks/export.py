"""Write a checkpoint's network as a program for other runtimes, and prove that it is the same."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import ExportError
from orchestrator.networks.network import OpenNetwork, open_network

if TYPE_CHECKING:
    from model.build import Network

TOLERANCE = 1e-4  # float32 through some hundred layers, added up in another order
# Smaller and larger than what was traced; even, odd and mixed.
SIZES = ((1, 64, 80), (3, 129, 129), (2, 162, 97))


def export(
    checkpoint: str | Path, out: Path, *, output_stride: int | None = None
) -> dict[tuple[int, int, int], float]:
    """Write the network to `out` (.onnx or .pt2), its batch normalisation folded.

    The file takes its name only after its outputs were compared with the checkpoint's network.
    Returns the largest relative difference at each size (batch, height, width).

    Raises:
        CheckpointError: there is no valid checkpoint, or it cannot have the output stride.
        ExportError: `out` exists or has another suffix, a package is missing, or the written
            program differs from the network.
    """
    from model.export import save_program, trace
    from model.fold import fold_batch_norm

    _check_destination(out)
    opened = open_network(checkpoint, output_stride=output_stride)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.stem}.{os.getpid()}.tmp{out.suffix}")
    try:
        save_program(trace(fold_batch_norm(opened.network)), temporary, _metadata(opened))
        differences = _compare(opened.network, temporary)
        os.rename(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return differences


def _check_destination(out: Path) -> None:
    """What can be known before the work is done."""
    from model.export import FORMATS

    if out.suffix not in FORMATS:
        raise ExportError(f"{out}: the name must end in one of {', '.join(FORMATS)}")
    if out.exists():
        raise ExportError(f"{out}: already there; remove it or choose another name")
    packages = ("onnx", "onnxruntime", "onnxscript") if out.suffix == ".onnx" else ()
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ExportError(
            f"{out}: writing ONNX needs {', '.join(missing)}: pip install 'atrous[export]', "
            "or choose a name that ends in .pt2"
        )


def _metadata(opened: OpenNetwork) -> dict[str, str]:
    state = opened.checkpoint.state
    return {
        "task": opened.task,
        "class_names": json.dumps(opened.class_names),
        "output_stride": str(opened.network.output_stride),
        "stage": state["stage"],
        "step": str(opened.checkpoint.step),
        "checkpoint": opened.checkpoint.digest,
    }


def _compare(network: "Network", path: Path) -> dict[tuple[int, int, int], float]:
    """Relative differences by size; ExportError at the first above the tolerance."""
    from model.export import largest_difference, open_program

    program, differences = open_program(path), {}
    for size in SIZES:
        differences[size] = difference = largest_difference(network, program, size)
        if not difference <= TOLERANCE:  # not a number included
            batch, height, width = size
            raise ExportError(
                f"the exported program differs from the network: on images {batch}x3x{height}x"
                f"{width} by {difference:.1e} of the largest output, {TOLERANCE:.0e} is allowed; "
                "nothing was written. If it is not a number, look at the checkpoint's weights"
            )
    return differences
