"""Processes that torchrun or SLURM's srun started: rank 0 drives the job, the others follow it.

    torchrun --nproc-per-node 4 jobs/train_classifier.py ...
    srun --ntasks 4 --kill-on-bad-exit=1 python jobs/train_classifier.py ...

Rank 0 alone has the job: its folder, lock, command line, MLflow and report. It sends each unit to the others through a
TCP store that lives in its own process, and all train it as one process group (gloo on CPUs, NCCL on GPUs). Followers
poll the store in between, so no collective waits while rank 0 measures or reports, and they see at once that rank 0 is
gone: the connection closes with its process. The group exists only within `together`; outside of it rank 0 computes
like any single process.
"""

import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from raymed.config import UserError, replace
from raymed.distributed import all_gather_object, leave_group
from raymed.storage import lock, remote_of
from raymed.train.compute import Compute
from raymed.train.loop import Evaluation, Interrupted
from raymed.train.out_of_memory import WorkerFailed
from raymed.train.places.peers import collective_timeout, is_loss, load_in_turn
from raymed.train.unit import Unit, UnitRun

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_RAY = ("RAY_JOB_ID", "RAY_JOB_CONFIG_JSON_ENV_VAR")  # of Ray's workers, and of drivers of submitted jobs
_MEETING = timedelta(minutes=5)  # in which all processes must have started
_LOADING = timedelta(days=1)  # in which all must have decoded the images
_FAREWELL = 10.0  # seconds that rank 0 waits until all have heard that it ends
_PERIOD = 0.1  # seconds between two looks for rank 0's next word
C = TypeVar("C")


@dataclass(frozen=True)
class World:
    """This process among those that were started together."""

    rank: int
    size: int
    local_rank: int
    """Among those of this machine; picks the GPU."""
    source: Literal["torchrun", "slurm"]
    address: str
    """Of rank 0's machine."""
    port: int


def launched(environ: Mapping[str, str] = os.environ) -> World | None:
    """What torchrun's or srun's variables say of this process; None in one that is alone or belongs to Ray.

    torchrun: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. srun: SLURM_PROCID, SLURM_STEP_NUM_TASKS,
    SLURM_LOCALID, SLURM_STEP_NODELIST, SLURM_JOB_ID (https://slurm.schedmd.com/srun.html), with MASTER_ADDR and
    MASTER_PORT in place of what follows from them. SLURM_NTASKS counts for nothing: a batch script has it too, though
    it runs once.
    """
    if any(name in environ for name in _RAY):
        return None
    world = None
    if all(name in environ for name in _TORCHRUN):
        rank, size, local_rank, address, port = (environ[name] for name in _TORCHRUN)
        world = World(int(rank), int(size), int(local_rank), "torchrun", address, int(port))
    elif "SLURM_PROCID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        world = _slurm_world(environ)
    return world if world and world.size > 1 else None


