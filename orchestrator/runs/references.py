"""Checkpoints by the names MLflow has for them: models:/NAME@ALIAS, models:/NAME/3, runs:/ID.

The weights always come from a storage; MLflow says which they are, and by their digest that it is
they. A storage that was moved or copied is found through paths relative to it.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.bucket import storage_path
from orchestrator.errors import CheckpointError
from orchestrator.files import read_json
from orchestrator.runs.checkpoint import (
    Checkpoint,
    checkpoint_paths,
    newest_checkpoint,
    read_checkpoint,
)
from orchestrator.runs.registry import CHECKPOINT, DIGEST, RUN, STORAGE
from orchestrator.runs.run import Run, all_runs
from orchestrator.runs.server import connect, first_line, is_there, tracking_uri

MODELS, RUNS = "models:/", "runs:/"
_VERSION = re.compile(r"models:/([^/@]+)(?:@([\w-]+)|/(\d+))")
_RUN = re.compile(r"runs:/([0-9a-f]{32})(?:/(?:checkpoints/)?(step-\d{8}))?/?")
_UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the codes of MLflow's stores


def is_reference(place: str) -> bool:
    """Whether a place is a name that MLflow has for a checkpoint."""
    return place.startswith((MODELS, RUNS))


def find_reference(place: str, storage: Path | None = None) -> tuple[Checkpoint, str]:
    """The checkpoint that a name of MLflow's stands for now, and a name that always will.

    storage None: $ATROUS_STORAGE, else ~/atrous, as in job files.

    Raises:
        CheckpointError: nothing of that name, MLflow does not answer, or the checkpoint is gone.
    """
    storage = storage or storage_path(os.environ.get("ATROUS_STORAGE") or "~/atrous")
    return _version(place, storage) if place.startswith(MODELS) else _of_run(place, storage)


def _version(place: str, storage: Path) -> tuple[Checkpoint, str]:
    match = _VERSION.fullmatch(place)
    if not match:
        raise CheckpointError(f"{place}: write models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = match.groups()
    with _asking(place, storage) as client:
        version = (
            client.get_model_version_by_alias(name, alias)
            if alias
            else client.get_model_version(name, number)
        )
    lasting = f"{MODELS}{name}/{version.version}"
    if not {STORAGE, CHECKPOINT, DIGEST} <= version.tags.keys():
        raise CheckpointError(
            f"{place}: {lasting} is no result of a stage (it has no tag {DIGEST}); name the "
            "checkpoint by its path"
        )
    return _locate(lasting, version.tags, storage), lasting


def _locate(name: str, tags: dict[str, str], storage: Path) -> Checkpoint:
    """The checkpoint with a version's digest: where it was, in this storage or in its first one.

    A run that was done anew (--force) has another directory since, so all of them are looked at.
    """
    digest = tags[DIGEST]
    places = [root / tags[CHECKPOINT] for root in (storage, storage_path(tags[STORAGE]))]
    others = (path for run in all_runs(storage) for path in checkpoint_paths(run.checkpoints))
    for path in (*places, *others):
        try:
            if read_checkpoint(path, verify=False).digest == digest:
                return read_checkpoint(path)
        except CheckpointError:  # not there any more, or damaged
            continue
    looked = " and ".join(dict.fromkeys(str(path) for path in places))
    raise CheckpointError(
        f"{name}: its checkpoint, weights of sha256 {digest[:12]}, is gone or damaged: it is not "
        f"at {looked}, nor in another run under {storage}; put it back there, or take another one"
    )


def _of_run(place: str, storage: Path) -> tuple[Checkpoint, str]:
    match = _RUN.fullmatch(place)
    if not match:
        raise CheckpointError(f"{place}: write runs:/RUN_ID or runs:/RUN_ID/step-NNNNNNNN")
    run_id, step = match.groups()
    run = _find_run(place, run_id, storage)
    checkpoint = (
        read_checkpoint(run.checkpoints / step) if step else newest_checkpoint(run.checkpoints)
    )
    if checkpoint is None:
        raise CheckpointError(f"{place}: {run.path} holds no valid checkpoint")
    record = run.read()
    result = record.get("digest") if record.get("status") == "finished" else None
    if result and not step and checkpoint.digest != result:
        raise CheckpointError(
            f"{place}: the newest valid checkpoint, {checkpoint.path}, is not its result, weights "
            f"of sha256 {result[:12]}; name the checkpoint: {RUNS}{run_id}/{checkpoint.path.name}"
        )
    return checkpoint, f"{RUNS}{run_id}/{checkpoint.path.name}"


def _find_run(place: str, run_id: str, storage: Path) -> Run:
    """The run of this storage that has the id; else where MLflow says that it is."""
    for run in all_runs(storage):
        if (read_json(run.tracking) or {}).get("run_id") == run_id:
            return run
    with _asking(place, storage) as client:
        tags = client.get_run(run_id).data.tags
    if tags.get("atrous.kind") != "stage":
        raise CheckpointError(f"{place}: is not the run of a stage; name one of its stages' runs")
    for root in (storage, storage_path(tags[STORAGE])):
        run = Run(root / tags[RUN])
        if (read_json(run.tracking) or {}).get("run_id") == run_id:
            return run
    raise CheckpointError(
        f"{place}: its run directory {tags[RUN]} is neither under {storage} nor {tags[STORAGE]}"
    )


@contextmanager
def _asking(place: str, storage: Path) -> Iterator[Any]:
    """MLflow's client; what it answers becomes an error that says what to do."""
    uri = tracking_uri(storage)
    cure = "set MLFLOW_TRACKING_URI to the server that knows it, or name the checkpoint by its path"
    if not is_there(uri):
        raise CheckpointError(f"{place}: {uri} does not exist yet; {cure}")
    client = connect(uri)
    try:
        yield client
    except Exception as error:  # anything a store or the network can raise
        why = first_line(error)
        if getattr(error, "error_code", None) in _UNKNOWN:
            text = f"{place}: MLflow at {uri} has none: {why}; {_known(client)}"
        else:
            text = f"{place}: MLflow at {uri} does not answer: {why}; start it, or {cure}"
        raise CheckpointError(text) from None


def _known(client: Any) -> str:
    models = client.search_registered_models(max_results=20)
    names = [
        f"{model.name}{''.join(f'@{alias}' for alias in model.aliases)}"
        for model in models
        if model.name
    ]
    return f"registered are {', '.join(names) or 'no models'}"
