"""Backups: a storage and its MLflow as one folder, and back into an empty storage, here or elsewhere.

    python -m raymed.cluster.backup save DIR
    python -m raymed.cluster.backup check DIR
    python -m raymed.cluster.backup restore DIR --storage EMPTY

    DIR/mlflow.db       MLflow's runs, registered models and aliases, as they were at one moment
    DIR/artifacts/      MLflow's files: models, figures
    DIR/storage/        runs with their bundles, the registry's log of decisions, how often test splits were opened;
                        no caches and, unless asked for, no checkpoints, which only unfinished runs need
    DIR/backup.json     what it is of
    DIR/SHA256SUMS      of every other file

Jobs and servers may go on meanwhile: the database is copied first, so that whatever it names is in the backup too; a
registered model whose files were not there is told of, by `check` too. What goes from the storage meanwhile, as
checkpoints do when newer ones have come, is left out; files of MLflow's that go are an error.
Users, passwords, keys and tokens are not in it, nor what servers have under way (batch jobs, studies of a DICOM node),
which a restored copy would do twice; images are not either, unless they lie in the storage.
"""

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from tyro.conf import Positional, arg

from raymed import __version__
from raymed.cluster import state
from raymed.cluster.whole import check, new_folder
from raymed.command import command
from raymed.config import UserError, to_json
from raymed.storage import is_remote, join, read_bytes, remote_of, resolve_storage, s3, storage_folder, write_bytes
from raymed.storage.leftovers import temporary
from raymed.storage.locations import Location, exists
from raymed.storage.mirror import is_synced
from raymed.storage.paths import not_written
from raymed.tracking import without_credentials
from raymed.tracking.mlflow import artifacts_of, resolve_uri

FORMAT = 1
DATABASE, ARTIFACTS, STORAGE, FACTS = "mlflow.db", "artifacts", "storage", "backup.json"
_OF_SERVER = "mlflow-artifacts:"  # how addresses of files begin that a server hands out
_OF_MLFLOW = ("mlflow/", "mlartifacts/")  # in a storage; they go their own way
_OF_SERVERS = ("serve/", "dicom/")  # tokens and queues, which live with the servers
_TRIES = 5  # of what goes while it is copied
_USED = {"runs": "lifecycle_stage = 'active'", "registered_models": "true"}


@dataclass(frozen=True)
class Place:
    """Where everything is."""

    storage: str | None = None
    """Folder, or s3://BUCKET/PREFIX; None = $RAYMED_HOME, else ~/.raymed."""
    tracking: str | None = None
    """sqlite:///PATH; None = $MLFLOW_TRACKING_URI, else the sqlite store in the storage."""
    mlflow: str | None = None
    """Of a server of MLflow: the folder (or s3://) where it keeps mlflow.db and artifacts."""
    cluster: bool = False
    """The storage and the MLflow of the cluster that is up (`python -m raymed.cluster status`)."""


@dataclass(frozen=True)
class Save:
    """Write a backup into a new folder."""

    folder: Positional[Annotated[str, arg(metavar="DIR")]]
    """The new folder."""
    place: Annotated[Place, arg(name="")] = Place()
    checkpoints: bool = False
    """Also those of runs, with which unfinished ones go on."""


@dataclass(frozen=True)
class Check:
    """Hold every file of a backup against its SHA256SUMS."""

    folder: Positional[Annotated[str, arg(metavar="DIR")]]
    """The backup."""


@dataclass(frozen=True)
class Restore:
    """Put a backup into an empty storage. Damaged ones are refused before anything is written."""

    folder: Positional[Annotated[str, arg(metavar="DIR")]]
    """The backup."""
    place: Annotated[Place, arg(name="")] = Place()


@dataclass(frozen=True)
class _Mlflow:
    """A store of MLflow: its database, where its files lie, and how their addresses in the database begin."""

    database: Location
    artifacts: Location
    root: str


