"""What the tests of faults share: a job that a fault can strike at a seeded step, and what must hold when it is over.

The job is `train_classifier` on small phantoms, started as a user starts it. What it is measured by is the same job in
one plain process that nothing disturbs.
"""

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import torch
import tyro
from nodes import Driver, Node, wait_for

from raymed.data.phantoms import write_hsg
from raymed.tasks.classifier import ClassifierRecipe
from raymed.tracking.mlflow import resolve_uri
from raymed.tracking.outbox import Outbox, read
from raymed.train.checkpoints.checkpoint import Checkpoints, load_weights
from raymed.train.checkpoints.files import read_state, read_tensors
from raymed.train.checkpoints.index import step_of
from raymed.train.compute import Compute
from raymed.train.unit import Unit, train_unit

JOB = Path(__file__).resolve().parents[2] / "jobs" / "train_classifier.py"
STEPS = 360  # unless a test says otherwise
EVALUATIONS = 6  # and as many checkpoints
PATIENCE = 300.0  # seconds for whatever a busy machine may take long for
MARK = "TEST_OF_FAULTS"
TWO = "--compute.workers=2"
T = TypeVar("T")
_RECIPE = (
    "--method=asl --data.positive=occluded --data.deidentified --data.preprocess.size=16 --model.norm=group "
    f"--single.evaluations={EVALUATIONS} --single.batch-size=16 --single.accumulate=2 "
    "--single.optim.name=sgd --single.optim.lr=1e-2 --single.optim.clip=0.02"
).split()  # gentle: with more, the last bit of a sum grows a hundredfold


@dataclass(frozen=True)
class Training:
    """The job in one storage.

    url: that of the storage where it is a bucket; `storage` is its working copy then. manifest: a file or a URL.
    """

    storage: Path
    manifest: Path | str
    url: str | None = None
    flags: Sequence[str] = (TWO,)
    steps: int = STEPS

    @property
    def every(self) -> int:
        """Steps between two checkpoints."""
        return self.steps // EVALUATIONS

    @property
    def recipe(self) -> list[str]:
        """What is trained, as flags."""
        return [*_RECIPE, f"--single.steps={self.steps}", f"--data.manifest={self.manifest}"]

    @property
    def arguments(self) -> list[str]:
        """Of its command."""
        where = ["--name=run", "--compute.threads=1", f"--storage={self.url or self.storage}"]
        return [*self.recipe, *where, *self.flags]

    @property
    def unit(self) -> Path:
        """The folder of its only unit."""
        return self.storage / "runs" / "run" / "seed-2023"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.unit / "checkpoints" / "single"

    @property
    def outbox(self) -> Path:
        """What it tells the tracker."""
        return self.unit / "tracking.jsonl"

    def here(self) -> None:
        """Run it in this process."""
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [JOB.name, *self.arguments])
            runpy.run_path(str(JOB), run_name="__main__")
        torch.set_num_threads(threads)

    def start(self, folder: Path, **environment: str) -> Driver:
        """Run it in processes of its own; what it says is added to folder/driver.log."""
        path = folder / "driver.log"
        with path.open("a") as log:
            words = [sys.executable, str(JOB), *self.arguments]
            env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"} | environment
            process = subprocess.Popen(words, env=env, stdout=log, stderr=log, start_new_session=True)
        return Driver(process, path, path.stat().st_size)

    def losses(self) -> dict[int, float]:
        """Step -> loss, as they count now."""
        records = [record for record in Outbox(self.outbox).records() if _is_loss(record)]
        steps = [record["step"] for record in records]
        assert len(steps) == len(set(steps)), "a step counts twice"
        return {record["step"]: record["values"]["single/loss"] for record in records}

    def reaches(self, step: int, driver: Driver | None = None, over: Callable[[], bool] = lambda: False) -> None:
        """Wait until it has done so many steps, which must be before its driver has ended, or `over` says so."""

        def ended() -> bool:
            return over() or (driver is not None and driver.process.poll() is not None)

        wait_for(lambda: ended() or max(self.losses(), default=0) >= step, PATIENCE, f"step {step} of {self.unit}")
        assert not ended(), f"it ended before step {step}: {driver.said() if driver else ''}"

    def saved(self) -> int:
        """The step of its last whole checkpoint; -1 where there is none."""
        last = Checkpoints(self.checkpoints).find("last")
        return step_of(last.name) if last else -1


def beside(work: Callable[[], None], strike: Callable[[Callable[[], bool]], T]) -> T:
    """Do some work, and strike in a thread meanwhile; `strike` gets a function that says whether the work is over.
    Returns what it returns."""
    over = threading.Event()
    with ThreadPoolExecutor(1) as outside:
        struck = outside.submit(strike, over.is_set)
        try:
            work()
        finally:
            over.set()
    return struck.result()


def images(factory: pytest.TempPathFactory) -> Path:
    """The manifest of the phantoms of all these tests."""
    folder = factory.getbasetemp() / "faults"
    return write_hsg(folder / "images", num_patients=24, size=32)


