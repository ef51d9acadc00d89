"""The MLflow that a storage's runs are shown in: its address, a client, and what it accepts."""

import os
import re
import shlex
import shutil
import sqlite3
import sys
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from orchestrator.bucket import on_disk

EXPERIMENT = "atrous"
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the view it opens in
_EMBEDDED = "sqlite:///"
_BATCH = 1000  # metrics of one request; a server's limit
_REFUSED = re.compile(r"[^/\w.\- ]")  # characters in the name of a metric
creation = threading.Lock()  # one thread at a time creates the database, the experiment, a parent


def tracking_uri(storage: Path) -> str:
    """MLFLOW_TRACKING_URI, else an SQLite file: in the storage, or ~/atrous for one in a bucket."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{_EMBEDDED}{on_disk(storage) / 'mlflow.db'}"


def is_there(uri: str) -> bool:
    """Whether an embedded database exists; MLflow would create it. Servers are asked instead."""
    return not uri.startswith(_EMBEDDED) or Path(uri.removeprefix(_EMBEDDED)).exists()


def has_run(uri: str, run_id: str) -> bool:
    """Whether an embedded database, which may be deleted and begun anew, has a run.

    Servers are taken to have it.
    """
    if not uri.startswith(_EMBEDDED):
        return True
    try:
        place = f"{Path(uri.removeprefix(_EMBEDDED)).absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(place, uri=True)) as database:
            found = database.execute("select 1 from runs where run_uuid = ?", (run_id,))
            return found.fetchone() is not None
    except sqlite3.OperationalError:  # no such file, or still without tables
        return False


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


def connect(uri: str) -> Any:
    """A client that gives up soon: what asks it in vain asks again later, or tells the user."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    if uri.startswith(_EMBEDDED):
        Path(uri.removeprefix(_EMBEDDED)).parent.mkdir(parents=True, exist_ok=True)
    with creation:
        import mlflow

        return mlflow.MlflowClient(tracking_uri=uri)


def experiment_id(client: Any, uri: str, storage: Path) -> str:
    """The experiment of all runs, created where there is none; the caller holds `creation`."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return found.experiment_id
    on_server = uri.startswith("http")  # which knows where its artifacts go
    artifacts = None if on_server else (on_disk(storage) / "mlartifacts").as_uri()
    return client.create_experiment(EXPERIMENT, artifacts, tags=_EXPERIMENT_TAGS)


def metric_name(name: str) -> str:
    """A metric's name as MLflow takes it; class names may have any character."""
    return _REFUSED.sub("_", name)[:250]


def send_metrics(client: Any, run_id: str, points: Sequence[Any]) -> None:
    """Log metrics; those that are there already, to the millisecond, stay as they are."""
    for start in range(0, len(points), _BATCH):
        client.log_batch(run_id, metrics=points[start : start + _BATCH])


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]
