"""An MLflow database for tests that need one: created once, which takes seconds, then copied."""

import shutil
from pathlib import Path

import mlflow
import pytest


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def storage(tmp_path: Path, empty_database: Path) -> Path:
    """A storage with an embedded MLflow."""
    place = tmp_path / "storage"
    place.mkdir()
    shutil.copy(empty_database, place / "mlflow.db")
    return place
