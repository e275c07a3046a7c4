"""The record of a run: what it takes to repeat it and to compare with it, without an image or an identifier.

A record is found by the run's name in the storage, by its MLflow run id, or in the file that `export` wrote from one.

The data stand in it as one line an image: row of the manifest, content, label, split and patient. Content is the first
half of a sha256 of the decoded pixels: who has the images finds them again, under whatever names and in whatever order,
and who has not learns nothing. A patient is a number in order of appearance, not a hash of an identifier that could be
tried out: identifiers do not come this far.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pandas as pd

from raymed.config import UserError, flatten, to_json
from raymed.data.dataset import DataSet
from raymed.data.locations import as_location, near
from raymed.storage import Mirror, is_remote, storage_folder, write_atomic
from raymed.tracking.outbox import Outbox

FORMAT = 1
ENDING = ".raymed.json"
DATA = "data.json"
CONFIG, SUMMARY, ENVIRONMENT, PACKAGES = "config.json", "summary.json", "environment.json", "requirements.txt"
_NOT_EXPORTED = ("run",)  # names and folders of one machine
_MANIFEST, _ROOT = "recipe.data.manifest", "recipe.data.root"


@dataclass(frozen=True)
class Record:
    """A run as it is repeated."""

    job: str
    """File in jobs/, without its ending."""
    name: str
    config: dict[str, Any]
    """Resolved, as `to_dict` gives it."""
    data: dict[str, Any]
    """See `data_record`."""
    figures: dict[str, Any]
    """As in summary.json; {} of a run that has not finished."""
    environment: dict[str, Any]
    packages: list[str]
    """name==version of every installed package: the lock file."""
    git: dict[str, str]
    paths: tuple[str, ...] = ()
    """Fields of an exported config that held a path, of which the name is left."""
    exported: bool = False


def data_record(data: DataSet) -> dict[str, Any]:
    """A data set without its images: fingerprint, positive, has_patients, and columns with one entry an image: row,
    content (16 hexadecimal digits), label, split, patient (a number)."""
    split = np.empty(len(data), object)
    for name, indices in data.splits.items():
        split[indices] = name
    return {
        "fingerprint": data.fingerprint,
        "positive": data.positive,
        "has_patients": data.has_patients,
        "row": data.rows.tolist(),
        "content": [f"{content:016x}" for content in data.content.tolist()],
        "label": [data.classes[code] for code in data.class_codes],
        "split": split.tolist(),
        "patient": data.patients.tolist(),
    }


def images(data: Mapping[str, Any]) -> pd.DataFrame:
    """The columns of a `data_record` as a table."""
    return pd.DataFrame({name: data[name] for name in ("row", "content", "label", "split", "patient")})


def fetch(run: str, storage: str | None = None, tracking: str | None = None) -> Record:
    """The record of a run.

    Args:
        run: a file of `export`, the name of a run in the storage, or an MLflow run id.
        storage, tracking: as in `RunConfig`.

    Raises:
        UserError: there is no such run; it is no job's run, or lacks its config or data; the file is no export, or one
            of a newer format.
    """
    if is_remote(run) or Path(run).is_file():
        return _from_file(near(as_location(run)))
    folder = storage_folder(storage)
    if mirror := Mirror.of(folder / "runs" / run):
        mirror.pull()
    if (folder / "runs" / run / "tracking.jsonl").is_file():
        return from_folder(folder / "runs" / run)
    return _from_mlflow(run, folder, tracking)


def from_folder(folder: Path, figures: dict[str, Any] | None = None) -> Record:
    """The record of a run in the storage, as it was last started. figures: in place of those of its summary.json."""
    tags, texts = {}, {}
    for record in Outbox(folder / "tracking.jsonl").records():
        if record["op"] == "open":
            tags, texts[CONFIG] = record["tags"], json.dumps(record["params"])
        elif record["op"] == "text":
            texts[record["file"]] = record["text"]
    for file in (DATA, SUMMARY):
        if (folder / file).is_file():
            texts[file] = (folder / file).read_text()
    record = _record(folder.name, tags, texts.get)
    return record if figures is None else replace(record, figures=figures)


def _from_mlflow(run: str, storage: Path, tracking: str | None) -> Record:
    from raymed.tracking.runs import find_run

    found = find_run(run, tracking, storage, (CONFIG, DATA, SUMMARY, ENVIRONMENT, PACKAGES))
    if found is None:
        names = sorted(path.parent.name for path in storage.glob("runs/*/tracking.jsonl"))
        near = difflib.get_close_matches(run, names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(
            f"there is no run {run!r}{hint}: expected the name of a run in {storage / 'runs'}, an MLflow run id, or a "
            f"file NAME{ENDING}"
        )
    if "raymed.job" not in found.tags and "mlflow.parentRunId" in found.tags:
        parent = found.tags["mlflow.parentRunId"]
        raise UserError(f"run {run} ({found.name}) is one training of a job: give the job's run, {parent}")
    return _record(found.name, found.tags, found.files.get)


def _record(name: str, tags: Mapping[str, str], text: Callable[[str], str | None]) -> Record:
    for file in (CONFIG, DATA):
        if text(file) is None:
            raise UserError(
                f"run {name!r} has no {file}, so it cannot be repeated: it was not made by a job of raymed, or is not "
                "uploaded yet"
            )
    if "raymed.job" not in tags:
        raise UserError(f"run {name!r} does not say which job made it (tag raymed.job)")
    return Record(
        job=tags["raymed.job"],
        name=name,
        config=json.loads(text(CONFIG) or "{}"),
        data=json.loads(text(DATA) or "{}"),
        figures=json.loads(text(SUMMARY) or "{}").get("figures", {}),
        environment=json.loads(text(ENVIRONMENT) or "{}"),
        packages=(text(PACKAGES) or "").split(),
        git={tag.removeprefix("raymed.git."): value for tag, value in tags.items() if tag.startswith("raymed.git.")},
    )


def export(run: str, storage: str | None = None, tracking: str | None = None, folder: Path = Path()) -> Path:
    """Write the record of a finished run to folder/NAME.raymed.json and return the path.

    Raises UserError as `fetch`, and for a run without figures.
    """
    record = fetch(run, storage, tracking)
    if not record.figures:
        raise UserError(f"run {record.name!r} has not finished: its own command finishes it, then it can be exported")
    config = {name: value for name, value in record.config.items() if name not in _NOT_EXPORTED}
    _set(config, _ROOT, None)
    paths = {field: value for field, value in flatten(config).items() if _is_path(field, value)}
    for field, value in paths.items():
        _set(config, field, PurePath(value).name)
    values = asdict(record) | {"config": config, "paths": tuple(paths), "exported": True}
    path = folder / f"{record.name}{ENDING}"
    write_atomic(path, to_json({"format": FORMAT} | values))
    return path


def _is_path(field: str, value: Any) -> bool:
    return isinstance(value, str) and (field == _MANIFEST or value.startswith(("/", "~", "s3://")))


def _set(config: dict[str, Any], field: str, value: Any) -> None:
    *parents, name = field.split(".")
    for parent in parents:
        config = config[parent]
    config[name] = value


def _from_file(path: Path) -> Record:
    try:
        values = json.loads(path.read_text())
        number = values.pop("format")
        if number <= FORMAT:
            return Record(**values | {"paths": tuple(values["paths"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the file of an exported run (--export-run writes NAME{ENDING})") from error
    raise UserError(
        f"{path} has format {number}, written by a newer raymed: this one reads up to {FORMAT}; update raymed"
    )
