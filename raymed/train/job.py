"""The frame of every job: a named run in a folder, tracked, locked, resumable, and a summary at its end."""

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from raymed.config import UserError, config_hash, flatten, replace, to_dict
from raymed.report.summary import write_summary
from raymed.storage import local_folder, lock, resolve_storage, write_atomic
from raymed.tasks.classifier import ClassifierRecipe
from raymed.tracking.outbox import Outbox
from raymed.train.loop import Evaluation, Interrupted
from raymed.train.unit import Unit, load_data

_NOT_IDENTITY = ("run", "compute")  # where and under which name: the same run may continue elsewhere
C = TypeVar("C")


@dataclass(frozen=True)
class RunConfig:
    """Under which name, and where everything is kept."""

    name: str | None = None
    """Name of the run: the same name continues it. None = made from the job and its config."""
    storage: str | None = None
    """Folder for everything that stays; None = $RAYMED_HOME, else ~/.raymed."""
    tracking: str | None = None
    """MLflow tracking URI; None = $MLFLOW_TRACKING_URI, else a sqlite store in the storage."""
    experiment: str = "raymed"
    """MLflow experiment."""


@dataclass
class Job:
    """A job in progress."""

    kind: str
    config: Any
    recipe: ClassifierRecipe
    """The config's recipe, with the phantoms drawn where they are asked for."""
    name: str
    storage: Path
    interrupted: Callable[[], bool]
    tracker: Any
    children: list[Outbox] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return self.storage / "runs" / self.name

    @property
    def key(self) -> str:
        """Names the run for ever."""
        return f"{self.name}-{config_hash(self.config, _NOT_IDENTITY)[:12]}"

    @property
    def outbox(self) -> Outbox:
        """What the run itself tells the tracker."""
        return Outbox(self.folder / "tracking.jsonl")

    def unit(self, name: str, seed: int, recipe: ClassifierRecipe | None = None, part: Any = "all") -> Unit:
        """A training that belongs to this run, in a folder of that name; the tracker follows it."""
        unit = Unit(
            recipe=recipe or self.recipe,
            seed=seed,
            folder=self.folder / name,
            key=f"{self.key}/{name}",
            name=name,
            parent=self.key,
            cache=local_folder(self.storage, "cache"),
            compute=self.config.compute,
            part=part,
        )
        self.follow(unit.outbox)
        return unit

    def follow(self, outbox: Outbox) -> None:
        """Upload what this outbox holds and will hold."""
        self.children.append(outbox)
        self.tracker.follow(outbox.path)

    def where(self) -> str:
        """Where a person finds the run in MLflow."""
        return self.tracker.where(self.key)

    def finish(self, figures: dict[str, Any], paths: dict[str, Path], **extra: Any) -> Path:
        """Write summary.json, log it, and close the run."""
        path = self.folder / "summary.json"
        mlflow = {"experiment": self.config.run.experiment, "run": self.tracker.run_id(self.key, timeout=60)}
        kept = {name: str(place) for name, place in paths.items()}
        write_summary(path, self.kind, to_dict(self.config), figures, mlflow=mlflow, paths=kept, **extra)
        self.outbox.artifact(path)
        self.outbox.close("FINISHED")
        return path


