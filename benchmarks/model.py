"""Forward and forward + backward of DeepLabv3+ on Xception-65 at output stride 16 against peers.

All see the same float images and train on the same labels, in turns, in the same precision (float32
on the CPU, bfloat16 autocast on a GPU), eager and compiled, in both memory layouts. On the CPU each
is a process of its own, as its user would have it: ours keeps freed memory as `atrous predict` and
`atrous run` do (model/allocator.py); with --keep the peers' do so too.

ours: batch norm folded for inference. peers: timm's xception65 under the same head of plain
nn.Conv2d, segmentation_models.pytorch's DeepLabV3Plus on the same backbone, torchvision's DeepLabv3
on ResNet-50 and -101. floor: the images/s that our Multiply-Adds (three times as many in training)
would reach at the speed of a matrix product as large as the 728 x 728 pointwise convolutions. Needs
torch, pydantic and the peers there are. Unit: images per second.
"""

import argparse
import gc
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from model.allocator import keep_freed_memory
from model.blocks import AtrousConv2d
from model.config import ModelConfig
from model.deeplab import DeepLab
from model.fold import fold_batch_norm

NUM_CLASSES = 21
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
OURS = "ours"


@dataclass(frozen=True)
class Settings:
    """What every contender is measured at."""

    device: torch.device
    size: int
    batch: int
    repeats: int
    keep: bool  # freed memory, in peers' processes too


@dataclass
class Result:
    """Seconds and processor seconds of each round, billions of Multiply-Adds, peak MiB."""

    seconds: list[float]
    cpu_seconds: list[float]
    gmacs: float
    mebibytes: int


def ours() -> nn.Module:
    return DeepLab(ModelConfig(backbone="xception65", output_stride=16), NUM_CLASSES)


def timm_backbone() -> nn.Module:
    network = DeepLab(ModelConfig(backbone="timm:xception65", output_stride=16), NUM_CLASSES)
    for module in network.modules():
        if type(module) is AtrousConv2d:
            module.__class__ = nn.Conv2d  # what others would build it of
    return network


def smp_deeplab() -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.DeepLabV3Plus(
        "tu-xception65", encoder_weights=None, encoder_output_stride=16, classes=NUM_CLASSES
    )


def torchvision_deeplab(name: str) -> nn.Module:
    from torchvision.models import segmentation

    build = getattr(segmentation, name)
    return build(weights=None, weights_backbone=None, num_classes=NUM_CLASSES, aux_loss=None)


# name -> package, builder
PEERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "timm xception65 + the same head of nn.Conv2d": ("timm", timm_backbone),
    "segmentation_models_pytorch DeepLabV3Plus tu-xception65": (
        "segmentation_models_pytorch",
        smp_deeplab,
    ),
    "torchvision deeplabv3_resnet50": (
        "torchvision",
        lambda: torchvision_deeplab("deeplabv3_resnet50"),
    ),
    "torchvision deeplabv3_resnet101": (
        "torchvision",
        lambda: torchvision_deeplab("deeplabv3_resnet101"),
    ),
}


def logits(network: nn.Module, images: Tensor) -> Tensor:
    found = network(images)
    return found["out"] if isinstance(found, dict) else found


def count_gmacs(build: Callable[[], nn.Module], size: int) -> float:
    """Billions of Multiply-Adds of one image's forward pass; nothing is computed."""
    with torch.device("meta"):
        network, images = build().eval(), torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    return counter.get_total_flops() / 2e9


def make_step(
    network: nn.Module, settings: Settings, mode: str, layout: str
) -> Callable[[], object]:
    """One call of it is what is timed."""
    shape = settings.batch, settings.size, settings.size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(shape[0], 3, *shape[1:], generator=generator).mul(255)
    images = images.to(settings.device, memory_format=LAYOUTS[layout])
    labels = torch.randint(NUM_CLASSES, shape, generator=generator).to(settings.device)
    on_gpu = settings.device.type == "cuda"

    def precision() -> Any:
        return torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext()

    def infer() -> None:
        with torch.inference_mode(), precision():
            logits(network, images)

    def train() -> None:
        network.zero_grad(set_to_none=True)
        with precision():
            loss = F.cross_entropy(logits(network, images).float(), labels)
        loss.backward()

    return infer if mode == "inference" else train


