"""The loop that `benchmarks.overhead` compares with: torch alone, a stage's network and loader.

`python -m benchmarks.bare_loop JOB PORT PLACE` trains the job of a stage with as many processes as
it has workers. In PLACE each writes its process id, and the first a line of JSON after its first
step and every `log_every` steps.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.multiprocessing
from torch.nn.functional import cross_entropy

from data_pipeline.dataset import open_dataset
from data_pipeline.loader import TrainLoader
from data_pipeline.plan import slots_of_rank
from model.allocator import keep_freed_memory
from model.build import build_network, parameter_groups
from orchestrator.job.config import StageJob, StageSettings
from orchestrator.job.job_file import load_job
from orchestrator.training.optimizer import make_optimizer, make_schedule


def read_stage(job_file: str) -> StageSettings:
    job = load_job(Path(job_file))
    assert isinstance(job, StageJob)
    return job.settings


def worker(rank: int, job_file: str, port: str, place: Path) -> None:
    """What a worker of torchrun does."""
    (place / f"bare-{rank}.pid").write_text(str(os.getpid()))
    stage = read_stage(job_file)
    on_gpu = bool(stage.cluster.gpus_per_worker)
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    loader, ignored = make_loader(stage, rank, place)
    network, optimizer = make_network(stage, loader.num_classes, device, rank, port)
    schedule = make_schedule(stage.schedule, stage.optimizer.lr, loader.stop_step, 1)
    network.train()
    with (place / "bare.jsonl").open("a", buffering=1) as file:
        for step, batch in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = schedule(step)
            images, labels = batch.images, batch.labels
            if on_gpu:
                images, labels = images.pin_memory(), labels.pin_memory()
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True).long()
            with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
                logits = network(images)
            loss = cross_entropy(logits.float(), labels, ignore_index=ignored)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if rank == 0 and (step == 0 or (step + 1) % stage.log_every == 0):
                line = {"time": time.time(), "loss": loss.item()}
                file.write(json.dumps(line) + "\n")


def make_loader(stage: StageSettings, rank: int, place: Path) -> tuple[TrainLoader, int]:
    """The stage's loader, and the label that is ignored."""
    train = open_dataset(place, stage.data.train.dataset, stage.data.train.split)
    loader = TrainLoader(
        dataset=train,
        task=stage.task,
        data=stage.data.train,
        seed=stage.seed,
        global_batch=stage.global_batch,
        slots=slots_of_rank(stage.global_batch, rank, stage.cluster.max_workers),
        num_classes=len(train.manifest.class_names),
        stop_step=100_000,
        threads=stage.data.threads,
        prefetch=stage.data.prefetch,
    )
    assert train.manifest.ignore_label is not None
    return loader, train.manifest.ignore_label


def make_network(
    stage: StageSettings, num_classes: int, device: torch.device, rank: int, port: str
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The stage's network on its device, in DDP if there are several workers, and optimizer."""
    on_gpu = device.type == "cuda"
    if not on_gpu:
        keep_freed_memory()
        torch.set_num_threads(1)
    torch.manual_seed(stage.seed)
    network = build_network(stage.model, stage.task, num_classes)
    network.to(device).to(memory_format=torch.channels_last)
    groups = parameter_groups(network, stage.optimizer.weight_decay, {})
    optimizer = make_optimizer(stage.optimizer, groups)
    world = stage.cluster.max_workers
    if world == 1:
        return network, optimizer
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    distributed = torch.nn.parallel.DistributedDataParallel(
        network, device_ids=[rank] if on_gpu else None, gradient_as_bucket_view=True
    )
    distributed.broadcast_buffers = False  # as ours, which shares them when it evaluates
    return distributed, optimizer


def main() -> None:
    """Start the workers."""
    job_file, port, place = sys.argv[1:]
    workers = read_stage(job_file).cluster.max_workers
    torch.multiprocessing.spawn(worker, (job_file, port, Path(place)), workers)


if __name__ == "__main__":
    main()
