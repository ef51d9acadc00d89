"""MLflow shows what the run directories say: a background thread that makes the two agree.

`_synchronise` brings MLflow up to date from the files of a run and can be repeated at any time: a
tracking server that is down delays what it shows and nothing else.
"""

import json
import logging
import os
import shlex
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError
from orchestrator.files import read_json, write_json
from orchestrator.runs.checkpoint import Checkpoint, checkpoint_paths, read_checkpoint
from orchestrator.runs.record import flatten
from orchestrator.runs.run import Run, read_journal

log = logging.getLogger(__name__)

EXPERIMENT = "atrous"
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the view it opens in
_ENDED = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_EVERY = 1.0  # seconds between looks at a run
_BATCH = 1000  # metrics of one request; a server's limit
_PARAMS_BATCH = 100  # parameters of one request; a server's limit
_creation = threading.Lock()  # one thread at a time creates the database, the experiment, a parent


def tracking_uri(storage: Path) -> str:
    """MLFLOW_TRACKING_URI, else an SQLite file in the storage."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage / 'mlflow.db'}"


def ui_command(uri: str) -> str | None:
    """The command that serves an embedded database; None for a server, which has its own page."""
    return None if uri.startswith("http") else f"{program('mlflow')} ui --backend-store-uri '{uri}'"


def program(name: str) -> str:
    """How to call a program of this environment in the user's shell."""
    if shutil.which(name):
        return name
    return shlex.quote(str(Path(sys.executable).with_name(name)))


def run_link(uri: str, record: dict[str, Any]) -> str:
    """Address of a run's page."""
    base = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    return f"{base}/#/experiments/{record['experiment_id']}/runs/{record['run_id']}"


def is_tracked(run: Run) -> bool:
    """Whether MLflow has all of a run that has ended."""
    record = read_json(run.tracking) or {}
    return record.get("status") is not None and record.get("status") == run.read().get("status")


class Tracker:
    """Mirrors one run directory to MLflow from a thread of its own."""

    def __init__(self, storage: Path, run: Run, parent: "Tracker | None" = None) -> None:
        self._storage = storage
        self._run = run
        self._parent = parent
        self._uri = tracking_uri(storage)
        self._closing = threading.Event()
        self._complete = False
        self._thread = threading.Thread(
            target=self._work, name=f"track {run.path.name}", daemon=True
        )
        self._thread.start()

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
                    log.warning("MLflow at %s: %s", self._uri, _first_line(error))
                delay = min(60.0, delay * 2)

    def _synchronise(self) -> None:
        client = self._client()
        record = self._record(client)
        self._send_metrics(client, record)
        run = self._run.read()
        status = run.get("status")
        if status in _ENDED and record.get("status") != status:
            if status == "finished" and "stage" in run:
                _log_models(client, record, self._run)
            _log_bill(client, record["run_id"], run)
            client.set_terminated(record["run_id"], _ENDED[status])
            self._write(record | {"status": status})

    def _client(self) -> Any:
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        # A server that does not answer is tried again later; MLflow itself would try for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        with _creation:
            import mlflow

            client = mlflow.MlflowClient(tracking_uri=self._uri)
            if client.get_experiment_by_name(EXPERIMENT) is None:
                embedded = self._uri.startswith("sqlite:")
                artifacts = (self._storage / "mlartifacts").as_uri() if embedded else None
                client.create_experiment(EXPERIMENT, artifacts, tags=_EXPERIMENT_TAGS)
            return client

    def _record(self, client: Any) -> dict[str, Any]:
        """tracking.json, after making sure that the run exists at this server."""
        with _creation:
            record = read_json(self._run.tracking)
            if record is not None and record["uri"] == self._uri:
                if record.get("status") not in (None, "finished"):  # failed before, runs again
                    client.update_run(record["run_id"], status="RUNNING")
                    record = self._write(record | {"status": None})
                return record
        parent = self._parent._record(client) if self._parent else None
        with _creation:
            experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
            run_id = self._find(client, experiment) or self._create(client, experiment, parent)
            self._describe(client, run_id)
            return self._write(
                {"uri": self._uri, "experiment_id": experiment, "run_id": run_id, "sent_step": 0}
            )

    def _write(self, record: dict[str, Any]) -> dict[str, Any]:
        write_json(self._run.tracking, record)
        return record

    def _find(self, client: Any, experiment: str) -> str | None:
        """A run created by an attempt that was killed before it could write tracking.json."""
        found = client.search_runs(
            [experiment], f"tags.`atrous.run` = '{self._run.path}'", max_results=1
        )
        return found[0].info.run_id if found else None

    def _create(self, client: Any, experiment: str, parent: dict[str, Any] | None) -> str:
        run = self._run.read()
        tags = _tags(run, self._run) | ({"mlflow.parentRunId": parent["run_id"]} if parent else {})
        return client.create_run(experiment, tags=tags, run_name=run["name"]).info.run_id

    def _describe(self, client: Any, run_id: str) -> None:
        """Job file and data of a run; can be repeated, since a kill may come in between."""
        from mlflow.entities import Param

        run = self._run.read()
        params = [Param(key, str(value)[:6000]) for key, value in flatten(run["job"])]
        for start in range(0, len(params), _PARAMS_BATCH):
            client.log_batch(run_id, params=params[start : start + _PARAMS_BATCH])
        if "data" in run:
            client.log_inputs(run_id, datasets=[_dataset(*item) for item in run["data"].items()])
        client.log_dict(run_id, run["job"], "job.yaml")

    def _send_metrics(self, client: Any, record: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(key, value, int(line["time"] * 1000), line["step"])
            for line in read_journal(self._run.journal, after=record["sent_step"])
            for key, value in line["metrics"].items()
        ]
        for start in range(0, len(points), _BATCH):
            client.log_batch(record["run_id"], metrics=points[start : start + _BATCH])
        if points:
            record["sent_step"] = points[-1].step
            self._write(record)


