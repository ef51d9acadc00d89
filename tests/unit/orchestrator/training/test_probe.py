"""How many samples go through the network at once: found before training, kept, and told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.build import build_network
from model.classifier import Classifier
from model.config import Task
from model.deeplab import DeepLab
from model.sync_batch_norm import synchronize_batch_norm
from orchestrator.errors import RunError, StageFailed
from orchestrator.job.config import StageSettings
from orchestrator.launch.stage import PlannedStage, open_run, plan_stage, train_stage
from orchestrator.runs import run_writer
from orchestrator.runs.run import Run, append_journal, read_journal
from orchestrator.training import probe as probing
from orchestrator.training.memory import available_memory, is_out_of_memory, kept_for_backward
from orchestrator.training.place import Place
from orchestrator.training.probe import (
    Probe,
    check_evaluation,
    naming_memory,
    settle_micro_batch,
)
from orchestrator.training.task import make_loss
from tests.unit.orchestrator.jobs import MODEL, SEGMENTER, stage

ALONE = Place(rank=0, world=1, device=torch.device("cpu"))


class ManyWorkers(Place):
    """The first of some workers, of which the others found less."""

    def gather(self, value: Any) -> list[Any]:
        return [value, min(value, 2) if isinstance(value, int) else value]


def make_probe(task: Task = "segmentation", place: Place = ALONE, **changes: Any) -> Probe:
    model = SEGMENTER if task == "segmentation" else MODEL
    dataset = "tiny-voc" if task == "segmentation" else "tiny-imagenet"
    settings = StageSettings.model_validate(stage("tiny", task, dataset, **changes))
    network = build_network(settings.model.model_validate(model), task, 3)
    network.to(memory_format=torch.channels_last)

    class Data:
        class_names = ("a", "b", "c")
        ignore_label = 255

    loss = make_loss(settings, Data(), 1, place.device)  # type: ignore[arg-type]
    return Probe(stage=settings, place=place, network=network, loss=loss, num_classes=3)


Gpu = Callable[..., list[int]]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Let networks refuse batches of more than so many samples, as a GPU does."""

    tried: list[int] = []
    limit = [0]

    def refusing(forward: Any) -> Any:
        def limited(self: Any, images: torch.Tensor) -> torch.Tensor:
            tried.append(len(images))
            if len(images) > limit[0]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            return forward(self, images)

        return limited

    for kind in (DeepLab, Classifier):
        monkeypatch.setattr(kind, "forward", refusing(kind.forward))
    monkeypatch.setattr(probing, "_refuses", lambda _: True)

    def hold(most: int) -> list[int]:
        limit[0] = most
        return tried

    return hold


@pytest.mark.parametrize("task", ["segmentation", "classification", "multilabel"])
def test_auto_halves_until_it_fits_and_leaves_no_trace(
    task: Task, tmp_path: Path, gpu: Gpu
) -> None:
    tried = gpu(5)
    optimizer = {"name": "adamw", "lr": 0.1}
    probe = make_probe(task, micro_batch="auto", global_batch=16, optimizer=optimizer, ema={})
    state = {name: tensor.clone() for name, tensor in probe.network.state_dict().items()}
    random = torch.get_rng_state()
    assert settle_micro_batch(probe, Run(tmp_path)).micro_batch == 4
    assert tried == [16, 8, 4]
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in probe.network.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert all(parameter.grad is None for parameter in probe.network.parameters())
    assert all(module.training for module in probe.network.modules())


