"""The frame of every job: a named run in a folder, tracked, locked, resumable, and a summary at its end.

A run exists from its first training on (`Job.start`): what is refused before leaves nothing behind.
"""

import gc
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from raymed.config import UserError, check_range, config_hash, replace, to_dict, to_json
from raymed.data.dataset import DataSet
from raymed.report.summary import write_summary
from raymed.storage import Mirror, address, local_folder, lock, resolve_storage, write_atomic
from raymed.tasks.recipe import Recipe
from raymed.telemetry import telemetry_off
from raymed.tracking.outbox import Outbox
from raymed.train.places.metrics import Shown
from raymed.train.places.processes import as_launched, driving, follow, launched
from raymed.train.places.signals import stop_asked
from raymed.train.plans.estimate import StepCost
from raymed.train.runs.budget import Budget, parse_duration
from raymed.train.runs.claim import NOT_IDENTITY, check_claim, public, refuse_remains, write_claim
from raymed.train.runs.command import command_line
from raymed.train.runs.record import DATA, ENVIRONMENT, PACKAGES, data_record, export, from_folder
from raymed.train.runs.repeat import Repeat, begin, verdict_lines, with_defaults
from raymed.train.unit import Unit, load_data

_COSTS = "costs.json"
_PERIOD = 0.2  # seconds between two looks for the first training
_defaults: dict[type, Any] = {}  # type of a job's config -> what its command line starts from
C = TypeVar("C")


@dataclass(frozen=True)
class RunConfig:
    """Under which name, and where everything is kept."""

    name: str | None = None
    """Name of the run: the same name continues it. None = made from the job and its config."""
    storage: str | None = None
    """Folder for everything that stays, or s3://BUCKET/PREFIX; None = $RAYMED_HOME, else ~/.raymed."""
    tracking: str | None = None
    """MLflow tracking URI; None = $MLFLOW_TRACKING_URI, else a sqlite store in the storage."""
    experiment: str = "raymed"
    """MLflow experiment."""
    from_run: str | None = None
    """Repeat a run: its name, its MLflow id, or the file of --export-run. Its config becomes the default of every other
    flag, and at the end the two are compared: equal, within seed noise, or different."""
    data_root: str | None = None
    """With --from-run: the folder that holds the same images here. They are told by their content, not by their names;
    the manifest is looked for under its old name, or stated (--data.manifest)."""
    export_run: str | None = None
    """Write a run (its name or MLflow id) to NAME.raymed.json for --from-run elsewhere, without images, identifiers or
    paths, and do nothing else."""
    plan: bool = False
    """Say what each ZeRO stage would take of memory, time and network and which one is advised, and do nothing else."""
    preview: bool = False
    """Write the sheet of the data as the network will see them (data_sheet.html), and do nothing else."""
    time_budget: str | None = None
    """Wall-clock time after which the job ends with what it has, such as "2h", "90m" or "30s"; None = no limit."""
    max_gpu_hours: float | None = None
    """The same in GPU hours: GPUs in use times hours; None = no limit."""

    def __post_init__(self) -> None:
        if self.time_budget is not None:
            parse_duration(self.time_budget)
        if self.max_gpu_hours is not None:
            check_range("max_gpu_hours", self.max_gpu_hours, 0, low_open=True)