def work(config: Save | Check | Restore) -> str:
    """Do one of the three. Raises UserError for what the user can mend."""
    folder = Path(config.folder).expanduser().absolute()
    if isinstance(config, Save):
        return save(folder, config.place, config.checkpoints)
    if isinstance(config, Restore):
        return restore(folder, config.place)
    facts = _checked(folder)
    whole = f"{folder} is whole: of {facts['storage']}, {facts['made']}"
    return "\n".join([*_without_files(folder, facts["root"]), whole])


def save(folder: Path, place: Place, checkpoints: bool = False) -> str:
    """Write a backup. It is there whole or not at all. Raises UserError where there is nothing to save, and where files
    of MLflow's go meanwhile."""
    storage, mlflow = _places(place)
    local = storage_folder(str(storage))
    if folder.is_relative_to(local):
        raise UserError(f"{folder} lies in the storage that it is to save: name another folder")
    has_database = exists(mlflow.database)
    with new_folder(folder, 0o700) as making:
        lines = _save_mlflow(mlflow, making) if has_database else ["MLflow has no runs there: its database is not yet"]
        if not _fetch(storage, making / STORAGE, checkpoints) and not has_database:
            raise UserError(f"there is nothing in {storage}: name a storage with --storage")
        facts = {"format": FORMAT, "raymed": __version__, "made": datetime.now(UTC).isoformat(timespec="seconds")}
        facts |= {"storage": str(storage), "root": mlflow.root, "checkpoints": checkpoints}
        (making / FACTS).write_text(to_json(facts))
    found = list(_below(folder))
    size = sum((folder / name).stat().st_size for name in found)
    return "\n".join([*lines, f"{folder}: {len(found)} files, {size / 1e6:.1f} MB of {storage}"])


def restore(folder: Path, place: Place) -> str:
    """Put a backup where nothing is yet. Addresses of files in the database become those of the new place."""
    facts = _checked(folder)
    if place.cluster and (cluster := state.required()).provider != "local":
        is_bucket = is_remote(cluster.environment["RAYMED_HOME"])
        where = "s3://..." if is_bucket else "MOUNT"  # of what its machines mount
        raise UserError(f"restore before that cluster is up: --storage {where} --mlflow {where}/mlflow, then up")
    storage, mlflow = _places(place)
    files, artifacts = _below(folder / STORAGE), _below(folder / ARTIFACTS)
    _check_empty(storage, files, mlflow)
    resolve_storage(str(storage))
    _send({_under(storage, name): found for name, found in files.items()})
    _send({_under(mlflow.artifacts, name): found for name, found in artifacts.items()})
    if (folder / DATABASE).exists():
        with TemporaryDirectory() as scratch:
            moved = Path(shutil.copy(folder / DATABASE, scratch))
            _move(moved, facts["root"], mlflow.root)
            _place_database(moved, mlflow.database)
    return f"restored into {storage}: {len(files)} files, and {len(artifacts)} of MLflow"


def _checked(folder: Path) -> dict[str, Any]:
    """What a backup is of, if it is as it was written and of a known form."""
    check(folder, "backup")
    if not (folder / FACTS).is_file():
        raise UserError(f"{folder} is no backup: it has no {FACTS}")
    facts = json.loads((folder / FACTS).read_text())
    if facts["format"] > FORMAT:
        raise UserError(f"{folder} was written by a newer raymed ({facts['raymed']}): restore it with that one")
    return facts


def _places(place: Place) -> tuple[Location, _Mlflow]:
    """The storage, a path or a URL, and its MLflow."""
    kept = place.mlflow
    if place.cluster:
        cluster = state.required()
        os.environ.update(cluster.environment)
        kept = kept or join(os.environ["RAYMED_HOME"], "mlflow")
        _check_reached(cluster, kept)
        if cluster.provider == "local":
            kept, os.environ["RAYMED_LOCAL"] = str(state.folder() / "data/mlflow"), str(state.folder() / "local")
    local = storage_folder(place.storage)
    storage = remote_of(local) or local
    if kept:
        folder = kept if is_remote(kept) else Path(kept).expanduser().absolute()
        return storage, _Mlflow(_under(folder, DATABASE), _under(folder, ARTIFACTS), _OF_SERVER)
    uri = resolve_uri(place.tracking, local)
    if not uri.startswith("sqlite:///"):
        raise UserError(
            f"MLflow at {without_credentials(uri)} keeps its runs itself: name the folder of its mlflow.db and "
            "artifacts with --mlflow, or --cluster for the cluster that is up"
        )
    root = artifacts_of(local)
    return storage, _Mlflow(
        Path(uri.removeprefix("sqlite:///")), root if is_remote(storage) else local / "mlartifacts", root
    )


