"""What `compile: true` gains: a training step with and without the blocks compiled, in turns.

ours: the network of a job with its repeated blocks compiled, as the worker does it. peer: the same
network as it stands. Both in the precision that `auto` takes (bfloat16 autocast on a GPU that has
it, else float32), with channels_last and SGD. floor: nothing known. The case says how long the
first step took, which compiles: the gain must earn that back. Unit: images per second.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from model.build import build_network
from model.compilation import compile_blocks
from model.config import ModelConfig
from orchestrator.training.place import Place, set_precision

NUM_CLASSES = 21


def make_network(options: argparse.Namespace, backbone: str, place: Place) -> nn.Module:
    torch.manual_seed(0)
    extra = {"width": options.width} if backbone.startswith("xception") else {}
    config = ModelConfig(backbone=backbone, output_stride=16, **extra)
    network = build_network(config, "segmentation", NUM_CLASSES).train()
    return network.to(place.device).to(memory_format=torch.channels_last)


def make_step(network: nn.Module, options: argparse.Namespace, place: Place) -> Callable[[], float]:
    """Seconds of one training step."""
    shape = options.batch, options.size, options.size
    images = torch.randint(256, (shape[0], 3, *shape[1:]), dtype=torch.uint8)
    images = images.to(place.device, memory_format=torch.channels_last)
    labels = torch.randint(NUM_CLASSES, shape).to(place.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)

    def step() -> float:
        began = time.perf_counter()
        with place.autocast():
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if place.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def compare(options: argparse.Namespace, backbone: str, place: Place) -> dict[str, Any]:
    plain, compiled = (make_network(options, backbone, place) for _ in range(2))
    compile_blocks(compiled)
    steps = [make_step(network, options, place) for network in (compiled, plain)]
    first = steps[0]() - steps[1]()
    for step in steps:  # memory and caches settle
        step()
    seconds = [[step() for step in steps] for _ in range(options.repeats)]
    ours, peer = (
        options.batch / statistics.median(column) for column in zip(*seconds, strict=True)
    )
    ratios = [theirs / mine for mine, theirs in seconds]
    what = f"{backbone}, {options.size} pixels, batch {options.batch}, {place.device.type}"
    return {
        "benchmark": "compile",
        "case": f"training, {what}; the first step takes {first:.0f} s longer",
        "ours": round(ours, 3),
        "peer": round(peer, 3),
        "peer_name": "not compiled",
        "floor": None,
        "ratio_to_peer": round(ours / peer, 3),
        "ratio_to_floor": None,
        "unit": "images/s",
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="rows as JSON lines")
    parser.add_argument("--backbone", nargs="+", default=["xception65", "resnet_v1_101_beta"])
    parser.add_argument("--width", type=float, default=1.0, help="of the Xceptions")
    parser.add_argument("--size", type=int, default=513)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = Place(rank=0, world=1, device=device, autocast_dtype=set_precision("auto", device))
    for backbone in options.backbone:
        row = compare(options, backbone, place)
        if options.json:
            print(json.dumps(row), flush=True)
        else:
            ratio, spread = row["ratio_to_peer"], row["spread"]
            print(f"{row['case']}: {ratio} of the speed, {spread[0]} to {spread[1]}", flush=True)


if __name__ == "__main__":
    main()
