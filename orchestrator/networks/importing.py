"""`atrous import`: a TensorFlow DeepLab checkpoint becomes a checkpoint of ours."""

import time
from pathlib import Path

from data_pipeline.errors import DataError
from orchestrator.errors import CheckpointError, JobFileError
from orchestrator.files import digest, sha256
from orchestrator.job.config import Job, PipelineJob, StageSettings
from orchestrator.runs.checkpoint import Checkpoint, write_checkpoint
from orchestrator.runs.foreign import TENSORFLOW
from orchestrator.runs.record import versions
from orchestrator.runs.start import Start


def import_checkpoint(
    source: str, job: Job, out: Path, *, stage: str | None = None, moving_averages: bool = False
) -> tuple[Checkpoint, str]:
    """Write `source` (tf:PATH) as checkpoint `out` of a job file's network; and what was placed.

    Every tensor of the network must be there, and every variable must have a place or belong to
    the training run that wrote it. Classes are called as in the stage's data set where that is
    prepared, else by their number.

    Raises:
        CheckpointError: the checkpoint does not fit the stage's network, or `out` exists.
    """
    from model.importers import from_tensorflow, read_variables

    settings = _stage(job, stage)
    if not source.startswith(TENSORFLOW):
        raise CheckpointError(f"{source}: name the checkpoint as tf:PATH, a prefix or an .npz file")
    if out.exists():
        raise CheckpointError(f"{out}: exists already; name a directory that is not there yet")
    path = Path(source.removeprefix(TENSORFLOW)).expanduser().absolute()
    try:
        variables = read_variables(str(path))
        imported = from_tensorflow(
            settings.model, settings.task, variables, moving_averages=moving_averages
        )
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if imported.missing or imported.unplaced:
        raise CheckpointError(
            f"{source} is not the network of the job file: {imported.report()}; set model: to what "
            "it is, or take a part of it with start_from: {checkpoint: tf:…, take: backbone}"
        )
    model = settings.model.model_dump(mode="json")
    start = Start(weights=str(path), digest=_digest(path), take="network", origin=source)
    state = {
        "stage": settings.name,
        "task": settings.task,
        "fingerprint": digest([start.digest, model, moving_averages]),
        "step": 0,
        "steps": 0,
        "epoch": 0,
        "seed": settings.seed,
        "metrics": {},
        "model": model,
        "class_names": _class_names(settings, job.data_directory, imported.num_classes),
        "data": {},
        "parents": [start.as_json()],
        "mlflow_run_id": None,
        "versions": versions(),
        "time": time.time(),
    }
    return write_checkpoint(out, imported.tensors, None, state), imported.report()


def _stage(job: Job, name: str | None) -> StageSettings:
    if not isinstance(job, PipelineJob):
        return job.settings
    for stage in job.stages:
        if stage.name == name:
            return stage
    names = ", ".join(stage.name for stage in job.stages)
    raise JobFileError(f"--stage {name}: the pipeline {job.name} has {names}; name one of them")


def _digest(path: Path) -> str:
    """sha256 of an .npz, or of the sums of a checkpoint's files."""
    if path.is_file():
        return sha256(path)
    return digest([sha256(part) for part in sorted(path.parent.glob(f"{path.name}.*"))])


def _class_names(stage: StageSettings, data: str, num_classes: int) -> tuple[str, ...]:
    from data_pipeline.dataset import open_dataset

    try:
        train = open_dataset(data, stage.data.train.dataset, stage.data.train.split)
    except DataError:
        return tuple(f"class {number}" for number in range(num_classes))
    names = train.manifest.class_names
    if len(names) != num_classes:
        raise CheckpointError(
            f"the checkpoint has {num_classes} classes, but data.train.dataset "
            f"{stage.data.train.dataset} has {len(names)}"
        )
    return names
