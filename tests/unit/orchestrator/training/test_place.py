from collections.abc import Iterator

import pytest
import torch

from orchestrator.errors import RunError
from orchestrator.training.place import Place, set_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _products_as_they_were() -> Iterator[None]:
    yield
    set_precision("auto", CPU)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """What torch says of a GPU; it has everything until a test takes it away."""
    has = {"tf32": True, "bfloat16": True}
    capability = {True: (8, 0), False: (7, 5)}
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda _device: capability[has["tf32"]]
    )
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or has["bfloat16"],
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Tesla T4")
    return has


def products() -> tuple[str, str]:
    """How convolutions and matrix products of float32 are computed on a GPU."""
    backends = torch.backends
    convolutions, matrices = backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision
    # torch.compile reads these, which raise where old and new ways to set them contradict.
    assert backends.cudnn.allow_tf32 == (convolutions == "tf32")
    assert torch.get_float32_matmul_precision() == ("high" if matrices == "tf32" else "highest")
    return convolutions, matrices


def test_float32_is_float32(gpu: dict[str, bool]) -> None:
    """torch's own default for convolutions is TensorFloat-32."""
    assert set_precision("float32", GPU) is None
    assert products() == ("ieee", "ieee")
    assert set_precision("tf32", GPU) is None
    assert products() == ("tf32", "tf32")
    assert set_precision("auto", GPU) == torch.bfloat16
    assert products() == ("ieee", "ieee")


def test_what_a_device_has_not_is_refused(gpu: dict[str, bool]) -> None:
    with pytest.raises(RunError, match=r"precision: tf32 .* this is a CPU; take float32"):
        set_precision("tf32", CPU)
    gpu |= {"tf32": False, "bfloat16": False}
    with pytest.raises(RunError, match=r"precision: tf32 .* this is Tesla T4; take float32"):
        set_precision("tf32", GPU)
    with pytest.raises(RunError, match="only emulated, slowly, on this Tesla T4; take float16"):
        set_precision("bfloat16", GPU)
    assert set_precision("auto", GPU) is None
    assert set_precision("float16", GPU) == torch.float16


def test_a_cpu_computes_what_is_asked_for() -> None:
    assert set_precision("auto", CPU) is None
    x = torch.ones(2, 2)
    for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", None)):
        chosen = set_precision(precision, CPU)  # type: ignore[arg-type]
        assert chosen == dtype
        with Place(rank=0, world=1, device=CPU, autocast_dtype=chosen).autocast():
            assert (x @ x).dtype == (dtype or torch.float32)