@dataclass
class Job:
    """A job in progress."""

    kind: str
    config: Any
    recipe: Recipe
    """The config's recipe, with the phantoms drawn where they are asked for."""
    name: str
    storage: Path
    data: DataSet
    interrupted: Callable[[], bool]
    tracker: Any
    budget: Budget
    """What is left of `run.time_budget` and `run.max_gpu_hours`."""
    repeat: Repeat | None
    """The run that this one repeats, with what is known of it."""
    stack: ExitStack
    """Closed at the end of the job."""
    mirror: Mirror | None
    """Keeps the folder in step with its bucket, where the storage has one."""
    children: list[tuple[Outbox, int]] = field(default_factory=list)
    """Of its trainings, each with its size when it was found."""
    is_started: bool = False
    _lock: Any = field(default_factory=threading.Lock)

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return self.storage / "runs" / self.name

    @property
    def key(self) -> str:
        """Names the run for ever."""
        return f"{self.name}-{config_hash(self.config, NOT_IDENTITY)[:12]}"

    @property
    def outbox(self) -> Outbox:
        """What the run itself tells the tracker: it has started."""
        self.start()
        return Outbox(self.folder / "tracking.jsonl")

    @property
    def command(self) -> str:
        """The command line that gives this run on another storage: every flag that is not the job's default, and none
        that says where or under which name things are kept."""
        return command_line(self.kind, self.config, _defaults.get(type(self.config)))

    def keep_costs(self, measured: Mapping[str, StepCost]) -> None:
        """Keep what a step of each of these phases costs, unless an earlier process has measured it."""
        write_atomic(self.folder / _COSTS, to_json(to_dict(dict(measured)) | self.costs()))

    def costs(self) -> dict[str, dict[str, Any]]:
        """What was kept: phase -> the fields of its StepCost."""
        path = self.folder / _COSTS
        return json.loads(path.read_text()) if path.is_file() else {}

    def start(self) -> None:
        """From here on the run exists: in its folder and in MLflow. The first training starts it, or whoever asks for
        `outbox`; again, it does nothing."""
        from raymed.tracking import SystemMetrics

        with self._lock:
            if self.is_started:
                return
            write_claim(self.folder, self.kind, self.config)
            _open_run(self)
            for outbox, _ in self.children:
                self.tracker.follow(outbox.path)
            if self.mirror:
                self.mirror.follow(pulled=["**/tracking.jsonl"])  # of workers on other nodes
            self.stack.enter_context(SystemMetrics(Outbox(self.folder / "tracking.jsonl")))
            self.stack.enter_context(Shown(self.name, lambda: self.children))
            self.is_started = True

    def go_on(self) -> None:
        """Training begins: a run that an earlier process has started goes on. A new one starts when it has trained."""
        if (self.folder / "config.json").is_file():
            self.start()

    def over(self) -> bool:
        """Whether the job is to end: Ctrl-C has come, or the budget is used up."""
        return self.interrupted() or self.budget.exhausted() is not None

    def has_trained(self) -> bool:
        """Whether some training of this run has begun, or gone on, since this process has it."""
        return any(_size(outbox) > size for outbox, size in list(self.children))

    def unit(self, name: str, seed: int, recipe: Recipe | None = None, part: Any = "all") -> Unit:
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
        with self._lock:
            self.children.append((outbox, _size(outbox)))
            if self.is_started:
                self.tracker.follow(outbox.path)

    def where(self) -> str:
        """Where a person finds the run in MLflow."""
        return self.tracker.where(self.key)

    def finish(self, figures: dict[str, Any], paths: dict[str, Path], **extra: Any) -> Path:
        """Write summary.json, log it, and close the run. A run that repeats another is compared with it."""
        path = self.folder / "summary.json"
        outbox = self.outbox
        extra = {"command": self.command} | extra
        if self.repeat:
            extra["repeat"] = self._compare(figures)
        mlflow = {"experiment": self.config.run.experiment, "run": self.tracker.run_id(self.key, timeout=60)}
        kept = {name: str(place) for name, place in paths.items()}
        write_summary(path, self.kind, public(self.config), figures, mlflow=mlflow, paths=kept, **extra)
        outbox.artifact(path)
        outbox.close("FINISHED")
        for child, _ in self.children:  # what a used up budget has cut off
            if child.status() == "RUNNING":
                child.close("KILLED")
        return path

    def _compare(self, figures: dict[str, Any]) -> dict[str, Any]:
        assert self.repeat
        mine = from_folder(self.folder, json.loads(to_json(figures)))
        verdict = self.repeat.verdict(mine)
        print("\n".join(verdict_lines(verdict)), flush=True)
        return verdict


