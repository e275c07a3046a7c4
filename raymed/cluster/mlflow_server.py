"""MLflow on a machine that may go: its database is taken from the storage, and brought there while it runs.

    python -m raymed.cluster.mlflow_server --folder mlflow --port 5000

The variables RAYMED_HOME (the storage), MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD say the rest. Models and
files go to STORAGE/mlflow/artifacts at once, the database to STORAGE/mlflow/mlflow.db every minute and at the end
(SIGTERM): a machine that is lost without a word takes a minute of figures with it. Users are made anew at each start.

A folder may still have the database of an earlier time, while another machine, or a backup that was restored, has
brought a later one to the storage. So FOLDER/kept.sha256 says what this folder and the storage last had in common, and
what is not that is never overwritten.
"""

import hashlib
import os
import secrets
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from raymed.config import UserError, check_range
from raymed.storage.locations import exists, join, read_bytes, write_bytes
from raymed.storage.paths import write_atomic

DATABASE = "mlflow.db"
_KEPT, _IN_COMMON, _REPLACED = "mlflow", "kept.sha256", "replaced"


@dataclass(frozen=True)
class MlflowConfig:
    """Where MLflow listens and works.

    folder: of its database while it runs; on a disk of this machine.
    host: 127.0.0.1 for this machine alone; 0.0.0.0 for a network that nobody from outside gets into.
    copy_s: seconds between two copies of the database.
    """

    folder: str = "mlflow"
    host: str = "127.0.0.1"
    port: int = 5000
    copy_s: float = 60.0

    def __post_init__(self) -> None:
        check_range("port", self.port, 1, 65535)
        check_range("copy-s", self.copy_s, 0, low_open=True)


def take_back(folder: Path, storage: str) -> bool:
    """Put the kept database into the folder, if there is one, unless that is what the folder itself brought there: its
    own is newer then. Whether that was done.

    What stood there goes to FOLDER/replaced, with the time, and is never deleted: the wrong backup may be restored."""
    kept = join(storage, _KEPT, DATABASE)
    if not exists(kept):
        return False
    data = read_bytes(kept)
    if (folder / DATABASE).exists():
        if _digest(data) in _brought(folder):
            return False
        _put_aside(folder)
    write_atomic(folder / DATABASE, data)
    write_atomic(folder / _IN_COMMON, _digest(data))
    return True


def keep(folder: Path, storage: str) -> None:
    """Bring the database to the storage as it is between two transactions, whoever writes meanwhile. Raises UserError
    where another one is kept there by now than this folder has brought or taken."""
    kept = join(storage, _KEPT, DATABASE)
    found = _digest(read_bytes(kept)) if exists(kept) else ""
    if found and found not in _brought(folder):
        raise UserError(
            f"{kept} is not what this server took or brought there, but a restored one or another server's, and stays: "
            "take the cluster down and up to go on with it"
        )
    with TemporaryDirectory(dir=folder) as scratch:
        copy = Path(scratch) / DATABASE
        with closing(sqlite3.connect(folder / DATABASE)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        data = copy.read_bytes()
        # Both are this folder's own: nobody can say which one is kept where the writing fails, or this process ends.
        write_atomic(folder / _IN_COMMON, f"{found} {_digest(data)}")
        write_bytes(kept, data)
        write_atomic(folder / _IN_COMMON, _digest(data))


def _brought(folder: Path) -> list[str]:
    """Digests of what this folder took from the storage or brought there last."""
    in_common = folder / _IN_COMMON
    return in_common.read_text().split() if in_common.is_file() else []


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _put_aside(folder: Path) -> None:
    """The database with its journals, which sqlite would apply to the next one; the database last, so that an end in
    between leaves no journal without it."""
    (folder / _REPLACED).mkdir(exist_ok=True)
    aside = Path(mkdtemp(prefix=f"{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}-", dir=folder / _REPLACED))
    for path in sorted(folder.glob(f"{DATABASE}*"), reverse=True):
        path.rename(aside / path.name)


def run(config: MlflowConfig) -> str:
    """Serve until SIGTERM, or until MLflow ends by itself. Raises UserError for what is missing."""
    storage = _variable("RAYMED_HOME")
    folder = Path(config.folder).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if take_back(folder, storage):
        print(f"took back {DATABASE} from {storage}", flush=True)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with TemporaryDirectory(prefix="mlflow-") as private:  # users: of this start alone
        server = subprocess.Popen(_command(config, folder, storage), env=_environment(Path(private)))
        try:
            _bring_while_running(server, stop, config.copy_s, folder, storage)
        finally:
            server.terminate()
            server.wait()
            if (folder / DATABASE).exists():
                keep(folder, storage)
    if not stop.is_set():
        raise UserError(f"MLflow ended by itself with exit code {server.returncode}: what it said stands above")
    return f"{DATABASE} is in {storage}"


def _bring_while_running(
    server: subprocess.Popen, stop: threading.Event, copy_s: float, folder: Path, storage: str
) -> None:
    changed = None
    while not stop.wait(min(copy_s, 1.0)) and server.poll() is None:
        now = _state(folder)
        if now == changed or stop.wait(copy_s):
            continue
        try:
            keep(folder, storage)
            changed = now
        except (OSError, UserError, sqlite3.Error) as error:
            print(f"{DATABASE} was not copied ({error}): trying again", file=sys.stderr, flush=True)


def _state(folder: Path) -> list[int]:
    """Differs when anything was written: also to the journal that sqlite keeps beside."""
    return [path.stat().st_mtime_ns for path in sorted(folder.glob(f"{DATABASE}*"))]


def _command(config: MlflowConfig, folder: Path, storage: str) -> list[str]:
    words = [sys.executable, "-m", "mlflow", "server", "--app-name=basic-auth", "--workers=1"]
    words += [f"--host={config.host}", f"--port={config.port}", f"--backend-store-uri=sqlite:///{folder / DATABASE}"]
    # Whoever asks must know the password; by what name it is asked does not matter.
    return [*words, f"--artifacts-destination={storage.rstrip('/')}/{_KEPT}/artifacts", "--allowed-hosts=*"]


def _environment(private: Path) -> dict[str, str]:
    settings = private / "auth.ini"
    lines = ["[mlflow]", "default_permission = READ", f"database_uri = sqlite:///{private / 'auth.db'}"]
    lines += [f"admin_username = {_variable('MLFLOW_TRACKING_USERNAME')}"]
    lines += ["authorization_function = mlflow.server.auth:authenticate_request_basic_auth"]
    settings.write_text("\n".join(lines) + "\n")
    own = {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32)}
    own["MLFLOW_AUTH_ADMIN_PASSWORD"] = _variable("MLFLOW_TRACKING_PASSWORD")
    return {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | own


def _variable(name: str) -> str:
    if not (value := os.environ.get(name)):
        raise UserError(f"{name} is not set: MLflow's server takes its storage, user and password from the environment")
    return value


if __name__ == "__main__":
    from raymed.command import command

    command(MlflowConfig, run)