def _check_reached(cluster: state.Cluster, mlflow: str) -> None:
    """Raise UserError where the storage is a folder of the cluster's machines: one of that name here is another."""
    storage = cluster.environment["RAYMED_HOME"]
    if cluster.provider != "local" and not is_remote(storage):
        raise UserError(
            f"the cluster's storage, {storage}, is a folder of its machines: start this on one that has it, with "
            f"--storage {storage} --mlflow {mlflow} in place of --cluster"
        )


def _is_kept(name: str, checkpoints: bool) -> bool:
    return not name.startswith((*_OF_MLFLOW, *_OF_SERVERS)) and is_synced(name, ["*"] if checkpoints else None)


def _under(location: Location, name: str) -> Location:
    return location / name if isinstance(location, Path) else join(location, name)


def _below(location: Location) -> dict[str, Location]:
    """Name -> file, of all that is below a folder or a URL."""
    if is_remote(location):
        url = str(location).rstrip("/")
        return {found.url.removeprefix(f"{url}/"): found.url for found in s3.listing(url)}
    walked = (Path(place, name) for place, _, names in os.walk(location) for name in sorted(names))
    return {path.relative_to(location).as_posix(): path for path in walked}


def _fetch(storage: Location, into: Path, checkpoints: bool) -> int:
    """Copy what is kept of a storage into a folder; how many files that is. What goes meanwhile is no longer of it.

    Where a checkpoint goes, all of that run's are copied again: the index that is saved is to name what is saved.
    """
    files = _kept(storage, checkpoints)
    for tries_left in reversed(range(_TRIES)):
        try:
            _copy({name: found for name, found in files.items() if not (into / name).exists()}, into)
            break
        except UserError:
            before, files = files, _kept(storage, checkpoints)
            gone = [PurePosixPath(name) for name in before.keys() - files.keys()]
            if not gone or not tries_left:
                raise
            for folder in {folder for name in gone for folder in name.parents if folder.name == "checkpoints"}:
                shutil.rmtree(into / folder, ignore_errors=True)
    return len(files)


def _kept(storage: Location, checkpoints: bool) -> dict[str, Location]:
    return {name: found for name, found in _below(storage).items() if _is_kept(name, checkpoints)}


def _copy(files: Mapping[str, Location], into: Path) -> None:
    """Copy files into a folder. Raises UserError for one that is not there."""
    s3.download_many([(found, into / name) for name, found in files.items() if isinstance(found, str)])
    for name, found in files.items():
        if isinstance(found, Path):
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copy2(found, into / name)
            except FileNotFoundError:
                raise UserError(f"{found} went while it was copied: start this again") from None


def _send(files: Mapping[Location, Location]) -> None:
    """Copy files of a backup to where they belong."""
    s3.upload_many([(Path(found), target) for target, found in files.items() if isinstance(target, str)])
    for target, found in files.items():
        if isinstance(target, Path):
            _to_disk(target, lambda arriving, found=found: shutil.copy2(found, arriving))


