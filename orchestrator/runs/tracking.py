"""MLflow shows what the run directories say: a background thread that makes the two agree.

`_synchronise` brings MLflow up to date from the files of a run and can be repeated at any time: a
tracking server that is down delays what it shows and nothing else.
"""

import json
import logging
import math
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.files import read_json, write_json
from orchestrator.runs.checkpoint import MANIFEST, checkpoint_paths
from orchestrator.runs.lineage import parent_path
from orchestrator.runs.record import flatten
from orchestrator.runs.registry import (
    CHECKPOINT,
    DIGEST,
    RUN,
    STORAGE,
    log_models,
    register_result,
)
from orchestrator.runs.run import Run, read_journal
from orchestrator.runs.server import (
    connect,
    creation,
    experiment_id,
    first_line,
    has_run,
    metric_name,
    send_metrics,
    tracking_uri,
)

log = logging.getLogger(__name__)

_ENDED = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_EVERY = 2.0  # seconds between looks at a run
_PARAMS_BATCH = 100  # parameters of one request; a server's limit
_CREATED = "atrous.created"


def is_tracked(run: Run) -> bool:
    """Whether the MLflow of its storage has all of a run that has ended."""
    record = read_json(run.tracking) or {}
    status, uri = record.get("status"), record.get("uri")
    if status is None or status != run.read().get("status"):
        return False
    return uri == tracking_uri(run.path.parents[1]) and has_run(uri, record["run_id"])


class Tracker:
    """Mirrors one run directory to MLflow from a thread of its own."""

    def __init__(self, storage: Path, run: Run, parent: "Tracker | None" = None) -> None:
        self._storage = storage
        self._run = run
        self._parent = parent
        self._uri = tracking_uri(storage)
        self._closing = threading.Event()
        self._complete = False
        self._progress = ""
        self._thread = threading.Thread(
            target=self._work, name=f"track {run.path.name}", daemon=True
        )
        self._thread.start()

    @property
    def run(self) -> Run:
        """The run that is mirrored."""
        return self._run

    def close(self) -> None:
        """Send the rest; what the server does not take stays in the journal, and that is said."""
        self._closing.set()
        self._thread.join()
        if not self._complete:
            log.warning(
                "MLflow at %s does not have all of %s; the same command sends the rest",
                self._uri,
                self._run.path,
            )

    def _work(self) -> None:
        delay = _EVERY
        closing = False
        while not closing:
            closing = self._closing.wait(delay)
            try:
                self._synchronise()
                delay, self._complete = _EVERY, closing
            except Exception as error:  # anything a store or the network can raise
                if delay == _EVERY:
                    log.warning("MLflow at %s: %s", self._uri, first_line(error))
                delay = min(60.0, delay * 2)

    def _synchronise(self) -> None:
        client = connect(self._uri)
        record = self._record(client)
        run = self._run.read()  # before the journal: of a run that has ended, that is whole
        self._send_metrics(client, record, run)
        status = run.get("status")
        if status in _ENDED and record.get("status") != status:
            self._send_end(client, record, run)
            ended = int(run["updated"] * 1000)  # it may have been long ago
            client.set_terminated(record["run_id"], _ENDED[status], ended)
            self._write(record | {"status": status})

    def _send_end(self, client: Any, record: dict[str, Any], run: dict[str, Any]) -> None:
        """What is known only once a run has ended."""
        from mlflow.entities import RunTag

        _log_artifacts(client, record["run_id"], self._run)
        _log_bill(client, record, run)
        if run["status"] != "finished" or "stage" not in run:
            return
        result = (self._run.path / run["checkpoint"]).relative_to(self._storage).as_posix()
        tags = [RunTag(CHECKPOINT, result), RunTag(DIGEST, run["digest"])]
        client.log_batch(record["run_id"], tags=tags)
        models = log_models(client, record, self._run, self._storage)
        if result in models:
            register_result(client, record["run_id"], self._run, models[result])

    def _record(self, client: Any) -> dict[str, Any]:
        """tracking.json, after making sure that the run exists at this server."""
        with creation:
            record: dict[str, Any] = read_json(self._run.tracking) or {}
            if record.get("uri") == self._uri and has_run(self._uri, record["run_id"]):
                if record.get("status") not in (None, "finished"):  # failed before, runs again
                    client.update_run(record["run_id"], status="RUNNING")
                    record = self._write(record | {"status": None})
                return record
        parent = self._parent._record(client) if self._parent else None
        with creation:
            experiment = experiment_id(client, self._uri, self._storage)
            run_id = self._find(client, experiment) or self._create(client, experiment, parent)
            self._describe(client, run_id)
            return self._write(
                {"uri": self._uri, "experiment_id": experiment, "run_id": run_id, "sent_step": 0}
            )

    def _write(self, record: dict[str, Any]) -> dict[str, Any]:
        write_json(self._run.tracking, record)
        return record

    def _find(self, client: Any, experiment: str) -> str | None:
        """A run created by a killed attempt before it wrote tracking.json, or before a move."""
        own = self._identity()
        found = client.search_runs(
            [experiment],
            " and ".join(f"tags.`{name}` = '{value}'" for name, value in own.items()),
            max_results=1,
        )
        return found[0].info.run_id if found else None

    def _identity(self) -> dict[str, str]:
        """What tells this run from all others, wherever the storage lies."""
        path = self._run.path.relative_to(self._storage).as_posix()
        return {RUN: path, _CREATED: repr(self._run.read()["created"])}

    def _create(self, client: Any, experiment: str, parent: dict[str, Any] | None) -> str:
        run = self._run.read()
        tags = self._identity() | {STORAGE: str(self._storage)} | _tags(run, self._storage)
        if parent:
            tags["mlflow.parentRunId"] = parent["run_id"]
        began = int(run["created"] * 1000)
        return client.create_run(experiment, began, tags, run["name"]).info.run_id

    def _describe(self, client: Any, run_id: str) -> None:
        """Job file and data of a run; can be repeated, since a kill may come in between."""
        from mlflow.entities import Param

        run = self._run.read()
        # A run that went on with, say, other workers: MLflow refuses another value.
        known = client.get_run(run_id).data.params
        values = ((key, value) for key, value in flatten(run["job"]) if key not in known)
        params = [Param(key, str(value)[:6000]) for key, value in values]
        for start in range(0, len(params), _PARAMS_BATCH):
            client.log_batch(run_id, params=params[start : start + _PARAMS_BATCH])
        if "data" in run:
            client.log_inputs(run_id, datasets=[_dataset(*item) for item in run["data"].items()])
        client.log_dict(run_id, run["job"], "job.yaml")

    def _send_metrics(self, client: Any, record: dict[str, Any], run: dict[str, Any]) -> None:
        """Send what a checkpoint covers: a run never goes back behind it, and writes no other.

        MLflow cannot delete points. Of what lies after it a tag tells the newest.
        """
        from mlflow.entities import Metric

        # In this order: what is then in the journal up to this step is what the checkpoint covers.
        durable = math.inf if run.get("status") == "finished" else _durable_step(self._run)
        lines = read_journal(self._run.journal, after=record["sent_step"])
        due = [line for line in lines if line["step"] <= durable]
        points = [
            Metric(metric_name(key), value, int(line["time"] * 1000), line["step"])
            for line in due
            for key, value in line["metrics"].items()
        ]
        send_metrics(client, record["run_id"], points)
        if due:
            record["sent_step"] = due[-1]["step"]
            self._write(record)
        if lines and (progress := _progress(lines[-1], run)) != self._progress:
            client.set_tag(record["run_id"], "atrous.progress", progress)
            self._progress = progress