@contextmanager
def open_job(kind: str, config: Any) -> Iterator[Job]:
    """A run for this config: new, or the one that was begun with it.

    However the block ends, every MLflow run under it ends with the right status; a UserError or Ctrl-C before the first
    training leaves no run. Raises UserError when the storage cannot be written, another process is at it, the name
    belongs to another config, or the run to repeat cannot be.
    """
    from raymed.tracking import Tracker

    storage = resolve_storage(config.run.storage)
    if "working_dir_files" in storage.parts:
        raise UserError(
            f"--storage must be an absolute path in a submitted job, got {config.run.storage}: Ray deletes the folder "
            "that the job runs in"
        )
    config, repeat = begin(kind, config, storage)
    name = _name(kind, config, repeat)
    folder = storage / "runs" / name
    recipe = _with_phantoms(config.recipe, storage)
    data = load_data(recipe, local_folder(storage, "cache"))
    notes = repeat.check_data(data) if repeat else []
    with ExitStack() as stack:
        stack.enter_context(lock(folder / "lock"))
        mirror = Mirror.of(folder)
        if mirror:
            mirror.pull()
            stack.callback(mirror.close)
            refuse_remains(folder, mirror)
        stack.callback(_discard_unstarted, folder, storage)
        check_claim(folder, name, kind, config)
        interrupted = stack.enter_context(stop_asked())
        tracker = stack.enter_context(Tracker(config.run.tracking, config.run.experiment, storage))
        budget = Budget.from_config(config.run.time_budget, config.run.max_gpu_hours, folder)
        stack.callback(budget.save)
        job = Job(kind, config, recipe, name, storage, data, interrupted, tracker, budget, repeat, stack, mirror)
        place = [] if config.run.plan else [f"run {name} in {folder}"]
        print("\n".join([data.summary(), *notes, *place]), flush=True)
        try:
            with _started_by_training(job):
                yield job
        except BaseException as error:
            if job.is_started or not isinstance(error, UserError | KeyboardInterrupt | SystemExit):
                _close_runs(job, "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
            raise


def _size(outbox: Outbox) -> int:
    return outbox.path.stat().st_size if outbox.path.exists() else 0


def _name(kind: str, config: Any, repeat: Repeat | None) -> str:
    if repeat is None:
        return config.run.name or f"{kind}-{config_hash(config, NOT_IDENTITY)[:8]}"
    if config.run.name == repeat.record.name:
        raise UserError(f"--name {config.run.name} is the name of the run that is repeated: give another, or none")
    return config.run.name or f"{repeat.record.name}-repeat"


@contextmanager
def _started_by_training(job: Job) -> Iterator[None]:
    """Starts the job when the first training of its has begun, in whatever process that is."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_PERIOD if job.mirror is None else 10 * _PERIOD):
            if job.mirror:  # workers may be on other nodes
                with suppress(UserError):
                    job.mirror.pull(["**/tracking.jsonl"])
            if job.has_trained():
                return job.start()

    thread = threading.Thread(target=watch, name="raymed-job-start", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if job.has_trained():
            job.start()


def _discard_unstarted(folder: Path, storage: Path) -> None:
    """Remove what is left of a run that never started."""
    if any(folder.rglob("tracking.jsonl")):
        return
    shutil.rmtree(folder)
    for parent in (folder.parent, local_folder(storage, "mlflow")):
        with suppress(OSError):  # not empty: there are others
            parent.rmdir()


def _open_run(job: Job) -> None:
    import torch

    from raymed.tracking import environment, git_state, installed_packages

    tags = {"raymed.job": job.kind, "raymed.data": job.data.fingerprint}
    code = git_state(Path(sys.argv[0]).parent)  # of the job's file, from wherever it is started
    tags |= {f"raymed.git.{name}": str(value) for name, value in code.items()}
    outbox = Outbox(job.folder / "tracking.jsonl")
    outbox.open(job.key, job.name, None, public(job.config), tags)
    outbox.json(environment() | {"threads": job.config.compute.threads or torch.get_num_threads()}, ENVIRONMENT)
    outbox.text(installed_packages(), PACKAGES)
    write_atomic(job.folder / DATA, json.dumps(data_record(job.data)))
    outbox.artifact(job.folder / DATA)
    job.tracker.follow(outbox.path)


def _close_runs(job: Job, status: Any) -> None:
    for outbox in [job.outbox, *(child for child, _ in job.children)]:
        records = outbox.records()
        if records and not any(r["op"] == "close" for r in records[-1:]):
            outbox.close(status)


def _with_phantoms(recipe: Recipe, storage: Path) -> Recipe:
    """manifest = "phantoms" becomes the manifest of phantoms drawn into the storage."""
    if recipe.data.manifest != "phantoms":
        return recipe
    manifest, changes = recipe.phantoms(storage / "phantoms")
    if mirror := Mirror.of(manifest.parent):  # other nodes read them there
        mirror.push()
    return replace(recipe, changes | {"data.manifest": address(manifest)})


def main(recipe: Callable[[], C], work: Callable[[C], Path]) -> None:
    """A job's command line: every field of the recipe's config can be overridden; prints the summary's path last.
    Of several processes that torchrun or srun started, the first does so and the others follow it.

    Exit codes: 0; 2 for something the user gave (one clear message); 130 when stopped by the user (state saved).
    """
    code = _exit_code(recipe, work)
    if launched():
        gc.collect()  # a failure's frames held the process group, whose threads must end before Python: `leave_group`
    if code:
        sys.exit(code)


def _exit_code(recipe: Callable[[], C], work: Callable[[C], Path]) -> int:
    import tyro

    telemetry_off()
    try:
        world = launched()
        if world and world.rank > 0:
            return follow()
        with driving():
            default: Any = recipe()
            _defaults[type(default)] = default
            default = as_launched(with_defaults(default, sys.argv[1:]))
            about = sys.modules["__main__"].__doc__
            config = tyro.cli(type(default), default=default, description=about, config=(tyro.conf.AvoidSubcommands,))
            config = as_launched(config, stated=True)
            if config.run.export_run:
                exported = export(config.run.export_run, config.run.storage, config.run.tracking)
                print(f"exported: {exported.absolute()}", flush=True)
            else:
                print(f"summary: {work(config)}", flush=True)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr, flush=True)
        return 130