def _to_disk(target: Path, write: Callable[[Path], object]) -> None:
    """A file whole or not at all."""
    arriving = temporary(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(arriving)
        os.replace(arriving, target)
    except OSError as error:
        raise not_written(target, error) from error
    finally:
        arriving.unlink(missing_ok=True)


def _save_mlflow(mlflow: _Mlflow, making: Path) -> list[str]:
    """Copy database, then files. Returns what to say of files that lie elsewhere, or nowhere. Raises UserError where it
    is no database, and for a file that goes meanwhile."""
    copy, query = (
        making / DATABASE,
        "SELECT count(*), min(artifact_uri) FROM runs WHERE substr(artifact_uri, 1, ?) != ?",
    )
    try:
        if is_remote(mlflow.database):
            copy.write_bytes(read_bytes(mlflow.database))
        else:
            _copy_database(Path(mlflow.database), copy)
        with closing(sqlite3.connect(copy)) as database:
            count, first = database.execute(query, (len(mlflow.root), mlflow.root)).fetchone()
    except sqlite3.DatabaseError as error:
        raise UserError(f"{mlflow.database} cannot be read as MLflow's database ({error})") from None
    _copy(_below(mlflow.artifacts), making / ARTIFACTS)
    elsewhere = [f"{count} runs keep their files elsewhere, and they are not saved: {first}"] if count else []
    return elsewhere + _without_files(making, mlflow.root)


def _without_files(folder: Path, root: str) -> list[str]:
    """What to say of registered models that are in a backup's database alone, though their files were to be below
    `root`."""
    if not (folder / DATABASE).exists():
        return []
    query = (
        "SELECT name, version, storage_location FROM model_versions "
        "WHERE current_stage != 'Deleted_Internal' AND substr(storage_location, 1, ?) = ?"
    )
    with closing(sqlite3.connect(folder / DATABASE)) as database:
        below = database.execute(query, (len(root) + 1, f"{root}/")).fetchall()
    places = {f"{name} {number}": folder / ARTIFACTS / at.removeprefix(f"{root}/") for name, number, at in below}
    absent = [version for version, place in places.items() if not place.is_dir()]
    return [f"registered, but without files in this backup: {', '.join(absent)}"] if absent else []


def _copy_database(source: Path, target: Path) -> None:
    """As it is between two transactions, whoever writes meanwhile; a target in use takes it as one transaction."""
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)


def _place_database(moved: Path, target: Location) -> None:
    if is_remote(target):
        write_bytes(target, moved.read_bytes())
    elif Path(target).exists():  # of a server that runs, and has no runs yet
        _copy_database(moved, Path(target))
    else:
        _to_disk(Path(target), lambda arriving: _copy_database(moved, arriving))


def _move(database: Path, old: str, new: str) -> None:
    """Let whatever begins with the old root begin with the new one, in every table."""
    with closing(sqlite3.connect(database)) as opened, opened:
        tables = [name for (name,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            for _, column, kind, *_ in opened.execute(f'PRAGMA table_info("{table}")').fetchall():
                if kind.startswith(("VARCHAR", "TEXT")):
                    opened.execute(
                        f'UPDATE "{table}" SET "{column}" = ? || substr("{column}", ?) '
                        f'WHERE substr("{column}", 1, ?) IN (?, ?)',
                        (new, len(old) + 1, len(old) + 1, f"{old}/", old),
                    )


def _check_empty(storage: Location, files: Mapping[str, Location], mlflow: _Mlflow) -> None:
    """Raise UserError where something would be mixed with what is there: a file in a folder, or one in a file's place,
    a run, a registered model, a file of MLflow's."""
    kept = [name for name in _below(storage) if _is_kept(name, checkpoints=True)]
    found = [f"{storage} has {name}" for name in kept if "/" in name or name in files]
    found += [f"{mlflow.artifacts} has {name}" for name in _below(mlflow.artifacts)]
    if is_remote(mlflow.database) and exists(mlflow.database):
        found.append(f"there is {mlflow.database}")
    elif exists(mlflow.database):
        with closing(sqlite3.connect(Path(mlflow.database))) as database:
            for table, which in _USED.items():
                if count := database.execute(f"SELECT count(*) FROM {table} WHERE {which}").fetchone()[0]:
                    found.append(f"{mlflow.database} has {count} {table.replace('_', ' ')}")
    if found:
        raise UserError(f"a backup goes into an empty storage, and {found[0]}: name another one with --storage")


if __name__ == "__main__":
    command(Save | Check | Restore, work)  # type: ignore[arg-type]
