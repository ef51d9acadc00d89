"""How a worker's part of a global batch is cut into passes through the network."""

import math

from orchestrator.job.config import StageSettings


def num_passes(stage: StageSettings, world: int, samples: int | None = None) -> int:
    """Passes of a worker that has `samples` of a global batch; None: as many as any worker has.

    Workers whose batch norm is synchronised wait for each other within a pass: all have the same
    number, and one with fewer samples than passes takes part in the last one with none. Other
    workers wait for nobody until the last pass, and no pass of theirs is empty.
    """
    if not isinstance(stage.micro_batch, int):
        return 1
    most = math.ceil(math.ceil(stage.global_batch / world) / stage.micro_batch)
    if samples is None or stage.model.batch_norm.sync:
        return most
    return min(most, samples)


def fewest_images(stage: StageSettings, world: int) -> int:
    """The fewest images over which batch norm takes its statistics, in any pass of a step."""
    few, larger = divmod(stage.global_batch, world)
    parts = [few + 1] * larger + [few] * (world - larger)
    last_passes = [part // num_passes(stage, world, part) for part in parts]
    return sum(last_passes) if stage.model.batch_norm.sync else min(last_passes)