@contextmanager
def open_job(kind: str, config: Any) -> Iterator[Job]:
    """A run for this config: new, or the one that was begun with it.

    However the block ends, every MLflow run under it ends with the right status. Raises UserError when the storage
    cannot be written, another process is at it, or the name belongs to another config.
    """
    from raymed.tracking import SystemMetrics, Tracker

    storage = resolve_storage(config.run.storage)
    if "working_dir_files" in storage.parts:
        raise UserError(
            f"--storage must be an absolute path in a submitted job, got {config.run.storage}: Ray deletes the folder "
            "that the job runs in"
        )
    name = config.run.name or f"{kind}-{config_hash(config, _NOT_IDENTITY)[:8]}"
    folder = storage / "runs" / name
    recipe = _with_phantoms(config.recipe, storage)
    data = load_data(recipe.data, local_folder(storage, "cache"))
    with ExitStack() as stack:
        stack.enter_context(lock(folder / "lock"))
        _claim(folder, name, kind, config)
        interrupted = stack.enter_context(_listen())
        tracker = stack.enter_context(Tracker(config.run.tracking, config.run.experiment, storage))
        job = Job(kind, config, recipe, name, storage, interrupted, tracker)
        _open_run(job)
        stack.enter_context(SystemMetrics(job.outbox))
        print(f"{data.summary()}\nrun {name} in {folder}", flush=True)
        try:
            yield job
        except BaseException as error:
            _close_runs(job, "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
            raise


def _open_run(job: Job) -> None:
    from raymed.tracking import environment, git_state, installed_packages

    tags = {"raymed.job": job.kind} | {f"raymed.git.{name}": str(value) for name, value in git_state().items()}
    job.outbox.open(job.key, job.name, None, to_dict(job.config), tags)
    job.outbox.json(environment(), "environment.json")
    job.outbox.text(installed_packages(), "requirements.txt")
    job.tracker.follow(job.outbox.path)


def _close_runs(job: Job, status: Any) -> None:
    for outbox in [job.outbox, *job.children]:
        records = outbox.records()
        if records and not any(r["op"] == "close" for r in records[-1:]):
            outbox.close(status)


def _claim(folder: Path, name: str, kind: str, config: Any) -> None:
    """Write the run's config, or check that it is the one already there."""
    path = folder / "config.json"
    mine = {"job": kind, "hash": config_hash(config, _NOT_IDENTITY), "config": to_dict(config)}
    if not path.is_file():
        write_atomic(path, json.dumps(mine, indent=2) + "\n")
        return
    theirs = json.loads(path.read_text())
    if theirs["hash"] == mine["hash"] and theirs["job"] == kind:
        return
    old, new = flatten(theirs["config"]), flatten(mine["config"])
    changed = [f for f in sorted(old | new) if old.get(f) != new.get(f) and f.split(".")[0] not in _NOT_IDENTITY]
    shown = ", ".join(f"{f.removeprefix('recipe.')} was {old.get(f)!r} and is {new.get(f)!r}" for f in changed[:5])
    raise UserError(
        f"run {name!r} exists with another config ({shown or theirs['job']}): choose another --name, or repeat it "
        "with its own config"
    )


def _with_phantoms(recipe: ClassifierRecipe, storage: Path) -> ClassifierRecipe:
    """manifest = "phantoms" becomes the manifest of HSG phantoms drawn into the storage."""
    if recipe.data.manifest != "phantoms":
        return recipe
    from raymed.data.phantoms import write_hsg

    manifest = write_hsg(storage / "phantoms" / "hsg-64", size=64)
    positive = recipe.data.positive or "occluded"
    changes = {"data.manifest": str(manifest), "data.positive": positive, "data.deidentified": True}
    return replace(recipe, changes)


@contextmanager
def _listen() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C (or SIGTERM) has come. The second Ctrl-C is immediate."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise Interrupted
        asked.set()
        print("stopping after this step; the state is saved (once more to stop at once)", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show_progress(name: str) -> Callable[[Evaluation], None]:
    """Prints one line an evaluation."""

    def show(e: Evaluation) -> None:
        metrics = "  ".join(f"{metric} {value:.3f}" for metric, value in e.metrics.items())
        minutes, seconds = divmod(round(e.seconds_left), 60)
        speed = f"{e.samples_per_second:6.0f} images/s  {minutes}:{seconds:02d} left"
        print(f"{name}  {e.phase:7s} step {e.step:5d}  loss {e.loss:.4f}  {metrics}  {speed}", flush=True)

    return show


def main(recipe: Callable[[], C], work: Callable[[C], Path]) -> None:
    """A job's command line: every field of the recipe's config can be overridden; prints the summary's path last.

    Exit codes: 0; 2 for something the user gave (one clear message); 130 when stopped by the user (state saved).
    """
    import tyro

    from raymed.tracking import telemetry_off

    telemetry_off()
    try:
        default = recipe()
        about = sys.modules["__main__"].__doc__
        config = tyro.cli(type(default), default=default, description=about, config=(tyro.conf.AvoidSubcommands,))
        print(f"summary: {work(config)}", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr, flush=True)
        sys.exit(130)
