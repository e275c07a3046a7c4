"""The tracker: brings the outboxes of a driver's runs into MLflow, in the background.

Training never waits for MLflow. It writes outboxes (`raymed.tracking.outbox`); a thread of the driver process, the only
one that touches the store, uploads what is new about once a second. What cannot be uploaded now (the server does not
answer, the driver is killed) is uploaded later: by this tracker, by the same command started again, or by any later
tracker with the same storage and the same MLflow, which finds the outbox in `STORAGE/outboxes`.

Without a server the runs are in an sqlite store on the driver's machine. It stays there also where the storage is a
working copy of a bucket: its artifacts go to the bucket, and another machine that continues a run fills a store of its
own from the outbox, which lies in the bucket with the run. People and machines that are to see one store need a server.
"""

import hashlib
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from raymed.config import UserError
from raymed.storage import local_folder, remote_of, write_atomic
from raymed.telemetry import telemetry_off
from raymed.tracking.credentials import without_credentials
from raymed.tracking.outbox import Outbox, Status
from raymed.tracking.upload import Store, Upload

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
PROBE_SECONDS = 3
LONGEST_PAUSE = 5.0


class Tracker:
    """Uploads outboxes into an MLflow experiment until it is closed.

    uri: default $MLFLOW_TRACKING_URI, else an sqlite store under `storage`. A database, named or default, keeps its
    artifacts in STORAGE/mlartifacts or, where the storage is a working copy, in the bucket under mlflow/artifacts.
    experiment: name of the MLflow experiment, created when it is missing.
    storage: absolute folder; see `raymed.storage.resolve_storage`.
    period: seconds between two looks at the outboxes.

    The constructor neither imports MLflow nor touches the network: the first step of training waits for nothing.
    Raises UserError for the URI of a plain folder, which MLflow gave up.
    """

    def __init__(self, uri: str | None, experiment: str, storage: Path, period: float = 0.5):
        self._uri = resolve_uri(uri, storage)
        self.uri = without_credentials(self._uri)  # for people and files
        self.experiment = experiment
        self._is_server = self._uri.startswith("http")
        self._artifacts = artifacts_of(storage) if self._uri.startswith(DATABASES) else None
        self._markers = storage / "outboxes"
        self._uploads: dict[Path, Upload] = {}
        self._store: Store | None = None
        self._trouble: str | None = None
        self._period = self._pause = period
        self._is_closing = threading.Event()
        _calm_mlflow()
        self._adopt()
        self._thread = threading.Thread(target=self._work, name="raymed-tracker", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def follow(self, outbox: str | Path) -> None:
        """Upload this outbox from now on. The file need not exist yet."""
        path = Path(outbox).absolute()
        if path not in self._uploads or self._uploads[path].cursor.experiment != self.experiment:
            self._mark(path)
            self._uploads[path] = Upload(path, self.uri, self.experiment)

    def close_run(self, key: str, status: Status) -> None:
        """Give a followed run its last status in place of its process. A run that never opened has nothing to close."""
        upload = self._upload(key)
        if upload is not None and Outbox(upload.outbox).status() != status:
            Outbox(upload.outbox).close(status)

    def run_id(self, key: str, timeout: float = 0.0) -> str | None:
        """MLflow's id of a followed run; None while it is not uploaded.

        Waits for at most `timeout` seconds, since a short first run is over before its sqlite store is made, and not at
        all while MLflow does not take records.
        """
        deadline = time.monotonic() + timeout
        while (upload := self._upload(key)) is None or not upload.cursor.run_id:
            if self._trouble or time.monotonic() >= deadline:
                return None
            time.sleep(0.1)
        return upload.cursor.run_id

    def where(self, key: str) -> str:
        """Where a person finds a followed run: the address of its page, or the command that shows it."""
        upload = self._upload(key)
        if upload is None or not upload.cursor.run_id:
            return f"not yet in MLflow ({self.uri})" + (f": waits in {upload.outbox}" if upload else "")
        run_id, experiment_id = upload.cursor.run_id, upload.cursor.experiment_id
        if self._is_server:
            return f"{self.uri}/#/experiments/{experiment_id}/runs/{run_id}"
        name = (upload.opened or {}).get("name")
        return f"mlflow ui --backend-store-uri {self.uri}, run {name} ({run_id}) in experiment {self.experiment}"

    def close(self, timeout: float = 30.0) -> bool:
        """Upload what is left, for at most `timeout` seconds; True if nothing is. The rest is kept for the next start,
        and a line says so. An unreachable server is asked once more, not waited for."""
        self._is_closing.set()
        self._thread.join(timeout)
        left = [upload.outbox for upload in self._uploads.values() if upload.is_pending()]
        if left:
            waiting = "a run waits" if len(left) == 1 else f"{len(left)} runs wait"
            print(f"{waiting} for MLflow ({self.uri}), the next start uploads what is left: {left[0]}")
        self._forget_finished()
        return not left

    def _upload(self, key: str) -> Upload | None:
        return next((u for u in self._uploads.values() if u.opened is not None and u.opened["key"] == key), None)

    def _work(self) -> None:
        while not self._is_closing.wait(self._pause):
            self._pass()
            self._pause = min(2 * self._pause, LONGEST_PAUSE) if self._trouble else self._period
        while self._pass():
            continue

    def _pass(self) -> bool:
        """One look at every outbox; True if something was uploaded."""
        pending = [upload for upload in list(self._uploads.values()) if upload.is_pending()]
        if not pending:
            return False
        trouble, has_moved = None, False
        is_doubtful = self._is_server and (self._store is None or self._trouble is not None)
        for upload in pending:
            try:
                if is_doubtful:
                    _probe(self._uri)
                self._store = self._store or Store(self._uri, self._artifacts)
                has_moved |= upload.ship(self._store)
                is_doubtful = False
            except ConnectionError as error:
                trouble = str(error)
                break
            except Exception as error:  # whatever it is, work goes on, the records are kept, the others have their turn
                trouble = f"{type(error).__name__}: {without_credentials(str(error))[:200]}"
                is_doubtful = self._is_server
        self._report(trouble)
        return has_moved

    def _report(self, trouble: str | None) -> None:
        """One line when uploading starts to fail, one when it works again."""
        if trouble and not self._trouble:
            print(f"MLflow at {self.uri} does not take records ({trouble}). Work goes on; they are kept and sent later")
        if self._trouble and not trouble:
            print(f"MLflow at {self.uri} takes records again")
        self._trouble = trouble

    def _mark(self, outbox: Path) -> None:
        self._markers.mkdir(parents=True, exist_ok=True)
        marker = {"outbox": str(outbox), "uri": self.uri, "experiment": self.experiment}
        write_atomic(self._marker(outbox), json.dumps(marker))

    def _marker(self, outbox: Path) -> Path:
        return self._markers / f"{hashlib.sha256(str(outbox).encode()).hexdigest()[:16]}.json"

    def _adopt(self) -> None:
        """Follow what an earlier tracker left for the same MLflow."""
        for marker in sorted(self._markers.glob("*.json")):
            left = json.loads(marker.read_text())
            outbox = Path(left["outbox"])
            if not outbox.exists():
                marker.unlink(missing_ok=True)
            elif left["uri"] == self.uri:
                self._uploads[outbox] = Upload(outbox, self.uri, left["experiment"])

    def _forget_finished(self) -> None:
        for upload in self._uploads.values():
            if upload.cursor.status != "RUNNING" and not upload.is_pending():
                self._marker(upload.outbox).unlink(missing_ok=True)


def artifacts_of(storage: Path) -> str:
    """URI of the folder for the artifacts of a database that has no server. MLflow reads and writes s3:// with boto3:
    endpoint and credentials are those of the standard AWS variables."""
    remote = remote_of(storage)
    return (storage / "mlartifacts").as_uri() if remote is None else f"{remote}/mlflow/artifacts"


def resolve_uri(uri: str | None, storage: Path) -> str:
    """What MLflow is given for the `uri` and `storage` of a `Tracker`. Raises UserError for a plain folder's."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{local_folder(storage, 'mlflow') / 'mlflow.db'}"
    scheme = urlsplit(uri).scheme
    if scheme == "file" or not (scheme or uri == "databricks"):
        raise UserError(
            f"MLflow keeps no runs in plain folders any more, got {uri}: give sqlite:///PATH/mlflow.db, the "
            "http://HOST:PORT of a server, or nothing (a store under --storage)"
        )
    if scheme == "sqlite":
        path = Path(uri.removeprefix("sqlite:///")).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{path}"
    return uri.rstrip("/")


def _calm_mlflow() -> None:
    """For the MLflow client of this process, before it is imported: no telemetry, and minutes of retries become one."""
    telemetry_off()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")


def _probe(uri: str) -> None:
    """Raise ConnectionError unless the server answers within a few seconds. A complaint about its certificate is an
    answer: whether to trust it is for MLflow's client to say."""
    import requests

    try:
        response = requests.get(f"{uri}/health", timeout=PROBE_SECONDS)
    except requests.exceptions.SSLError:
        return
    except requests.exceptions.Timeout:
        raise ConnectionError(f"no answer within {PROBE_SECONDS} s") from None
    except requests.exceptions.RequestException:
        raise ConnectionError("no connection") from None
    if response.status_code >= 502:
        raise ConnectionError(f"answer {response.status_code}")


def connect(uri: str | None, storage: Path) -> "MlflowClient":
    """A client of the tracking store and registry that a `Tracker` with these arguments fills.

    Raises UserError when the server does not answer.
    """
    resolved = resolve_uri(uri, storage)
    _calm_mlflow()
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if resolved.startswith("http"):
        try:
            _probe(resolved)
        except ConnectionError as error:
            advice = "name the server with --tracking, or start it"
            raise UserError(f"MLflow does not answer at {without_credentials(resolved)} ({error}): {advice}") from None
    from mlflow import MlflowClient

    for noisy in ("mlflow.store.db.utils", "mlflow.store.model_registry", "alembic", "mlflow.pyfunc"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=resolved, registry_uri=resolved)
