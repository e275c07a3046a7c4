"""Saving meets SIGKILL, a full disk, and several workers of which one fails: what counts is whole, and all are told."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from tiny import build, check_whole, fill, kept, save, save_all

from raymed.config import UserError
from raymed.train.checkpoints.checkpoint import Checkpoints, Progress, resume, resume_optimizers

FORK = multiprocessing.get_context("fork")
WIDTH = 300  # 360 kB a tensor: long enough to be hit while it is written


def save_for_ever(folder: Path, saved) -> None:
    """Go on from the last checkpoint and tell every step that is saved."""
    checkpoints, networks = Checkpoints(folder, keep_last=2), build(WIDTH)
    last = checkpoints.find("last")
    progress = resume(networks, last, "tiny") if last else Progress("tiny")
    if last:
        resume_optimizers(networks, last, progress)
    for step in count(progress.step + 1):
        save(checkpoints, networks, step, best=step % 3 == 0)
        checkpoints.wait()
        saved.send(step)


def killed_while_saving(folder: Path, steps: int, part: float) -> int:
    """A process that saves and is killed after so many steps and a part of the next. Returns the last step it told."""
    reader, writer = FORK.Pipe(duplex=False)
    child = FORK.Process(target=save_for_ever, args=(folder, writer))
    child.start()
    writer.close()
    told, started = reader.recv(), time.monotonic()
    for _ in range(steps):
        told = reader.recv()
    took = (time.monotonic() - started) / steps
    time.sleep(part * took)  # some moment of the next save: not waited for, drawn
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    while reader.poll():  # what it told before it died
        try:
            told = reader.recv()
        except EOFError:
            break
    return told


def test_killed_at_any_moment_the_last_checkpoint_is_whole(tmp_path):
    draw, told, leftovers = random.Random(4), 0, 0
    checkpoints = Checkpoints(tmp_path / "tiny", keep_last=2)
    for _ in range(10):
        before = told
        told = killed_while_saving(checkpoints.folder, draw.randint(1, 3), draw.random())
        assert told > before
        last = checkpoints.find("last")
        step = json.loads((last / "state.json").read_text())["step"]
        assert step in (told, told + 1)
        check_whole(last, step)
        if best := checkpoints.find("best"):
            check_whole(best, int(best.name[-6:]))
        leftovers += len(kept(checkpoints)) > 1 + len({last.name, best.name, f"step-{step - 1:06d}"})
        told = step
    assert leftovers >= 3  # else no kill came while something was half done
    save_all(checkpoints, build(WIDTH), [told + 1], best=told + 1)
    assert kept(checkpoints) == ["index.json", f"step-{told:06d}", f"step-{told + 1:06d}"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"only root can mount a small disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_last_checkpoint_and_the_same_command_goes_on(small_disk):
    """However much is free, a page more or less each time: a save is whole or says what it needs."""
    checkpoints, networks, step = Checkpoints(small_disk / "tiny"), build(100), 1
    save_all(checkpoints, networks, [step], best=step)
    needed = sum(path.stat().st_size for path in checkpoints.find("last").iterdir()) // 4096 + 8
    failures = []
    for pages in range(needed - 16, needed + 8):
        free = os.statvfs(small_disk).f_bavail
        (small_disk / "filler").write_bytes(bytes(4096 * (free - pages)))
        before = kept(checkpoints)
        save(checkpoints, networks, step + 1, best=True)
        try:
            checkpoints.wait()
            step += 1
            failures.append(False)
        except UserError as error:
            failures.append(True)
            text = str(error)
            assert f"of step {step + 1} cannot be written to {checkpoints.folder}: it needs 0.2 MB and 0." in text
            assert f"MB are free. Make room; step-{step:06d} is kept, and the same command goes on from it" in text
            assert kept(checkpoints) == before
        assert kept(checkpoints) == ["index.json", f"step-{step:06d}"]
        check_whole(Checkpoints(checkpoints.folder).find("last"), step)
        (small_disk / "filler").unlink()
    assert failures[0] and not failures[-1] and failures == sorted(failures, reverse=True)
    save_all(checkpoints, networks, [step + 1], best=step + 1)
    check_whole(checkpoints.find("last"), step + 1)


def worker(rank: int, folder: Path, answers) -> None:
    """One of two: says what each call raised, and what it finds."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    good, bad = Checkpoints(folder / "tiny"), Checkpoints(folder / "meet" / "tiny")
    networks, said = fill(build(), 1), []
    for checkpoints, call in ((good, "wait"), (bad, "wait"), (bad, "save"), (good, "wait")):
        save(checkpoints, networks, len(said) + 1)
        try:
            checkpoints.wait() if call == "wait" else save(checkpoints, networks, 9)
            said.append(checkpoints.find("last").name)
        except UserError as error:
            said.append(str(error))
    answers.put((rank, said))


def test_what_goes_wrong_on_rank_0_is_raised_on_all_and_what_is_saved_is_seen_by_all(tmp_path):
    answers = FORK.Queue()
    workers = [FORK.Process(target=worker, args=(rank, tmp_path, answers)) for rank in range(2)]
    for process in workers:
        process.start()
    said = dict(answers.get(timeout=60) for _ in workers)
    for process in workers:
        process.join()
        assert process.exitcode == 0
    assert said[1] == [text if text.startswith("step-") else f"{text} (on worker 0)" for text in said[0]]
    first, *failed, last = said[0]
    assert (first, last) == ("step-000001", "step-000004")
    for step, text in zip((2, 3), failed, strict=True):
        assert text.startswith(f"the checkpoint of step {step} cannot be written to {tmp_path}/meet/tiny")
