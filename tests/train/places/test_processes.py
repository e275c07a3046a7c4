"""What torchrun's and srun's variables say, and two processes of which one fails."""

import itertools
import multiprocessing
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from small import make_unit, recipe

from raymed.config import UserError
from raymed.data.dataset import DataSet
from raymed.train.compute import Compute
from raymed.train.places import peers
from raymed.train.places.processes import World, as_launched, driving, follow, hosts, launched, together, train_together
from raymed.train.runs.job import RunConfig, main

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08],login",
}


def test_torchruns_variables():
    assert launched(TORCHRUN) == World(3, 4, 1, "torchrun", "10.0.0.1", 29400)


def test_slurms_variables():
    world = launched(SRUN)
    assert world == World(5, 8, 1, "slurm", "gpu07", 15_000 + (7 * 123456 + 2) % 15_000)
    assert launched(SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "4000"}) == World(5, 8, 1, "slurm", "head", 4000)
    assert world == launched(SRUN | {"SLURM_PROCID": "5"})  # the same port for all tasks of a step, another for others:
    assert launched(SRUN | {"SLURM_STEP_ID": "3"}).port != world.port  # type: ignore[union-attr]


def test_torchrun_within_srun_counts():
    assert launched(SRUN | TORCHRUN).source == "torchrun"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "environ",
    [
        {},
        TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"},
        TORCHRUN | {"RAY_JOB_ID": "01000000"},
        SRUN | {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"},
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
        {name: value for name, value in SRUN.items() if not name.startswith("SLURM_STEP")},
    ],
    ids=["plain", "one process", "Ray worker", "Ray job", "one task", "batch script"],
)
def test_nobody_started_several(environ):
    assert launched(environ) is None


@pytest.mark.parametrize(
    ("nodelist", "expected"),
    [
        ("node1", "node1"),
        ("a,b-2", "a b-2"),
        ("node[01-03,07]", "node01 node02 node03 node07"),
        ("n[9-11]", "n9 n10 n11"),
        ("rack[1-2]n[08-09]", "rack1n08 rack1n09 rack2n08 rack2n09"),
        ("gpu[1,3]-ib,login,cpu[099-100]", "gpu1-ib gpu3-ib login cpu099 cpu100"),
    ],
)
def test_a_list_of_machines(nodelist, expected, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no scontrol
    assert hosts(nodelist) == expected.split()


@dataclass(frozen=True)
class Config:
    compute: Compute = Compute()


def test_workers_are_the_processes(monkeypatch):
    assert as_launched(Config()) == Config()
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_launched(Config()).compute.workers == 4
        assert as_launched(Config(Compute(workers=4)), stated=True).compute.workers == 4
        assert as_launched("no config of a training") == "no config of a training"
    with pytest.warns(UserWarning, match="compute.workers is 4, not 2: torchrun started so many"):
        assert as_launched(Config(Compute(workers=2)), stated=True).compute.workers == 4


# Two processes: data that one cannot read, then the end of rank 0


def _start_as(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    step = SRUN | {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2", "MASTER_PORT": str(port)}
    os.environ |= step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}


@contextmanager
def _two(member: Callable, *arguments: object) -> Iterator[list]:
    """Two processes that run member(rank, port, *arguments)."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    members = [context.Process(target=member, args=(rank, port, *arguments)) for rank in (0, 1)]
    for process in members:
        process.start()
    try:
        yield members
    finally:
        for process in members:
            process.kill()
            process.join()


def _member(rank: int, port: int, folder: Path, manifest: Path) -> None:
    _start_as(rank, port)
    if rank == 1:
        peers.unit_data = _unreadable
        sys.exit(follow())
    unit = make_unit(recipe(manifest), folder / "unit")
    with driving():
        with together(Compute(device="cpu")):
            for attempt in range(2):
                with pytest.raises(UserError) as refused:
                    train_together(unit)
                (folder / f"refused-{attempt}").write_text(str(refused.value))
        (folder / "waits").touch()
        time.sleep(300)


def _unreadable(unit):
    raise PermissionError("images/00.png is not yours to read")


def test_what_one_cannot_do_is_told_and_nobody_waits_for_a_dead_driver(tmp_path, manifest):
    with _two(_member, tmp_path, manifest) as (driver, other):
        deadline = time.monotonic() + 90
        while not (tmp_path / "waits").exists() and driver.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for attempt in range(2):  # having told rank 0, it goes on following
            refused = (tmp_path / f"refused-{attempt}").read_text()
            assert refused == "rank 1 cannot train unit: PermissionError: images/00.png is not yours to read"
        driver.kill()
        other.join(15)
        assert other.exitcode == 1


def _job(rank: int, port: int, folder: Path, manifest: Path) -> None:
    """A job's process, the second of which has no memory for its third batch."""
    _start_as(rank, port)
    sys.stderr = (folder / f"said-{rank}").open("w", buffering=1)
    if rank == 1:
        calls, batch = itertools.count(1), DataSet.batch
        DataSet.batch = lambda *args: batch(*args) if next(calls) < 4 else torch.empty(2**60)  # type: ignore[method-assign]

    def work(config: None) -> Path:
        compute = Compute(device="cpu", engine="torch")
        with together(compute):
            train_together(make_unit(recipe(manifest, method="asl"), folder / "unit", compute=compute))
        return folder

    sys.argv = ["job"]
    main(NoConfig, work)  # type: ignore[type-var]


@dataclass(frozen=True)
class NoConfig:
    run: RunConfig = RunConfig()


def test_out_of_memory_on_one_ends_both(tmp_path, manifest):
    with _two(_job, tmp_path, manifest) as members:
        for process in members:
            process.join(60)
        assert [process.exitcode for process in members] == [2, 2]
    lost, failed = ((tmp_path / f"said-{rank}").read_text() for rank in (0, 1))
    assert "error: out of memory at step 2 of phase single on worker 1: set --single.accumulate to 4" in failed
    assert "error: another process of this job has ended while unit trained" in lost
    assert "Traceback" not in failed + lost
