"""MLflow's server with a user and a password: runs in sqlite, artifacts in a folder beside it."""

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from raymed.cluster.services import get
from raymed.config import UserError

USER = "raymed"


def check_installed() -> None:
    """Raise UserError where what asks for the password is missing."""
    if find_spec("flask_wtf") is None:
        raise UserError("MLflow cannot ask for a password: pip install 'mlflow[auth]'")


def command(folder: Path, port: int) -> list[str]:
    """What starts it, on 127.0.0.1."""
    words = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1"]
    words += ["--port", str(port), "--workers", "1"]  # sqlite has one writer
    store = f"sqlite:///{folder}/mlflow.db"
    return [*words, "--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts")]


def environment(folder: Path, password: str, session_key: str) -> dict[str, str]:
    """Of its process; makes the folder, and says in it where users are kept.

    The password is that of the first user, who is made when there is none yet.
    """
    (folder / "artifacts").mkdir(parents=True, exist_ok=True, mode=0o700)
    # Every request shows the password; checking it anew each time costs more than the request.
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/users.db\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\nauth_cache_ttl_seconds = 60\n"
    )
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": USER,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": session_key,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # of its evaluations: several more processes
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def ask(environment: Mapping[str, str]) -> str:
    """How it is, asked as a client with this environment. Raises Silent."""
    url = environment["MLFLOW_TRACKING_URI"]
    user = (environment["MLFLOW_TRACKING_USERNAME"], environment["MLFLOW_TRACKING_PASSWORD"])
    get(f"{url}/api/2.0/mlflow/experiments/search", params={"max_results": 1}, auth=user)
    return f"{url}, asks for a name and a password"
