import shutil
from pathlib import Path

import pytest

from raymed.telemetry import telemetry_off
from raymed.tracking.upload import Store


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """An empty MLflow database: making one takes seconds, copying it none."""
    telemetry_off()
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    Store(f"sqlite:///{path}", None).client.search_experiments()
    return path


@pytest.fixture
def storage(tmp_path, empty_store, monkeypatch) -> Path:
    """A storage folder whose default store is there already."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "storage/mlflow").mkdir(parents=True)
    shutil.copy(empty_store, tmp_path / "storage/mlflow/mlflow.db")
    return tmp_path / "storage"


@pytest.fixture
def client(storage):
    """MLflow's own view of the default store."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow/mlflow.db")
