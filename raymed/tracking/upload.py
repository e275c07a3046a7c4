"""Upload of one outbox into one MLflow run, from where the last upload stopped.

Beside `outbox.jsonl` stands `outbox.cursor.json`: how far the file is uploaded, into which run, the last step of every
metric, and a hash of the last bytes that are uploaded. A process that dies between an upload and its cursor repeats the
upload, which changes nothing: the run is found by the tag `raymed.run_key`, and of every metric only later steps than
the run has are sent.

Where the outbox of a worker on another node comes through a bucket, its file is replaced by ever longer ones. One that
is shorter than what is uploaded, or does not continue it, is read from its beginning, into the same run. A file that it
names may come a moment later than the outbox itself.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import posixpath
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from raymed.config import flatten
from raymed.storage import Mirror, local_copy, local_folder_copy, remote_of, s3, write_atomic
from raymed.tracking.credentials import without_credentials
from raymed.tracking.outbox import SYSTEM_PREFIX, read

_SQLITE = "sqlite:///"
RUN_KEY = "raymed.run_key"
PARENT = "mlflow.parentRunId"
MAX_METRICS, MAX_PARAMS, MAX_TAGS = 1000, 100, 100  # of one request
MAX_PARAM_LENGTH, MAX_TAG_LENGTH, MAX_NAME_LENGTH = 6000, 8000, 250
TAIL = 1024  # bytes before the cursor that tell whether a file is still the one that was uploaded
ARTIFACT_PATIENCE = 60.0  # seconds that an artifact may take to come through a bucket


class Store:
    """An MLflow store: experiments by name, and runs by key.

    artifacts: URI of the folder where a new experiment keeps its files; None leaves it to the server.
    """

    def __init__(self, uri: str, artifacts: str | None):
        from mlflow import MlflowClient

        for noisy in ("mlflow.store.db.utils", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)  # they tell of every table they make
        # It prints two lines for every run that ends, of a sweep hundreds; a job says once where its run is.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        if uri.startswith(_SQLITE) and "?" not in uri:
            _make_database(Path(uri.removeprefix(_SQLITE)))
        self.client = MlflowClient(tracking_uri=uri)
        self.artifacts = artifacts
        self._experiments: dict[str, str] = {}

    def experiment_id(self, name: str) -> str:
        if name not in self._experiments:
            found = self.client.get_experiment_by_name(name)
            if found is None:
                self._experiments[name] = self.client.create_experiment(name, artifact_location=self.artifacts)
            else:
                if found.lifecycle_stage == "deleted":
                    self.client.restore_experiment(found.experiment_id)
                self._experiments[name] = found.experiment_id
        return self._experiments[name]

    def find(self, experiment: str, key: str) -> Any | None:
        """The run with this key (the oldest, should there be several), or None."""
        where = f"tags.`{RUN_KEY}` = '{key}'"
        order = ["attributes.start_time ASC"]
        runs = self.client.search_runs([self.experiment_id(experiment)], where, max_results=1, order_by=order)
        return runs[0] if runs else None

    def active(self, run_id: str) -> Any | None:
        """The run with this id; None when it was deleted, or the whole store with it."""
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None


def _make_database(path: Path) -> None:
    """Make a sqlite store beside its place and put it there whole: one of which half the tables are there, as after a
    kill, is never finished by MLflow."""
    from mlflow import MlflowClient

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        MlflowClient(tracking_uri=f"{_SQLITE}{temporary}").search_experiments(max_results=1)
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclasses.dataclass
class Cursor:
    """How far an outbox is uploaded, kept beside it."""

    uri: str
    experiment: str
    offset: int = 0  # bytes of the outbox that are uploaded
    run_id: str = ""  # "" before the run exists
    experiment_id: str = ""
    status: str = "RUNNING"
    steps: dict[str, int] = dataclasses.field(default_factory=dict)  # last uploaded step of each metric
    tail: str = ""  # hash of the last bytes before the offset

    @classmethod
    def load(cls, path: Path, uri: str, experiment: str) -> "Cursor":
        """The saved cursor, or a new one if there is none or it counts for another store."""
        if path.exists():
            saved = cls(**json.loads(path.read_text()))
            if (saved.uri, saved.experiment) == (uri, experiment):
                return saved
        return cls(uri, experiment)


class Upload:
    """One outbox and its way into a store.

    uri: the name of the store in the cursor (without credentials).
    """

    def __init__(self, outbox: Path, uri: str, experiment: str):
        self.outbox = outbox
        self._place = (outbox.with_suffix(".cursor.json"), uri, experiment)
        self.cursor = Cursor.load(*self._place)
        self._opened: dict[str, Any] | None = None
        self._read_size = 0  # size of the outbox when it was last read to its end
        self._is_checked = False
        self._complaints: set[str] = set()
        self._missed: dict[Path, float] = {}  # artifact -> when it was first looked for in vain

    @property
    def opened(self) -> dict[str, Any] | None:
        """The first operation of the outbox, which names the run; None while it is not written."""
        if self._opened is None:
            self._opened = next((record for record, _ in read(self.outbox)), None)
        return self._opened

    def is_pending(self) -> bool:
        """True when something was written since the last upload (a line without its end counts once)."""
        try:
            return self.outbox.stat().st_size not in (self.cursor.offset, self._read_size)
        except FileNotFoundError:
            return False

    def ship(self, store: Store) -> bool:
        """Upload what is new; True if anything was. Does nothing while another process uploads this outbox, or while
        the run it is nested in is not uploaded."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(self.outbox.with_suffix(".cursor.lock"), timeout=0):
                return self._ship(store)
        except Timeout:
            self.cursor = Cursor.load(*self._place)
            return False

    def _ship(self, store: Store) -> bool:
        self.cursor = before = Cursor.load(*self._place)
        self.cursor = dataclasses.replace(before)
        size = self.outbox.stat().st_size
        self._check(store, size)
        try:
            if self._upload(store):
                self._read_size = size
        finally:
            if self.cursor != before:
                self.cursor.tail = _tail(self.outbox, self.cursor.offset)
                write_atomic(self._place[0], json.dumps(dataclasses.asdict(self.cursor)))
        return self.cursor != before

    def _check(self, store: Store, size: int) -> None:
        """Start from the beginning if the run or the outbox is not the one the cursor knows."""
        cursor = self.cursor
        run = store.active(cursor.run_id) if cursor.run_id and not self._is_checked else None
        is_lost = run is None and cursor.run_id and not self._is_checked
        if is_lost or size < cursor.offset or (cursor.tail and cursor.tail != _tail(self.outbox, cursor.offset)):
            self.cursor = Cursor(cursor.uri, cursor.experiment)
        elif run is not None:
            cursor.steps = cursor.steps | _last_steps(run)  # a process may have died before it wrote its cursor
        self._is_checked = True

    def _upload(self, store: Store) -> bool:
        """Work through the new operations; False if one has to wait."""
        points: list[tuple[str, float, int, int]] = []  # name, value, time, step
        end = self.cursor.offset
        for record, behind in read(self.outbox, self.cursor.offset):
            if not self.cursor.run_id and record["op"] != "open":
                self.cursor.offset = behind  # written before the run was opened: there is nothing to add it to
            elif record["op"] == "metrics":
                points += _points(record)
                if len(points) >= MAX_METRICS:
                    self._send(store, points, behind)
                    points = []
            elif record["op"] == "rewind":
                points = [p for p in points if p[3] <= record["step"] or p[0].startswith(SYSTEM_PREFIX)]
            else:
                self._send(store, points, end)
                points = []
                if not self._apply(store, record):
                    return False
                self.cursor.offset = behind
            end = behind
        self._send(store, points, end)
        return True

    def _send(self, store: Store, points: list[tuple[str, float, int, int]], end: int) -> None:
        """Metrics to the run, each metric's steps in rising order and once, then the cursor to `end`."""
        from mlflow.entities import Metric

        steps, new = dict(self.cursor.steps), []
        for name, value, written, step in points:
            if step > steps.get(name, -1):
                steps[name] = step
                new.append(Metric(name, value, written, step))
        for batch in _batches(new, MAX_METRICS):
            self._try("metrics", lambda batch=batch: store.client.log_batch(self.cursor.run_id, metrics=batch))
        self.cursor.steps = steps
        self.cursor.offset = end

    def _apply(self, store: Store, record: dict[str, Any]) -> bool:
        """Do one operation that is not a metric; False if it has to wait."""
        run_id, client = self.cursor.run_id, store.client
        match record["op"]:
            case "open":
                return self._open(store, record)
            case "tags":
                self._log_tags(store, record["tags"])
            case "text":
                file = _inside(record["file"])
                self._try(file, lambda: client.log_text(run_id, record["text"], file))
            case "artifact":
                path = Path(os.path.normpath(self.outbox.parent / record["path"]))
                return self._log_artifact(store, path, _inside(record["folder"]) or None)
            case "close":
                self._try("the end", lambda: client.set_terminated(run_id, record["status"], end_time=record["time"]))
                self.cursor.status = record["status"]
        return True

    def _open(self, store: Store, record: dict[str, Any]) -> bool:
        cursor = self.cursor
        run = store.client.get_run(cursor.run_id) if cursor.run_id else store.find(cursor.experiment, record["key"])
        if run is None:
            tags = {RUN_KEY: record["key"]}
            if record["parent"] is not None:
                parent = store.find(cursor.experiment, record["parent"])
                if parent is None:
                    return False
                tags[PARENT] = parent.info.run_id
            experiment_id = store.experiment_id(cursor.experiment)
            run = store.client.create_run(experiment_id, record["time"], tags, run_name=record["name"])
        else:
            if not cursor.run_id:
                cursor.steps = _last_steps(run)
            if run.info.status != "RUNNING":
                store.client.update_run(run.info.run_id, status="RUNNING")
        cursor.run_id, cursor.experiment_id, cursor.status = run.info.run_id, run.info.experiment_id, "RUNNING"
        self._log_params(store, record["params"], known=run.data.params)
        self._log_tags(store, record["tags"])
        return True

    def _log_params(self, store: Store, config: dict[str, Any], known: dict[str, str]) -> None:
        """New parameters (MLflow never changes one) in at most 6000 characters each, and all of them in config.json."""
        from mlflow.entities import Param

        if not config:
            return
        values = {_legal(name): str(value)[:MAX_PARAM_LENGTH] for name, value in flatten(config).items()}
        params = [Param(name, value) for name, value in values.items() if name not in known]
        run_id, client = self.cursor.run_id, store.client
        for batch in _batches(params, MAX_PARAMS):
            self._try("parameters", lambda batch=batch: client.log_batch(run_id, params=batch))
        self._try("config.json", lambda: client.log_text(run_id, json.dumps(config, indent=2), "config.json"))

    def _log_tags(self, store: Store, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        entries = [RunTag(_legal(name), value[:MAX_TAG_LENGTH]) for name, value in tags.items()]
        for batch in _batches(entries, MAX_TAGS):
            self._try("tags", lambda batch=batch: store.client.log_batch(self.cursor.run_id, tags=batch))

    def _log_artifact(self, store: Store, path: Path, folder: str | None) -> bool:
        """Upload a file or folder; False while it may still come."""
        _bring(path)
        if not path.exists() and remote_of(path) is not None:
            first = self._missed.setdefault(path, time.monotonic())
            if time.monotonic() < first + ARTIFACT_PATIENCE:
                return False
        if not path.exists():
            self._complain(f"{path} is not there any more: it is not uploaded to MLflow")
            return True
        log = store.client.log_artifacts if path.is_dir() else store.client.log_artifact
        self._try(str(path), lambda: log(self.cursor.run_id, str(path), folder))
        return True

    def _try(self, what: str, call: Callable[[], Any]) -> None:
        """Call; what MLflow refuses for its content is left out with a line, for it would be refused every time."""
        from mlflow.exceptions import MlflowException

        try:
            call()
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            self._complain(without_credentials(f"MLflow refused {what} of run {self.cursor.run_id}: {error.message}"))

    def _complain(self, line: str) -> None:
        if line not in self._complaints:
            self._complaints.add(line)
            print(line)


def _last_steps(run: Any) -> dict[str, int]:
    """The last step that a run has of each of its metrics."""
    return {metric.key: metric.step for metric in run.data.to_proto().metrics}


def _bring(path: Path) -> None:
    """Fetch a file or folder of a working copy that is not on this machine, or of a folder what is not, if it is in its
    bucket: one listing for every folder that a run names, once.

    Raises UserError where the bucket cannot be read.
    """
    url = remote_of(path)
    if url is None or path.is_file():
        return
    if path.is_dir():
        Mirror(path, url).pull()
    elif s3.stat(url):
        local_copy(path)
    elif s3.listing(url, limit=1):
        local_folder_copy(path)


def _tail(path: Path, offset: int) -> str:
    """Hash of the bytes of a file before an offset."""
    start = max(0, offset - TAIL)
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(offset - start)).hexdigest()[:16]


def _points(record: dict[str, Any]) -> Iterator[tuple[str, float, int, int]]:
    for name, value in record["values"].items():
        yield _legal(name), float("nan") if value is None else value, record["time"], record["step"]


def _legal(name: str) -> str:
    """The nearest name that MLflow takes: letters, digits and `/_-. :`, at most 250, a plain relative path."""
    return _inside(re.sub(r"[^/\w.\- :]", "_", name))[:MAX_NAME_LENGTH] or "_"


def _inside(path: str) -> str:
    """The path as it is seen from a root that `..` cannot leave, without the root."""
    return posixpath.normpath("/" + path).lstrip("/")


def _batches(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
