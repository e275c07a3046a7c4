"""Rehearse the loss of a worker and of a whole run: one training that is killed twice, moved between numbers of workers
and ZeRO stages, and kept in S3, beside the same training left in peace.

    python jobs/rehearse_faults.py                                       # with an S3 server of its own (SeaweedFS)
    python jobs/rehearse_faults.py --storage s3://BUCKET/PREFIX          # with yours

1. left in peace: one process, plain torch, on disk
2. two workers, ZeRO 2, checkpoints in S3; one worker gets SIGKILL and the run goes on by itself; then all of it gets
   SIGKILL, and this machine's working copy is deleted
3. continued by one worker, plain torch, until it gets SIGTERM
4. continued by two workers, ZeRO 3, to its end

Both loss curves are drawn into one figure, with their difference below.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from raymed.command import command
from raymed.config import UserError, check_range
from raymed.report.survival import Event, draw_survival
from raymed.storage import working_copy
from raymed.tracking.outbox import Outbox

JOB = Path(__file__).with_name("train_classifier.py")
UNIT = "runs/rehearsal/seed-2023"
PATIENCE = 600.0  # seconds until a run must have come a step further
TOLERANCE = 1e-3  # of losses; equal runs part by rounding, which grows with the steps: to 1e-6 in 300 of this recipe
RECIPE = "--method=ce --single.batch-size=32 --single.optim.lr=1e-3 --compute.threads=1".split()
"""With all but mirror images and brightness switched off, it learns from a few hundred steps on phantoms this small; a
larger learning rate would learn faster, and make so much of a rounding error that no run follows another."""
SWITCHED_OFF = ("rotate", "scale", "translate", "contrast", "gamma", "sharpness", "noise")


@dataclass(frozen=True)
class Rehearsal:
    """What is rehearsed, and where."""

    storage: str | None = None
    """s3://BUCKET/PREFIX with nothing in it yet; None = an S3 server on this machine, for as long as this takes."""
    steps: int = 300
    """Of the training; faults come at 30, 50 and 75 % of them."""
    size: int = 48
    """Side of an image in pixels."""
    out: Path = Path("rehearsal.png")
    """The figure."""


class Run:
    """The training in one storage, in processes that are started one after the other."""

    def __init__(self, config: Rehearsal, storage: str, folder: Path, env: dict[str, str]):
        self.unit, self.env = folder / UNIT, env
        self.processes: list[subprocess.Popen] = []
        self.command = [sys.executable, str(JOB), "--name=rehearsal", f"--storage={storage}", *RECIPE]
        self.command += [f"--augment.{change}=0" for change in SWITCHED_OFF]
        self.command += [f"--data.preprocess.size={config.size}"]
        self.command += [f"--single.steps={config.steps}", f"--single.evaluations={config.steps // 20}"]

    def start(self, *flags: str) -> subprocess.Popen:
        """Begin or go on, in a process group of its own."""
        print(f"\n$ python jobs/{JOB.name} {' '.join(self.command[2:3])} {' '.join(flags)}", flush=True)
        process = subprocess.Popen([*self.command, *flags], env=self.env, start_new_session=True)
        self.processes.append(process)
        return process

    def end(self) -> None:
        """Kill what still runs."""
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                kill(family(process))

    def reaches(self, step: int, process: subprocess.Popen) -> None:
        """Return when the training has done so many steps."""
        until = time.monotonic() + PATIENCE
        while (done := self.steps_done()) < step:
            if process.poll() is not None or time.monotonic() > until:
                raise UserError(f"the training ended or stood still at step {done} of {step}: see its messages above")
            time.sleep(0.05)

    def steps_done(self) -> int:
        """As far as its losses are written."""
        return max(self.losses(), default=0)

    def losses(self) -> dict[int, float]:
        """Step -> loss, what was repeated after a fault counted once."""
        records = [r for r in Outbox(self.unit / "tracking.jsonl").records() if r["op"] == "metrics"]
        return {r["step"]: r["values"]["single/loss"] for r in records if "single/loss" in r["values"]}