def timed(step: Callable[[], object], settings: Settings) -> tuple[float, float]:
    synchronize(settings)
    cpu, began = time.process_time(), time.perf_counter()
    step()
    synchronize(settings)
    return time.perf_counter() - began, time.process_time() - cpu


def synchronize(settings: Settings) -> None:
    if settings.device.type == "cuda":
        torch.cuda.synchronize()


def peak_mebibytes(step: Callable[[], object], settings: Settings) -> int:
    """Most memory that torch's allocator has given out during a step, beside what was there."""
    if settings.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) >> 20
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        step()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most >> 20


def matrix_product_gmacs_per_second(settings: Settings) -> float:
    rows = settings.batch * (settings.size // 16 + 1) ** 2
    dtype = torch.bfloat16 if settings.device.type == "cuda" else torch.float32
    left = torch.randn(rows, 728, device=settings.device, dtype=dtype)
    right = torch.randn(728, 728, device=settings.device, dtype=dtype)

    def products() -> None:
        for _ in range(20):
            torch.mm(left, right)

    products()
    seconds = min(timed(products, settings)[0] for _ in range(10))
    return 20 * rows * 728 * 728 / seconds / 1e9


@dataclass(frozen=True)
class Contender:
    """One network in one layout; `settings` as everybody's."""

    name: str
    layout: str
    settings: Settings
    mode: str
    compiled: bool

    def step(self) -> Callable[[], object]:
        """Built and warm: one call of it is what is timed."""
        build = ours if self.name == OURS else PEERS[self.name][1]
        torch.manual_seed(0)
        network = build().to(self.settings.device).train(self.mode == "training")
        if self.mode == "inference" and self.name == OURS:
            network = fold_batch_norm(network)
        network = network.to(memory_format=LAYOUTS[self.layout])
        step = make_step(network, self.settings, self.mode, self.layout)
        if self.compiled:
            network.compile()
        step()
        step()
        return step


class InProcess:
    """A contender beside the others in this process: they share a GPU's memory in turns."""

    def __init__(self, contender: Contender) -> None:
        self._settings = contender.settings
        self._step = contender.step()
        self.mebibytes = peak_mebibytes(self._step, contender.settings)

    def time(self) -> tuple[float, float]:
        """Seconds and processor seconds of a step."""
        return timed(self._step, self._settings)

    def close(self) -> None:
        """Give the memory back."""
        del self._step


class OwnProcess:
    """A contender in a process of its own, which sleeps while the others have their turn."""

    def __init__(self, contender: Contender) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        arguments = (end, contender, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        end.close()
        self.mebibytes: int = self._pipe.recv()

    def time(self) -> tuple[float, float]:
        """Seconds and processor seconds of a step."""
        self._pipe.send(None)
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, contender: Contender, threads: int) -> None:
    if contender.settings.keep or contender.name == OURS:
        keep_freed_memory()
    torch.set_num_threads(threads)
    step = contender.step()
    pipe.send(peak_mebibytes(step, contender.settings))
    with suppress(EOFError):
        while True:
            pipe.recv()
            pipe.send(timed(step, contender.settings))


def measure(contenders: list[Contender]) -> dict[tuple[str, str], Result]:
    """Time every contender's step, all in turns."""
    running, results = {}, {}
    for one in contenders:
        key = one.layout, one.name
        running[key] = (OwnProcess if one.settings.device.type == "cpu" else InProcess)(one)
        build = ours if one.name == OURS else PEERS[one.name][1]
        gmacs = count_gmacs(build, one.settings.size)
        results[key] = Result([], [], gmacs, running[key].mebibytes)
    for _ in range(contenders[0].settings.repeats):
        for key, stepper in running.items():
            seconds, cpu_seconds = stepper.time()
            results[key].seconds.append(seconds)
            results[key].cpu_seconds.append(cpu_seconds)
    for stepper in running.values():
        stepper.close()
    return results


def row(case: str, mine: Result, peer: Result, name: str, settings: Settings) -> dict[str, Any]:
    """A comparison; the ratios of the fastest rounds bear more noise from other processes."""
    passes = 3 if case.startswith("training") else 1
    speed = [settings.batch / statistics.median(one.seconds) for one in (mine, peer)]
    floor = matrix_product_gmacs_per_second(settings) / (passes * mine.gmacs)
    ratios = [b / a for a, b in zip(mine.seconds, peer.seconds, strict=True)]
    cpu = min(peer.cpu_seconds) / min(mine.cpu_seconds)
    return {
        "benchmark": "model",
        "case": f"{case}; {mine.gmacs:.2f} and {peer.gmacs:.2f} G Multiply-Adds",
        "ours": round(speed[0], 3),
        "peer": round(speed[1], 3),
        "peer_name": name,
        "floor": round(floor, 3),
        "ratio_to_peer": round(speed[0] / speed[1], 3),
        "ratio_to_floor": round(speed[0] / floor, 3),
        "unit": "images/s",
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "ratio_at_equal_gmacs": round(speed[0] / speed[1] * mine.gmacs / peer.gmacs, 3),
        "ratio_of_fastest": round(min(peer.seconds) / min(mine.seconds), 3),
        "ratio_of_least_cpu_time": round(cpu, 3),
        "gmacs_per_s": [
            round(passes * one.gmacs * images_per_second, 1)
            for one, images_per_second in zip((mine, peer), speed, strict=True)
        ],
        "peak_mebibytes": [mine.mebibytes, peer.mebibytes],
    }


def rows(
    settings: Settings, mode: str, layouts: list[str], styles: list[str], peers: list[str]
) -> Iterator[dict[str, Any]]:
    names = [OURS]
    for name, (package, _) in PEERS.items():
        if not any(part in name for part in peers):
            continue
        if find_spec(package):
            names.append(name)
        else:
            yield {"benchmark": "model", "peer_name": name, "case": f"{package} is not installed"}
    where = f"{settings.device.type}, {settings.batch} of {settings.size} x {settings.size}"
    for style in styles:
        compiled = style == "compiled"
        results = measure(
            [
                Contender(n, layout, settings, mode, compiled)
                for layout, n in product(layouts, names)
            ]
        )
        gc.collect()
        case = f"{mode}, {where}, {style}"
        for name in names[1:]:
            for layout in layouts:
                pair = results[layout, OURS], results[layout, name]
                yield row(f"{case}, {layout}", *pair, name, settings)
            if len(layouts) > 1:
                pair = best(results, OURS), best(results, name)
                yield row(f"{case}, each in its quicker layout", *pair, name, settings)


def best(results: dict[tuple[str, str], Result], name: str) -> Result:
    mine = (result for (_, one), result in results.items() if one == name)
    return min(mine, key=lambda result: statistics.median(result.seconds))


def main() -> None:
    """Print a row for each mode, style, layout and peer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--size", type=int, default=512, help="a multiple of 16, for the peers")
    parser.add_argument("--batch", type=int, help="default: 1 on the CPU and 2 there in training")
    parser.add_argument("--modes", nargs="+", default=["inference", "training"])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--styles", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--peers", nargs="+", default=[""], help="parts of names of peers")
    parser.add_argument("--keep", action="store_true", help="peers keep freed memory too (CPU)")
    parser.add_argument("--quick", action="store_true", help="256 pixels, eager, 2 repeats")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.size, arguments.repeats, arguments.styles = 256, 2, ["eager"]
    on_gpu = arguments.device != "cpu"
    for mode in arguments.modes:
        batch = arguments.batch or (16 if on_gpu else 1 + (mode == "training"))
        device = torch.device(arguments.device)
        settings = Settings(device, arguments.size, batch, arguments.repeats, arguments.keep)
        for one in rows(settings, mode, arguments.layouts, arguments.styles, arguments.peers):
            if arguments.json:
                print(json.dumps(one), flush=True)
            else:
                print("\n".join(f"{key:18} {value}" for key, value in one.items()) + "\n")


if __name__ == "__main__":
    main()