def test_synchronised_batch_norm_waits_for_nobody_in_a_probe(
    tmp_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(8)
    probe = make_probe(micro_batch="auto")
    synchronize_batch_norm(probe.network)

    def hang(*_: Any) -> None:
        raise AssertionError("a collective operation")

    monkeypatch.setattr(torch.distributed, "all_reduce", hang)
    monkeypatch.setattr("model.sync_batch_norm.SyncBatchNorm.num_workers", 2)
    assert settle_micro_batch(probe, Run(tmp_path)).micro_batch == 8


def test_the_worker_with_the_least_memory_decides(tmp_path: Path, gpu: Gpu) -> None:
    gpu(8)
    place = ManyWorkers(rank=0, world=2, device=torch.device("cpu"))
    probe = make_probe(place=place, micro_batch="auto", global_batch=16)
    assert settle_micro_batch(probe, Run(tmp_path)).micro_batch == 2
    (event,) = Run(tmp_path).events()
    assert "micro_batch: auto: 2 of 8 samples of 33x33 at a time fit" in event["text"]
    assert "batch normalisation sees 2 images at a time" in event["text"]


def test_what_auto_found_is_kept(tmp_path: Path, gpu: Gpu) -> None:
    """More memory later changes nothing: batch norm would see other batches."""
    tried = gpu(4)
    probe = make_probe(micro_batch="auto")
    assert settle_micro_batch(probe, Run(tmp_path)).micro_batch == 4
    gpu(100)
    tried.clear()
    assert settle_micro_batch(probe, Run(tmp_path)).micro_batch == 4
    assert max(tried) == 4
    assert len(Run(tmp_path).events()) == 1
    gpu(2)
    with pytest.raises(RunError, match=r"auto found 4 on this node .* holds 2.*micro_batch: 2"):
        settle_micro_batch(probe, Run(tmp_path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"null sends 8 samples of 33x33 .* micro_batch: 4 fits"),
        (6, r"micro_batch: 6 sends 6 samples of 33x33 .* micro_batch: 3 fits"),
    ],
)
def test_a_number_that_does_not_fit_is_refused_with_one_that_does(
    tmp_path: Path, gpu: Gpu, given: int | None, message: str
) -> None:
    gpu(5)
    with pytest.raises(RunError, match=message):
        settle_micro_batch(make_probe(micro_batch=given), Run(tmp_path))
    assert settle_micro_batch(make_probe(micro_batch=5), Run(tmp_path)).micro_batch == 5
    gpu(8)
    assert settle_micro_batch(make_probe(micro_batch=given), Run(tmp_path)).micro_batch == given


def test_auto_leaves_two_images_to_batch_norm_that_is_trained(tmp_path: Path, gpu: Gpu) -> None:
    gpu(1)
    with pytest.raises(RunError, match=r"not even the fewest samples.*batch_norm\.frozen"):
        settle_micro_batch(make_probe(micro_batch="auto"), Run(tmp_path))
    frozen = {"model": SEGMENTER | {"batch_norm": {"frozen": True}}}
    assert (
        settle_micro_batch(make_probe(micro_batch="auto", **frozen), Run(tmp_path)).micro_batch == 1
    )


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    tmp_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(8)

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(DeepLab, "forward", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        settle_micro_batch(make_probe(micro_batch="auto"), Run(tmp_path))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))


def test_the_largest_evaluated_shape_is_tried(gpu: Gpu) -> None:
    class Split:
        def largest_size(self) -> tuple[int, int]:
            return 50, 64

    check_evaluation(make_probe(), Split())  # type: ignore[arg-type]
    gpu(0)  # evaluation has a forward of its own
    probe = make_probe(evaluate={"batch": 4, "output_stride": 8})
    state = {name: tensor.clone() for name, tensor in probe.network.state_dict().items()}
    check_evaluation(probe, Split())  # type: ignore[arg-type]
    assert probe.network.output_stride == 16
    assert all(torch.equal(t, state[n]) for n, t in probe.network.state_dict().items())
    assert probe.network.training
    with pytest.MonkeyPatch.context() as patch:

        def limited(_: Any, images: torch.Tensor, views: Any) -> None:
            assert images.shape[2:] == (65, 65)
            if len(images) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        patch.setattr(probing, "predict_labels", limited)
        with pytest.raises(RunError, match=r"batch: 4 images of 65x65 .*evaluate\.batch: 2 fits"):
            check_evaluation(probe, Split())  # type: ignore[arg-type]


