"""MLflow's models: a LoggedModel for each kept checkpoint, a registered version for each result.

All of it can be repeated: what a killed attempt left is found, and completed or deleted.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError
from orchestrator.runs.checkpoint import Checkpoint, checkpoint_paths, read_checkpoint
from orchestrator.runs.record import HEADLINE, flatten, score
from orchestrator.runs.run import Run, read_journal
from orchestrator.runs.server import metric_name, send_metrics

log = logging.getLogger(__name__)

# Tags of runs, models and versions: where a checkpoint lies, and the sha256 of its weights.
STORAGE, RUN, CHECKPOINT, DIGEST = (
    "atrous.storage",
    "atrous.run",  # relative to the storage, like the checkpoint
    "atrous.checkpoint",
    "atrous.digest",
)
BEST = "best"
_METRIC, _SCORE, _VALIDATED_ON = "atrous.metric", "atrous.score", "atrous.validated_on"
_VERSIONS = "mlflow.modelVersions"  # by which its pages link a model to the versions it became


def log_models(client: Any, record: Mapping[str, Any], run: Run, storage: Path) -> dict[str, Any]:
    """Make sure that each kept checkpoint has its LoggedModel, which is ready; relative path -> it.

    Those that a killed attempt left unready are completed, or deleted if the checkpoint is gone.
    """
    filter_string = f"source_run_id = '{record['run_id']}'"
    there = client.search_logged_models([record["experiment_id"]], filter_string)
    known = {model.tags.get(CHECKPOINT): model for model in there}
    times = {line["step"]: line["time"] for line in read_journal(run.journal)}
    models, steps = {}, {}
    for path in reversed(checkpoint_paths(run.checkpoints)):
        try:
            checkpoint = read_checkpoint(path, verify=False)
        except CheckpointError:
            continue  # not a checkpoint, so not a kept one
        place = path.relative_to(storage).as_posix()
        model = known.get(place) or _create(client, record, checkpoint, _tags(checkpoint, storage))
        if model.status != "READY":
            when = times.get(checkpoint.step, checkpoint.state["time"])
            _log_metrics(client, record, checkpoint, model.model_id, when)
            model = client.finalize_logged_model(model.model_id, "READY")
        models[place], steps[model.model_id] = model, checkpoint.step
    for model in there:
        if model.status != "READY" and model.model_id not in steps:
            client.delete_logged_model(model.model_id)
    _link(client, record["run_id"], steps)
    return models


def _tags(checkpoint: Checkpoint, storage: Path) -> dict[str, str]:
    place = checkpoint.path.relative_to(storage).as_posix()
    return {STORAGE: str(storage), CHECKPOINT: place, DIGEST: checkpoint.digest}


def _create(
    client: Any, record: Mapping[str, Any], checkpoint: Checkpoint, tags: dict[str, str]
) -> Any:
    state = checkpoint.state
    return client.create_logged_model(
        record["experiment_id"],
        name=f"{state['stage']}-step-{checkpoint.step}".replace(".", "_"),
        source_run_id=record["run_id"],
        tags=tags,
        params={key: str(value) for key, value in flatten(state["model"], "model")},
        model_type=state["task"],
    )


def _log_metrics(
    client: Any, record: Mapping[str, Any], checkpoint: Checkpoint, model_id: str, when: float
) -> None:
    """The evaluation at a checkpoint; `when` of the journal, so that its points stay the same."""
    from mlflow.entities import Metric

    val = checkpoint.state["data"]["val"]
    points = [
        Metric(
            metric_name(key),
            value,
            int(when * 1000),
            checkpoint.step,
            model_id=model_id,
            dataset_name=f"{val['dataset']}/{val['split']}",
            dataset_digest=val["digest"][:32],
        )
        for key, value in checkpoint.state["metrics"].items()
    ]
    send_metrics(client, record["run_id"], points)


def _link(client: Any, run_id: str, steps: Mapping[str, int]) -> None:
    """Show models as outputs of their run, each once."""
    from mlflow.entities import LoggedModelOutput

    outputs = client.get_run(run_id).outputs
    shown = {output.model_id for output in outputs.model_outputs} if outputs else set()
    new = [LoggedModelOutput(model, step) for model, step in steps.items() if model not in shown]
    if new:
        client.log_outputs(run_id, new)


def register_result(client: Any, run_id: str, run: Run, model: Any) -> None:
    """Make sure that a finished run's result is a version of the model named as its stage.

    The alias `best` goes to the version of the best headline metric, the newest of equals, among
    those that were evaluated on the data of this one.
    """
    from mlflow import MlflowException

    record = run.read()
    try:
        versions = _with_version(client, run_id, record, model)
        score_of = {
            version: float(tags[_SCORE])
            for version, tags in versions.items()
            if _SCORE in tags and tags.get(_VALIDATED_ON) == record["data"]["val"]["digest"]
        }
        if score_of:
            best = max(score_of, key=lambda version: (score_of[version], version))
            client.set_registered_model_alias(record["stage"], BEST, str(best))
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        # A registry with rules of its own for names would refuse it every time.
        log.warning("%s: no version in the model registry: %s", record["stage"], error.message)


def _with_version(
    client: Any, run_id: str, record: Mapping[str, Any], model: Any
) -> dict[int, Mapping[str, str]]:
    """All versions of a stage with their tags, this run's among them."""
    name = record["stage"]
    _ensure_name(client, name)
    versions = client.search_model_versions(f"name = '{name}'")
    own = next(
        (v for v in versions if v.run_id == run_id and v.tags.get(DIGEST) == record["digest"]),
        None,
    )
    if own is None:
        own = client.create_model_version(
            name,
            model.artifact_location,
            run_id,
            _version_tags(record, model),
            model_id=model.model_id,
            await_creation_for=0,
        )
        versions = [*versions, own]
    link = json.dumps([{"name": name, "version": str(own.version)}])
    client.set_logged_model_tags(model.model_id, {_VERSIONS: link})
    return {int(version.version): version.tags for version in versions}


def _ensure_name(client: Any, name: str) -> None:
    from mlflow import MlflowException

    try:
        client.create_registered_model(
            name, description=f"Results of the stage {name}; their weights lie in the storage"
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _version_tags(record: Mapping[str, Any], model: Any) -> dict[str, str]:
    state = {"task": record["job"]["task"], "metrics": record["metrics"]}
    value = score(state)
    tags = {
        **{name: model.tags[name] for name in (STORAGE, CHECKPOINT, DIGEST)},
        "atrous.fingerprint": record["fingerprint"],
        _METRIC: HEADLINE[state["task"]],
        _VALIDATED_ON: record["data"]["val"]["digest"],
    }
    return tags if value is None else tags | {_SCORE: repr(value)}