def undisturbed(factory: pytest.TempPathFactory, steps: int = STEPS) -> Training:
    """The run that nothing disturbs: only its unit, in this process; trained once for all tests."""
    training = Training(factory.getbasetemp() / "faults" / f"undisturbed-{steps}", images(factory), None, (), steps)
    recipe = tyro.cli(ClassifierRecipe, args=training.recipe, config=(tyro.conf.AvoidSubcommands,))
    threads, cache, name = torch.get_num_threads(), training.storage / "cache", "undisturbed"
    train_unit(Unit(recipe, 2023, training.unit, name, name, None, cache, Compute(threads=1)))
    torch.set_num_threads(threads)
    return training


def fault_step(scenario: str, steps: int = STEPS) -> int:
    """The step at which a fault comes: random, the same every time; after the first checkpoint."""
    every = steps // EVALUATIONS
    return random.Random(scenario).randrange(every + 1, steps - 2 * every)


def kill(process: psutil.Process) -> None:
    """SIGKILL, and see that it is dead."""
    process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs([process], timeout=60)
    assert not alive, f"{process} has survived SIGKILL"


def marked(mark: str) -> list[psutil.Process]:
    """Processes that inherited MARK=mark, at whatever depth."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def at_work(node: Node) -> list[psutil.Process]:
    """The actors and tasks that run on a node."""
    return [p for name in ("RayTrainWorker", "TrainController", "Desk") for p in node.workers(name)]


def check_survived(
    training: Training, factory: pytest.TempPathFactory, beginnings: int = 0, saved: int | None = None
) -> None:
    """It is what the undisturbed run is, it repeated as little as it may, and it left nothing half-written.

    beginnings: how often it began again. saved: the step of the last whole checkpoint before the fault.
    """
    _check_equal(training, undisturbed(factory, training.steps))
    _check_repeats(training, beginnings, saved)
    check_whole(training)


def _check_equal(ours: Training, expected: Training) -> None:
    """Losses, weights and scores are the same."""
    losses, wanted = ours.losses(), expected.losses()
    assert list(losses) == list(wanted) == list(range(1, ours.steps + 1))
    assert max(abs(losses[step] - wanted[step]) / abs(wanted[step]) for step in wanted) < 1e-5
    a, b = (_vector(training) for training in (ours, expected))
    assert ((a - b).norm() / b.norm()).item() < 1e-5
    results = [json.loads((training.unit / "result.json").read_text()) for training in (ours, expected)]
    for split in ("val", "test"):
        assert results[0][split]["auroc"] == results[1][split]["auroc"]


def _check_repeats(training: Training, beginnings: int, saved: int | None) -> None:
    """Each time at most one interval was repeated, and half of one in which a save may still have been in flight, and
    Ray had not looked at its workers."""
    rewinds = list(_rewinds(training.outbox))
    assert len(rewinds) == beginnings, rewinds
    for step, lost in rewinds:
        assert lost <= 1.5 * training.every, f"{lost} steps after step {step} were repeated"
        assert saved is None or step >= saved, f"there was a checkpoint of step {saved}, and it went on from {step}"


def check_whole(training: Training) -> None:
    """Every checkpoint that is named can be read, and nothing else is there."""
    index = json.loads((training.checkpoints / "index.json").read_text())
    names = {index["last"], index["best"], *index["recent"], *index["pinned"]}
    assert {path.name for path in training.checkpoints.iterdir()} == names | {"index.json"}
    for name in names:
        state = read_state(training.checkpoints / name)
        assert {path.name for path in (training.checkpoints / name).iterdir()} == {*state["sha256"], "state.json"}
        for file in state["sha256"]:
            assert read_tensors(training.checkpoints / name, file, state)
    half = [path for path in training.storage.rglob("*") if path.name.endswith(".tmp") or ".step-" in path.name]
    assert not half


def check_tracked(training: Training, uri: str | None = None) -> None:
    """MLflow has the job and its unit once, ended, with every step once and with what they left."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=resolve_uri(uri, training.storage))
    experiment = client.get_experiment_by_name("raymed")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    assert sorted((run.info.run_name, run.info.status) for run in runs) == [
        ("run", "FINISHED"),
        ("seed-2023", "FINISHED"),
    ]
    unit = next(run for run in runs if run.info.run_name == "seed-2023")
    points = client.get_metric_history(unit.info.run_id, "single/loss")
    assert [point.step for point in points] == list(range(1, training.steps + 1))
    assert [point.value for point in points] == pytest.approx(list(training.losses().values()), rel=1e-5)
    scored = client.get_metric_history(unit.info.run_id, "val/auroc")
    assert [point.step for point in scored] == list(range(training.every, training.steps + 1, training.every))
    result = json.loads((training.unit / "result.json").read_text())
    assert unit.data.metrics["final/test/auroc"] == result["test"]["auroc"]
    assert {file.path for file in client.list_artifacts(unit.info.run_id)} >= {"bundle", "predictions.npz"}


def _rewinds(outbox: Path) -> Iterator[tuple[int, int]]:
    """Every new beginning: the step it goes on from, and how many steps were already done after that one."""
    done = 0
    begun = False
    for record, _ in read(outbox):
        if record["op"] == "rewind":
            if begun:
                yield record["step"], done - record["step"]
            done, begun = record["step"], True
        elif _is_loss(record):
            done = record["step"]


def _is_loss(record: dict) -> bool:
    return record["op"] == "metrics" and "single/loss" in record["values"]


def _vector(training: Training) -> torch.Tensor:
    """All last weights."""
    last = Checkpoints(training.checkpoints).find("last")
    assert last
    weights = load_weights(last, averaged=False)
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])