def test_on_a_cpu_memory_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = make_probe(micro_batch="auto")
    with kept_for_backward(probe.network) as kept:
        probing._forward(probe, 1)
        each = kept()
    outputs = probe.network(torch.zeros(2, 3, 33, 33, dtype=torch.uint8))
    assert each > 33 * 33 * 3 * 4 + outputs[0].nbytes  # at least the input in float32 and the loss
    weights = sum(p.nbytes for p in probe.network.parameters())
    for free, expected in ((1e12, 8), (2 * weights + 1.25 * 4.1 * each, 4)):
        monkeypatch.setattr(probing, "available_memory", lambda free=free: free)
        run = Run(tmp_path / str(expected))
        run.update(attempts=1)
        assert settle_micro_batch(probe, run).micro_batch == expected
        assert not any(parameter.grad is not None for parameter in probe.network.parameters())
    assert settle_micro_batch(make_probe(micro_batch=3), Run(tmp_path)).micro_batch == 3
    monkeypatch.setattr(probing, "available_memory", lambda: 0)
    with pytest.raises(RunError, match="not even the fewest samples of 33x33"):
        settle_micro_batch(probe, Run(tmp_path))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_not_one_sample_fits_into_is_refused_without_trying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """A CPU's memory that is used up ends the process; so only what fits is ever computed."""
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    place = Place(rank=0, world=1, device=torch.device("cpu"), autocast_dtype=dtype)
    probe = make_probe(place=place, model=SEGMENTER, micro_batch="auto", precision=precision)
    with kept_for_backward(probe.network) as kept:
        probing._forward(probe, 1)
        each = kept()
    least = probing._least_kept_by_one(probe)
    assert each / 2 < least <= each
    tried: list[torch.Size] = []
    probe.network.register_forward_pre_hook(lambda _, inputs: tried.append(inputs[0].shape))
    for free, computed in ((least - 1, []), (least, [(1, 3, 33, 33)])):
        monkeypatch.setattr(probing, "available_memory", lambda free=free: free)
        with pytest.raises(RunError, match="not even the fewest samples of 33x33"):
            settle_micro_batch(probe, Run(tmp_path))
        assert tried == computed


def test_memory_is_what_the_system_and_the_control_groups_leave(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    with pytest.raises(RunError, match="does not say how much memory is free"):
        available_memory(tmp_path)
    write("proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:   8000 kB\n")
    write("proc/self/cgroup", "0::/user/job\n")
    assert available_memory(tmp_path) == 8000 * 1024
    for group, most in ((".", "max"), ("user", "5000"), ("user/job", "max")):
        write(f"sys/fs/cgroup/{group}/memory.max", f"{most}\n")
        write(f"sys/fs/cgroup/{group}/memory.current", "3000\n")
        write(f"sys/fs/cgroup/{group}/memory.stat", "anon 1000\ninactive_file 500\n")
    assert available_memory(tmp_path) == 2500


@pytest.mark.parametrize(
    ("micro_batch", "message"),
    [
        (None, "micro_batch: null, 8 samples of 33x33 at once; set micro_batch: 4 or auto"),
        (2, "micro_batch: 2, 2 samples of 33x33 at once; set micro_batch: 1"),
        (1, "1 samples of 33x33 at once; lower data.train.crop"),
    ],
)
def test_running_out_of_memory_in_mid_run_names_the_shape(
    micro_batch: int | None, message: str
) -> None:
    settings = make_probe(micro_batch=micro_batch).stage
    with (
        pytest.raises(RunError, match=message),
        naming_memory(settings, ALONE, (8, 3, 33, 33)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(RuntimeError, match="other"), naming_memory(settings, ALONE, (8, 3, 33, 33)):
        raise RuntimeError("other")


def plan(root: Path, storage: Path, **changes: Any) -> PlannedStage:
    settings = stage("tiny", "segmentation", "tiny-voc", **changes)
    return plan_stage(StageSettings.model_validate(settings), storage, str(root))


def test_a_killed_run_goes_on_with_what_auto_found(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is the same as one with that number."""

    def run(planned: PlannedStage) -> str:
        open_run(planned)
        return train_stage(planned).checkpoint.digest

    def die(path: Path, record: dict[str, Any]) -> None:
        append_journal(path, record)
        if "metrics" in record and record["step"] == 3:
            raise KeyboardInterrupt("killed")

    expected = run(plan(tiny_data, tmp_path / "number", micro_batch=2))
    assert expected != run(plan(tiny_data, tmp_path / "whole"))
    automatic = plan(tiny_data, tmp_path / "auto", micro_batch="auto")
    monkeypatch.setattr(probing, "_fits_in_ram", lambda _: lambda size: size <= 2)
    monkeypatch.setattr(run_writer, "append_journal", die)
    with pytest.raises(KeyboardInterrupt):
        run(automatic)
    monkeypatch.undo()
    assert run(automatic) == expected
    values = {r["metrics"].get("train/micro_batch") for r in read_journal(automatic.run.journal)}
    assert values == {2.0}


def test_running_out_of_memory_fails_the_stage_with_its_cure(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("orchestrator.training.learner.Learner.update", full)
    planned = plan(tiny_data, tmp_path)
    open_run(planned)
    with pytest.raises(StageFailed, match=r"^tiny: this node ran out of memory with micro_batch"):
        train_stage(planned)