def rehearse(config: Rehearsal) -> Path:
    """All of it. Returns the figure's path. Raises UserError where the two runs are not the same."""
    check_range("steps", config.steps, 100)
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as scratch, _bucket(config, Path(scratch)) as (url, env):
        own = os.environ | env | {"RAYMED_LOCAL": f"{scratch}/local", "RAYMED_HOME": f"{scratch}/home"}
        os.environ["RAYMED_LOCAL"] = own["RAYMED_LOCAL"]
        peaceful = Run(config, f"{scratch}/peaceful", Path(scratch, "peaceful"), own)
        shaken = Run(config, url, working_copy(url), own)
        try:
            _finish(peaceful.start())
            events = _shake(config, shaken)
        finally:
            peaceful.end()
            shaken.end()
        return _compared(config, peaceful.losses(), shaken.losses(), events)


def _compared(config: Rehearsal, wanted: dict[int, float], found: dict[int, float], events: list[Event]) -> Path:
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(f"the killed run has no record of {len(missing)} steps, the first of them {missing[0]}")
    draw_survival(config.out, wanted, found, events)
    apart = max(abs(found[step] - loss) / abs(loss) for step, loss in wanted.items())
    print(f"\n{len(wanted)} steps; the losses differ by {apart:.1e} at most (relative)", flush=True)
    if apart > TOLERANCE:
        raise UserError(f"the killed run is another one: its losses differ by more than {TOLERANCE:g}")
    return config.out.absolute()


def _shake(config: Rehearsal, run: Run) -> list[Event]:
    """Steps 2 to 4 of the rehearsal; returns what happened when."""
    events = []
    two = run.start("--compute.workers=2", "--compute.zero-stage=2")
    run.reaches(round(0.3 * config.steps), two)
    kill(_workers(two)[1:])
    events.append(Event(run.steps_done(), "a worker killed", "2 workers, ZeRO 2"))
    run.reaches(round(0.5 * config.steps), two)
    events.append(Event(run.steps_done(), "all killed, the disk lost", "1 worker, plain"))
    kill(family(two))
    shutil.rmtree(run.unit.parents[1])
    one = run.start("--compute.workers=1")
    run.reaches(round(0.75 * config.steps), one)
    one.send_signal(signal.SIGTERM)
    one.wait(PATIENCE)
    events.append(Event(run.steps_done(), "stopped", "2 workers, ZeRO 3"))
    _finish(run.start("--compute.workers=2", "--compute.zero-stage=3"))
    return [Event(0, "", "2 workers, ZeRO 2"), *events]


def _workers(driver: subprocess.Popen) -> list[psutil.Process]:
    """The processes of Ray Train's workers below a driver."""
    return [process for process in family(driver) if "RayTrainWorker" in _title(process)]


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """A process with all below it, the youngest first."""
    top = psutil.Process(process.pid)
    return [*reversed(top.children(recursive=True)), top]


def _title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def kill(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL, and wait until they are dead."""
    if not processes:
        raise UserError("there is nothing to kill: the training has ended")
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=60)
    if alive:
        raise UserError(f"{len(alive)} processes survived SIGKILL")


def _finish(process: subprocess.Popen) -> None:
    if process.wait() != 0:
        raise UserError(f"the training ended with exit code {process.returncode}: see its messages above")


@contextmanager
def _bucket(config: Rehearsal, scratch: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """URL and environment of the storage."""
    if config.storage:
        yield config.storage, {}
        return
    from raymed.storage.server import BUCKET, S3Server

    server = S3Server(scratch / "s3")
    os.environ.update(server.env)
    try:
        yield f"s3://{BUCKET}/rehearsal", server.env
    finally:
        server.kill()


if __name__ == "__main__":
    command(Rehearsal, lambda config: f"figure: {rehearse(config)}")