def _slurm_world(environ: Mapping[str, str]) -> World:
    job, step = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_STEP_ID", 0))
    port = 15_000 + (7 * job + step) % 15_000  # below the ports that the system gives away
    return World(
        rank=int(environ["SLURM_PROCID"]),
        size=int(environ["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        source="slurm",
        address=environ.get("MASTER_ADDR") or hosts(environ["SLURM_STEP_NODELIST"])[0],
        port=int(environ.get("MASTER_PORT", port)),
    )


def hosts(nodelist: str) -> list[str]:
    """Names of the machines in SLURM's compact list: "a,node[01-03,07]" -> a, node01, node02, node03, node07."""
    if scontrol := shutil.which("scontrol"):
        told = subprocess.run([scontrol, "show", "hostnames", nodelist], capture_output=True, text=True)
        if told.returncode == 0:
            return told.stdout.split()
    return [name for entry in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist) for name in _expanded(entry)]


def _expanded(entry: str) -> list[str]:
    before, bracket, rest = entry.partition("[")
    if not bracket:
        return [entry]
    numbers, _, after = rest.partition("]")
    return [f"{before}{number}{tail}" for number in _numbers(numbers) for tail in _expanded(after)]


def _numbers(ranges: str) -> Iterator[str]:
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield f"{number:0{len(first)}d}"


def as_launched(config: C, stated: bool = False) -> C:
    """A job's config with as many workers as there are processes; warns where the user stated another number."""
    world = launched()
    workers = getattr(getattr(config, "compute", None), "workers", None)
    if world is None or workers in (None, world.size):
        return config
    if stated:
        warnings.warn(f"compute.workers is {world.size}, not {workers}: {world.source} started so many", stacklevel=2)
    return replace(config, {"compute.workers": world.size})


class _Mesh:
    """The processes' connections: rank 0's word to the others, and the process group."""

    def __init__(self, world: World):
        os.environ["LOCAL_RANK"] = str(world.local_rank)  # srun sets none; GPUs are chosen by it
        self.world = world
        self.heard = 0
        self.loading: Any = None  # a second group, patient, for the time in which data are loaded
        try:
            self._meet()
        except dist.DistError as error:
            raise UserError(
                f"rank {world.rank} on {socket.gethostname()} does not meet rank 0 at {world.address}:{world.port} "
                f"({_first_line(error)}). Have all {world.size} processes started, is that address right, and is the "
                "port open between the machines? MASTER_ADDR and MASTER_PORT choose others"
            ) from None

    def _meet(self) -> None:
        world, leads = self.world, self.world.rank == 0
        if world.source == "slurm":
            self.store = self._tcp_store(world.port)
            return
        # torchrun's own store may live in its agent, and would outlive rank 0: it only tells where rank 0's is.
        self.rendezvous, *_ = next(iter(dist.rendezvous("env://", world.rank, world.size, timeout=_MEETING)))
        if leads:
            self.store = self._tcp_store(0)
            self.rendezvous.set("raymed/port", str(self.store.port))
        else:
            self.store = self._tcp_store(int(self.rendezvous.get("raymed/port")))

    def _tcp_store(self, port: int) -> dist.TCPStore:
        address, leads = self.world.address, self.world.rank == 0
        return dist.TCPStore(address, port, is_master=leads, timeout=_MEETING, wait_for_workers=False)

    def say(self, verb: str, what: Any = None) -> None:
        """Rank 0 tells all others what to do next."""
        self.store.set(f"word/{self.heard}", pickle.dumps((verb, what)))  # type: ignore[arg-type] # bytes will do
        self.heard += 1

    def hear(self) -> tuple[str, Any]:
        """What rank 0 says next; without rank 0 that it is over."""
        key = f"word/{self.heard}"
        self.heard += 1
        try:
            while not self.store.check([key]):
                time.sleep(_PERIOD)
            return pickle.loads(self.store.get(key))
        except dist.DistError:
            print(f"rank {self.world.rank}: rank 0 is gone", file=sys.stderr, flush=True)
            return "over", 1

    def leave(self) -> None:
        """A follower has heard that it is over."""
        with suppress(dist.DistError):
            self.store.add("left", 1)

    def dismiss(self, code: int) -> None:
        """Rank 0 ends: tell the others, which end with the same exit code, and give them time to hear it."""
        self.say("over", code)
        deadline = time.monotonic() + _FAREWELL
        while self.store.add("left", 0) < self.world.size - 1 and time.monotonic() < deadline:
            time.sleep(_PERIOD)

    def join(self, compute: Compute) -> None:
        """Make the process group. Collective."""
        device = compute.resolved_device()
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        if compute.resolved_engine(self.world.size) == "deepspeed":
            import deepspeed  # noqa: F401 # before there is a group, see raymed.distributed
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=dist.PrefixStore("group", self.store),
                rank=self.world.rank,
                world_size=self.world.size,
                timeout=collective_timeout(),
                device_id=device if on_gpu else None,
            )
            self.loading = dist.new_group(backend="gloo", timeout=_LOADING)
            all_gather_object(None)
        except RuntimeError as error:
            names = "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME" if on_gpu else "GLOO_SOCKET_IFNAME"
            raise UserError(
                f"rank {self.world.rank} on {socket.gethostname()} cannot reach the other processes "
                f"({_first_line(error)}). Where a machine's name means 127.0.0.1 or it has several networks, set "
                f"{names} to the interface between the machines, such as eth0 (`ip -br address` lists them)"
            ) from error

    def part(self) -> None:
        """End the process group."""
        self.loading = None
        leave_group()

    def prepare(self, unit: Unit, interrupted: Callable[[], bool]) -> UnitRun:
        """The unit with its data, on every rank; what one rank cannot is raised on all. Collective."""
        run, error = None, None
        try:
            run = _loaded(unit, interrupted)
        except Exception as caught:
            error = caught
        problems: list[Any] = [None] * self.world.size
        told = error and (str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        dist.all_gather_object(problems, told, group=self.loading)
        if run and not any(problems):
            return run
        if error and self.world.rank == 0:
            raise error
        if error and not isinstance(error, UserError):
            traceback.print_exception(error)
        rank, problem = next((rank, problem) for rank, problem in enumerate(problems) if problem)
        raise UserError(f"rank {rank} cannot train {unit.name}: {problem}")


def _loaded(unit: Unit, interrupted: Callable[[], bool]) -> UnitRun:
    if not unit.folder.is_dir() and remote_of(unit.folder) is None:
        raise UserError(f"{unit.folder} is not on {socket.gethostname()}: give a --storage that all machines share")
    load_in_turn(unit)
    return UnitRun(unit, interrupted)


_mesh: _Mesh | None = None  # of rank 0, while it drives


@contextmanager
def driving() -> Iterator[None]:
    """Rank 0's frame around a whole job: however the block ends, the other processes end with it, with the exit code
    that `raymed.train.runs.job.main` gives. Nothing in a process that is alone."""
    global _mesh
    world = launched()
    if world is None:
        yield
        return
    _mesh = _Mesh(world)
    code = 0
    try:
        yield
    except BaseException as error:
        code = _exit_code(error)
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends when another process has ended first
        _mesh.dismiss(code)
        _mesh = None


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1


@contextmanager
def together(compute: Compute) -> Iterator[None]:
    """On rank 0: within, all processes are one group, and `train_together` may be called. Once a process: DeepSpeed
    keeps the first group that it sees."""
    assert _mesh
    _mesh.say("join", compute)
    try:
        _mesh.join(compute)
        yield
    finally:
        _mesh.say("part")
        _mesh.part()


def train_together(
    unit: Unit,
    interrupted: Callable[[], bool] = lambda: False,
    report: Callable[[Evaluation], None] = lambda evaluation: None,
) -> dict[str, Any]:
    """On rank 0: train and finish a unit with all processes; a finished one returns its result at once.

    Raises UserError when a process is lost, Interrupted when this one or any other was asked to stop: the same command
    continues at the last checkpoint.
    """
    assert _mesh
    done = unit.result()
    if done is not None:
        return done
    with lock(unit.folder / "lock"):
        _mesh.say("train", unit)
        try:
            return _train(_mesh, unit, interrupted, report)
        except RuntimeError as error:
            if not is_loss(error):
                raise
            raise UserError(
                f"another process of this job has ended while {unit.name} trained ({_first_line(error)}): its own "
                "messages say why. The same command continues at the last checkpoint"
            ) from None


def _train(
    mesh: _Mesh, unit: Unit, interrupted: Callable[[], bool], report: Callable[[Evaluation], None]
) -> dict[str, Any]:
    run = mesh.prepare(unit, interrupted)
    for evaluation in run.evaluations():
        report(evaluation)
    return run.finish()


def follow() -> int:
    """On every other rank: do what rank 0 says until it is over. Returns the exit code.

    SIGTERM, SIGINT or SIGUSR1 stops the training of all ranks after a checkpoint, and never this process by itself.
    """
    world = launched()
    assert world
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: asked.append(number))
    mesh = _Mesh(world)
    while True:
        verb, what = mesh.hear()
        if verb == "over":
            mesh.leave()
            return what
        if verb == "join":
            mesh.join(what)
        elif verb == "part":
            mesh.part()
        else:
            _train_as_told(mesh, what, lambda: bool(asked))


def _train_as_told(mesh: _Mesh, unit: Unit, interrupted: Callable[[], bool]) -> None:
    """What stops all ranks alike, or comes from the loss of another, is rank 0's to tell. What fails here alone ends
    this process: the others wait for it in a collective."""
    try:
        _train(mesh, unit, interrupted, lambda evaluation: None)
    except WorkerFailed:
        raise
    except (UserError, Interrupted):
        return
    except RuntimeError as error:
        if not is_loss(error):
            raise


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