def _durable_step(run: Run) -> int:
    """Step of the newest complete checkpoint."""
    complete = (path for path in checkpoint_paths(run.checkpoints) if (path / MANIFEST).exists())
    newest = next(complete, None)
    return int(newest.name.removeprefix("step-")) if newest else 0


def _progress(line: dict[str, Any], run: dict[str, Any]) -> str:
    values = [
        f"{name} {line['metrics'][name]:.4g}"
        for name in ("train/loss", "train/images_per_second")
        if name in line["metrics"]
    ]
    return ", ".join([f"step {line['step']} of {run.get('steps')}", *values])


def _tags(run: dict[str, Any], storage: Path) -> dict[str, str]:
    tags = {
        "atrous.kind": "stage" if "stage" in run else run["job"]["kind"],
        "atrous.fingerprint": run["fingerprint"],
    }
    if "stage" in run:
        tags |= {"atrous.stage": run["stage"], "atrous.task": run["job"]["task"]}
    commit = run.get("code", {}).get("commit")
    if commit:
        tags["mlflow.source.git.commit"] = commit
    start = run.get("start")
    if start:
        tags |= _start_tags(start, storage)
    return tags


def _start_tags(start: dict[str, Any], storage: Path) -> dict[str, str]:
    """Where a stage's weights came from, by digest, and by the names that led there."""
    checkpoint = parent_path(start, storage)
    inside = checkpoint.is_relative_to(storage)
    parent = read_json(Run(checkpoint.parents[1]).tracking) if start["stage"] else None
    tags = {
        "atrous.start_from.checkpoint": str(
            checkpoint.relative_to(storage) if inside else checkpoint
        ),
        "atrous.start_from.digest": start["digest"],
        "atrous.start_from.take": start["take"],
        "atrous.start_from.stage": start["stage"],
        "atrous.start_from.reference": start.get("reference"),
        "atrous.start_from.origin": start["origin"],
        "atrous.start_from.run_id": parent["run_id"] if parent else None,
    }
    return {name: value for name, value in tags.items() if value is not None}


def _dataset(role: str, record: dict[str, Any]) -> Any:
    """A split as an MLflow input; its digest field holds 36 characters, the source all of it."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=f"{record['dataset']}/{record['split']}",
        digest=record["digest"][:32],
        source_type="local",
        source=json.dumps({"manifest": record["manifest"], "digest": record["digest"]}),
        profile=json.dumps({"num_samples": record["num_samples"]}),
    )
    context = "training" if role == "train" else "evaluation"
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _log_artifacts(client: Any, run_id: str, run: Run) -> None:
    """Pictures and tables of a run; can be repeated."""
    for path in sorted(run.artifacts.glob("*/*")):
        with TemporaryDirectory() as folder:  # MLflow sends files of this machine
            copy = Path(folder) / path.name
            copy.write_bytes(path.read_bytes())
            client.log_artifact(run_id, str(copy), path.parent.name)


def _log_bill(client: Any, record: dict[str, Any], run: dict[str, Any]) -> None:
    """What a run has cost by now, as metrics of its last step; can be repeated."""
    from mlflow.entities import Metric

    when = int(run["updated"] * 1000)
    points = [
        Metric(metric_name(f"bill/{name}".replace(" ", "_")), value, when, record["sent_step"])
        for name, value in flatten(run.get("bill", {}))
        if value is not None
    ]
    send_metrics(client, record["run_id"], points)
