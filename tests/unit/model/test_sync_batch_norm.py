"""Two workers with batches of 3 and 1 normalise as one with the batch of 4."""

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from model import sync_batch_norm
from model.build import build_network, freeze_batch_norm
from model.config import ModelConfig
from model.sync_batch_norm import SyncBatchNorm, synchronize_batch_norm

TINY = ModelConfig(width=0.0625, middle_units=1, aspp_channels=16)
CHANNELS = 5
PARTS = (slice(0, 3), slice(3, 4))
NORMS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.3),
    "cumulative": lambda: nn.BatchNorm2d(CHANNELS, momentum=None),
    "BatchNormAct2d": lambda: BatchNormAct2d(
        CHANNELS, act_layer=nn.PReLU, drop_layer=lambda: nn.Threshold(0.3, 0.7)
    ),
}


def images(offset=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(0.5, 3, 4).view(4, 1, 1, 1)  # the parts differ in their statistics
    x = torch.randn(4, CHANNELS, 6, 7, generator=generator) * scale + scale + offset
    return x.to(dtype)


def network_around(norm, device="cpu"):
    generator = torch.Generator().manual_seed(2)
    network = nn.Sequential(norm, nn.Conv2d(CHANNELS, 2, 1)).double().to(device)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.1)
    return network


def two_steps(network, module, x, world, device="cpu"):
    """What two training passes leave behind; the loss is a sum over all images of all workers."""
    x = x.to(device, memory_format=torch.channels_last).requires_grad_()
    for _ in range(2):
        outputs = module(x)
        (world * outputs.square().sum()).backward()
    gradients = {f"gradient of {name}": p.grad for name, p in network.named_parameters()}
    state = dict(network.named_buffers())
    return {"outputs": outputs.detach(), "images": x.grad / world} | gradients | state


def worker(rank, directory, device):
    torch.set_num_threads(1)
    rendezvous = f"file://{directory}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    results = {}
    for name, make in NORMS.items():
        network = network_around(make(), device)
        synchronize_batch_norm(network)
        module = DistributedDataParallel(network)
        results[name] = two_steps(network, module, images()[PARTS[rank]], 2, device)
    if device == "cpu":
        far = SyncBatchNorm(nn.BatchNorm2d(CHANNELS, momentum=1.0))
        far(images(3000.0, torch.float32)[PARTS[rank]])
        results["far from 0"] = far.running_var
        results["bfloat16"] = far(images(0.0, torch.bfloat16)[PARTS[rank]]).detach()
        results["pooled"] = one_image_each(rank)
    torch.save(results, f"{directory}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def one_image_each(rank):
    """Logits of a segmenter whose image-level features have one value on each worker."""
    torch.manual_seed(0)
    network = build_network(TINY.model_copy(update={"dropout": 0.0}), "segmentation", 3).train()
    pixels = 255 * torch.rand(2, 3, 33, 33)
    if rank is not None:
        synchronize_batch_norm(network)
        pixels = pixels[rank : rank + 1]
    with torch.no_grad():
        return network(pixels)


def start_workers(directory, device):
    torch.multiprocessing.spawn(worker, args=(str(directory), device), nprocs=2)
    return [torch.load(directory / f"{rank}.pt", map_location="cpu") for rank in (0, 1)]


def assert_one_batch(name, results):
    network = network_around(NORMS[name]())
    expected = two_steps(network, network, images(), 1)
    first, second = (result[name] for result in results)
    assert set(first) == set(second) == set(expected)
    for what, value in expected.items():
        if what in ("outputs", "images"):
            torch.testing.assert_close(torch.cat([first[what], second[what]]), value)
        else:
            torch.testing.assert_close(first[what], value)
            assert torch.equal(first[what], second[what])


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    return start_workers(tmp_path_factory.mktemp("workers"), "cpu")


@pytest.mark.parametrize("name", NORMS)
def test_two_workers_equal_one_batch(two_workers, name):
    """Outputs, gradients of images, scale and offset (as DDP averages them), statistics."""
    assert_one_batch(name, two_workers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_two_workers_equal_one_batch_on_a_gpu(tmp_path):
    results = start_workers(tmp_path, "cuda")
    for name in NORMS:
        assert_one_batch(name, results)


def test_variance_far_from_zero_does_not_cancel(two_workers):
    expected = images(3000.0, torch.float32).double().var(dim=(0, 2, 3))
    torch.testing.assert_close(two_workers[0]["far from 0"].double(), expected, rtol=1e-2, atol=0)


def test_half_precision_comes_out_as_it_went_in(two_workers):
    assert two_workers[0]["bfloat16"].dtype == torch.bfloat16


def test_one_image_to_a_worker_is_enough_for_image_level_features(two_workers):
    together = torch.cat([result["pooled"] for result in two_workers])
    torch.testing.assert_close(together, one_image_each(None), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backbone", ["xception41", "resnet_v1_50", "timm:test_resnet"])
def test_names_tensors_and_modes_stay(backbone):
    config = ModelConfig(backbone=backbone, aspp_channels=16)
    network = build_network(config, "segmentation", 3)
    network.aspp.eval()
    before = {name: id(t) for name, t in (*network.named_parameters(), *network.named_buffers())}
    modes = {name: module.training for name, module in network.named_modules()}
    synchronize_batch_norm(network)
    after = {name: id(t) for name, t in (*network.named_parameters(), *network.named_buffers())}
    assert after == before
    assert {name: module.training for name, module in network.named_modules()} == modes
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {type(norm) for norm in norms} == {SyncBatchNorm}


@pytest.mark.parametrize("backbone", ["xception41", "timm:test_resnet", "timm:efficientnet_lite0"])
def test_one_worker_computes_as_before(backbone):
    outputs = []
    for sync in (False, True):
        torch.manual_seed(0)
        width = {"width": 0.0625, "middle_units": 1} if backbone == "xception41" else {}
        config = ModelConfig(backbone=backbone, aspp_channels=16, dropout=0.0, **width)
        network = build_network(config, "segmentation", 3).train()
        if sync:
            synchronize_batch_norm(network)
        x = 255 * torch.rand(2, 3, 33, 33)
        trained = network(x)
        freeze_batch_norm(network)
        outputs.append((trained, network(x), network.eval()(x)))
    assert all(torch.equal(plain, synced) for plain, synced in zip(*outputs, strict=True))


def test_a_timm_backbone_stays_synchronised_at_another_output_stride():
    config = ModelConfig(backbone="timm:test_resnet", aspp_channels=16)
    network = build_network(config, "segmentation", 3)
    synchronize_batch_norm(network)
    network.set_output_stride(8)
    network.set_output_stride(16)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {type(norm) for norm in norms} == {SyncBatchNorm}


def test_an_empty_batch_of_a_gpu_speaks_of_sums_in_float32_as_others_do(monkeypatch):
    seen = []

    class OfTorch:
        @staticmethod
        def apply(x, *_):
            seen.append(x.dtype)
            return x

    monkeypatch.setattr(sync_batch_norm, "_OnGpu", OfTorch)
    norm = SyncBatchNorm(nn.BatchNorm2d(3))
    for size in (2, 0):
        x = torch.zeros(size, 3, 2, 2, dtype=torch.bfloat16)
        assert norm._on_gpu(x, 0.1).dtype == torch.bfloat16
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.BatchNorm2d(3, affine=False)])
def test_what_cannot_be_synchronised_is_refused(norm):
    with pytest.raises(ValueError, match=r"batch_norm\.sync: BatchNorm.d\(3"):
        synchronize_batch_norm(nn.Sequential(norm))