def _tags(run: dict[str, Any], directory: Run) -> dict[str, str]:
    tags = {
        "atrous.run": str(directory.path),
        "atrous.kind": "stage" if "stage" in run else "pipeline",
        "atrous.fingerprint": run["fingerprint"],
    }
    if "stage" in run:
        tags |= {"atrous.stage": run["stage"], "atrous.task": run["job"]["task"]}
    start = run.get("start")
    if start:
        tags |= {
            "atrous.start_from.checkpoint": str(Path(start["weights"]).parent),
            "atrous.start_from.digest": start["digest"],
            "atrous.start_from.take": start["take"],
        }
        if start["stage"]:
            tags["atrous.start_from.stage"] = start["stage"]
        parent = read_json(Path(start["weights"]).parents[2] / "tracking.json")
        if parent:
            tags["atrous.start_from.run_id"] = parent["run_id"]
    return tags


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


def _log_bill(client: Any, run_id: str, run: dict[str, Any]) -> None:
    """What an ended run has cost, as metrics of its last moment; can be repeated."""
    from mlflow.entities import Metric

    when = int(run["updated"] * 1000)
    points = [
        Metric(f"bill/{name}".replace(" ", "_"), value, when, run.get("steps", 0))
        for name, value in flatten(run.get("bill", {}))
        if value is not None
    ]
    client.log_batch(run_id, metrics=points)


def _log_models(client: Any, record: dict[str, Any], run: Run) -> None:
    """One LoggedModel for each kept checkpoint; a checkpoint that has one is passed over."""
    from mlflow.entities import LoggedModelOutput

    outputs = []
    for path in reversed(checkpoint_paths(run.checkpoints)):
        try:
            checkpoint = read_checkpoint(path, verify=False)
        except CheckpointError:
            continue  # not a checkpoint, so not a kept one
        if not client.search_logged_models(
            [record["experiment_id"]], f"tags.`atrous.checkpoint` = '{path}'", max_results=1
        ):
            model_id = _log_model(client, record, checkpoint)
            outputs.append(LoggedModelOutput(model_id, checkpoint.step))
    if outputs:
        client.log_outputs(record["run_id"], outputs)


def _log_model(client: Any, record: dict[str, Any], checkpoint: Checkpoint) -> str:
    state = checkpoint.state
    model = client.create_logged_model(
        record["experiment_id"],
        name=f"{state['stage']}-step-{checkpoint.step}".replace(".", "_"),
        source_run_id=record["run_id"],
        tags={"atrous.checkpoint": str(checkpoint.path), "atrous.digest": checkpoint.digest},
        params={key: str(value) for key, value in flatten(state["model"], "model")},
        model_type=state["task"],
    )
    val = state["data"]["val"]
    for key, value in state["metrics"].items():
        client.log_metric(
            record["run_id"],
            key,
            value,
            step=checkpoint.step,
            model_id=model.model_id,
            dataset_name=f"{val['dataset']}/{val['split']}",
            dataset_digest=val["digest"][:32],
        )
    client.finalize_logged_model(model.model_id, "READY")
    return model.model_id


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
