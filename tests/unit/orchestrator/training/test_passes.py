import math

from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.plan import slots_of_rank
from orchestrator.job.config import StageSettings
from orchestrator.training.passes import fewest_images, num_passes
from tests.unit.orchestrator.jobs import SEGMENTER, stage


def settings(global_batch: int, micro_batch: int | None, *, sync: bool) -> StageSettings:
    model = SEGMENTER | {"batch_norm": {"sync": sync}}
    changes = {"model": model, "global_batch": global_batch, "micro_batch": micro_batch}
    return StageSettings.model_validate(stage("tiny", "segmentation", "tiny-voc", **changes))


def sizes(samples: int, passes: int) -> list[int]:
    """What torch.tensor_split makes of so many samples."""
    few, larger = divmod(samples, passes)
    return [few + 1] * larger + [few] * (passes - larger)


@given(
    global_batch=st.integers(1, 40),
    micro_batch=st.none() | st.integers(1, 12),
    world=st.integers(1, 12),
    sync=st.booleans(),
)
def test_passes_of_all_workers(
    global_batch: int, micro_batch: int | None, world: int, sync: bool
) -> None:
    world = min(world, global_batch)
    config = settings(global_batch, micro_batch, sync=sync)
    parts = [len(slots_of_rank(global_batch, rank, world)) for rank in range(world)]
    passes = [num_passes(config, world, part) for part in parts]
    cut = [sizes(part, count) for part, count in zip(parts, passes, strict=True)]
    assert max(map(max, cut)) <= (micro_batch or math.inf)
    assert max(passes) == num_passes(config, world)
    if sync:  # together in every pass
        assert len({*passes}) == 1
        assert fewest_images(config, world) == min(map(sum, zip(*cut, strict=True)))
    else:  # and otherwise none is empty
        assert fewest_images(config, world) == min(map(min, cut)) > 0


def test_what_is_not_yet_known_counts_as_one_pass() -> None:
    config = settings(8, 2, sync=False).model_copy(update={"micro_batch": "auto"})
    assert num_passes(config, 2) == num_passes(config, 2, 4) == 1
