"""Checkpoints in a bucket of a real S3 server: in order, whole, kept alike, and patient with a server that is down."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import FILES, build, check_whole, fill, kept, save, save_all

from raymed.config import UserError
from raymed.storage import s3 as objects
from raymed.storage import working_copy
from raymed.train.checkpoints.checkpoint import Checkpoints, origin_of
from raymed.train.checkpoints.index import Index

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def machine(s3, tmp_path, monkeypatch):
    """machine(name) -> the checkpoints as another machine sees them, with nothing of its own at first."""

    def go(name: str, **more) -> Checkpoints:
        monkeypatch.setenv("RAYMED_LOCAL", str(tmp_path / name))
        checkpoints = Checkpoints(working_copy(s3.url) / "checkpoints" / "tiny", **more)
        checkpoints.pull()
        return checkpoints

    return go


def there(s3) -> list[str]:
    """Folders and files that the bucket has."""
    return sorted({key.removeprefix("checkpoints/tiny/").split("/")[0] for key in s3.keys()})


def test_the_bucket_has_what_is_kept_and_another_machine_goes_on_from_it(s3, machine):
    checkpoints = machine("a")
    assert checkpoints.find("last") is None and s3.keys() == []
    save_all(checkpoints, build(), [1, 2, 3], best=1)
    assert there(s3) == kept(checkpoints) == ["index.json", "step-000001", "step-000003"]
    assert len(s3.keys()) == 1 + 2 * (len(FILES) + 1)
    other = machine("b")
    check_whole(other.find("best"), 1)
    check_whole(other.find("last"), 3)
    save_all(other, build(), [4], best=4)
    assert there(s3) == kept(other) == ["index.json", "step-000004"]
    again = machine("a")  # which has 1 and 3: what came further counts
    check_whole(again.find("best"), 4)
    assert kept(again) == ["index.json", "step-000004"]


def test_a_pin_made_on_another_machine_while_a_run_saves_is_kept(s3, machine):
    running = machine("a")
    save_all(running, build(), [1], best=1)
    pinned = machine("b").pin("best", "registered as net 1")
    assert pinned.name == "step-000001"
    save_all(running, build(), [2, 3], best=3)
    assert there(s3) == ["index.json", "step-000001", "step-000003"]
    assert json.loads(s3.get("checkpoints/tiny/index.json"))["pinned"] == {"step-000001": "registered as net 1"}
    check_whole(machine("c").find("step-000001"), 1)


def test_two_processes_that_save_to_one_place(s3, machine, monkeypatch):
    """Whoever has come less far is told, and takes nothing away; a pin that comes meanwhile is kept."""
    one = machine("a")
    save_all(one, build(), [1], best=1)
    other = machine("b")
    save_all(one, build(), [3], best=3)
    save(other, build(), 2, best=True)
    with pytest.raises(UserError, match=f"another process writes to {other.bucket.url}: it has come to step-000003"):
        other.wait()
    assert there(s3) == ["index.json", "step-000003"]

    put_if, pinned = objects.put_if, []

    def put_late(url, data, etag):
        if not pinned:
            pinned.append("step-000003")
            late = Index.parse(s3.get("checkpoints/tiny/index.json"))
            s3.put("checkpoints/tiny/index.json", replace(late, pinned={pinned[0]: "good"}).text().encode())
        return put_if(url, data, etag)

    monkeypatch.setattr(objects, "put_if", put_late)
    save_all(one, build(), [4], best=4)
    assert json.loads(s3.get("checkpoints/tiny/index.json"))["pinned"] == {"step-000003": "good"}
    assert there(s3) == ["index.json", "step-000003", "step-000004"]


def test_what_is_not_whole_there_is_not_taken(s3, machine):
    save_all(machine("a"), build(), [1], best=1)
    name = "checkpoints/tiny/step-000001/weights.safetensors"
    s3.put(name, s3.get(name)[:-1])
    with pytest.raises(UserError, match=f"{s3.url}/{name} is damaged: it has [0-9]+ bytes, and [0-9]+ were written"):
        machine("b")
    assert not list((working_copy(s3.url) / "checkpoints" / "tiny").glob("*step*"))


def test_an_encoder_that_was_trained_further_elsewhere(s3, machine, monkeypatch, tmp_path):
    origin = f"{s3.url}/checkpoints/tiny"
    running = machine("a")
    save_all(running, build(), [1], best=1)
    monkeypatch.setenv("RAYMED_LOCAL", str(tmp_path / "b"))
    check_whole(origin_of(origin), 1)
    monkeypatch.setenv("RAYMED_LOCAL", str(tmp_path / "a"))
    save_all(running, build(), [2], best=2)
    monkeypatch.setenv("RAYMED_LOCAL", str(tmp_path / "b"))
    check_whole(origin_of(origin), 2)
    other = Checkpoints(working_copy(origin))
    assert kept(other) == ["index.json", "step-000002"]
    fresh = build()
    monkeypatch.setattr(other, "bucket", None)
    save_all(other, fresh, [3], best=3)  # it has not come to the bucket
    check_whole(origin_of(origin), 3)
    assert there(s3) == ["index.json", "step-000002"]


def two_nodes(rank: int, folder: Path, url: str, answers) -> None:
    """The second of two has a checkpoint that neither the bucket nor the first has."""
    os.environ["RAYMED_LOCAL"] = str(folder / str(rank))
    os.environ["LOCAL_RANK"] = str(rank)  # Ray Train counts by address, and several nodes may be at one
    in_bucket = Checkpoints(working_copy(url) / "checkpoints" / "tiny")
    on_disk = Checkpoints(folder / str(rank) / "disk")
    if rank == 1:
        save_all(on_disk, build(), [5], best=5)
        shutil.copytree(on_disk.folder, in_bucket.folder)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    in_bucket.pull()
    found = [in_bucket.find("last"), [path.name for path in in_bucket.folder.iterdir()]]
    with pytest.raises(UserError) as info:
        on_disk.pull()
    answers.put((rank, [*found, str(info.value)]))


def test_all_nodes_go_on_from_the_same_one(s3, tmp_path):
    answers = FORK.Queue()
    workers = [FORK.Process(target=two_nodes, args=(rank, tmp_path, s3.url, answers)) for rank in range(2)]
    for process in workers:
        process.start()
    said = dict(answers.get(timeout=60) for _ in workers)
    for process in workers:
        process.join()
        assert process.exitcode == 0
    assert said[0][:2] == [None, []] and said[1][:2] == [None, ["index.json"]]
    for rank, found in said.items():
        text = f"the workers do not find the same last checkpoint in {tmp_path}/{rank}/disk, but none and step-000005"
        assert found[2].startswith(text)


def test_what_no_index_names_is_not_taken_and_is_removed(s3, machine):
    """The order of an upload: files, their state, the index. Here: an upload that ended before its index."""
    checkpoints = machine("a")
    save_all(checkpoints, build(), [1], best=1)
    for file in (*FILES, "state.json"):
        s3.put(f"checkpoints/tiny/step-000002/{file}", (checkpoints.find("last") / file).read_bytes())
    other = machine("b")
    assert kept(other) == ["index.json", "step-000001"]
    save_all(other, build(), [3], best=3)
    assert there(s3) == ["index.json", "step-000003"]


def test_a_damaged_file_there_is_found_and_removing_it_on_both_sides_goes_on_from_the_one_before(s3, machine):
    checkpoints = machine("a", keep_last=2)
    save_all(checkpoints, build(), [1, 2], best=1)
    name = "checkpoints/tiny/step-000002"
    s3.put(f"{name}/weights.safetensors", s3.get(f"{name}/weights.safetensors")[:-1] + b"?")
    other = machine("b", keep_last=2)
    with pytest.raises(UserError, match=f"weights.safetensors is damaged.*fetched from {s3.url}/{name} again"):
        check_whole_or_raise(other)
    for key in s3.keys():
        if key.startswith(f"{name}/"):
            s3.client.delete_object(Bucket=s3.bucket, Key=f"{s3.prefix}/{key}")
    shutil.rmtree(other.find("last"))
    check_whole(machine("b").find("last"), 1)
    s3.put("checkpoints/tiny/index.json", b"{}")
    with pytest.raises(UserError, match=f"{s3.url}/checkpoints/tiny/index.json is damaged. Remove it"):
        machine("c")


def check_whole_or_raise(checkpoints: Checkpoints) -> None:
    from raymed.train.checkpoints.checkpoint import resume

    resume(build(), checkpoints.find("last"), "tiny")


def save_for_ever(folder: Path, saved) -> None:
    """Save and tell until somebody ends it."""
    checkpoints, networks = Checkpoints(folder), build(300)
    checkpoints.pull()
    last = checkpoints.find("last")
    for step in range(int(last.name[-6:]) + 1 if last else 1, 1000):
        save(checkpoints, networks, step, best=True)
        checkpoints.wait()
        saved.send(step)


def test_killed_at_any_moment_of_an_upload_another_machine_finds_a_whole_one(s3, machine):
    draw, told, halves = random.Random(9), 0, 0
    for turn in range(6):
        folder = machine(f"killed-{turn % 2}").folder
        reader, writer = FORK.Pipe(duplex=False)
        child = FORK.Process(target=save_for_ever, args=(folder, writer))
        child.start()
        told, arrived, deadline = reader.recv(), draw.randint(1, len(FILES) + 1), time.monotonic() + 60
        while files_of(s3, told + 1) < arrived and time.monotonic() < deadline:
            told = reader.recv() if reader.poll() else told
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        while reader.poll():
            told = reader.recv()
        found = machine(f"fresh-{turn}").find("last")
        assert int(found.name[-6:]) in (told, told + 1)
        check_whole(found, int(found.name[-6:]))
        halves += 0 < files_of(s3, told + 1) <= len(FILES)
    assert halves >= 1  # else every kill came between two uploads


def files_of(s3, step: int) -> int:
    return sum(f"/step-{step:06d}/" in key for key in s3.keys())


def test_training_goes_on_while_the_server_is_stopped(s3, machine):
    """A frozen server takes connections and answers nothing: save returns, the next one waits for it."""
    checkpoints, networks = machine("a"), build()
    save_all(checkpoints, networks, [1], best=1)
    s3.pause()
    try:
        save(checkpoints, networks, 2)
        fill(networks, 77)
        with ThreadPoolExecutor() as other:
            third = other.submit(save, checkpoints, networks, 3)
            s3.resume()
            third.result()
    finally:
        s3.resume()
    checkpoints.wait()
    check_whole(machine("b").find("last"), 3)
    check_whole(machine("b").find("best"), 1)


def test_a_server_killed_during_an_upload_is_waited_for(s3, machine):
    checkpoints, networks = machine("a"), build(width=1000)
    save(checkpoints, networks, 1, best=True)
    checkpoints.wait()
    save(checkpoints, networks, 2)
    deadline = time.monotonic() + 60
    while not (arrived := [key for key in s3.keys() if "step-000002" in key]):
        assert time.monotonic() < deadline
    s3.kill()
    assert "checkpoints/tiny/step-000002/state.json" not in arrived and checkpoints.find("last").name == "step-000002"
    fill(networks, 77)  # training goes on
    s3.restart()
    checkpoints.wait()
    other = machine("b")
    check_whole(other.find("last"), 2)
    check_whole(other.find("best"), 1)


def test_a_server_that_stays_down_leaves_the_checkpoint_here_and_the_same_command_brings_it_there(
    s3, machine, monkeypatch
):
    checkpoints = machine("a")
    save_all(checkpoints, build(), [1], best=1)
    monkeypatch.setenv("RAYMED_S3_PATIENCE", "0.5")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port()}")
    save(checkpoints, build(), 2, best=True)
    message = f"S3 does not answer.*is kept in {checkpoints.folder}/step-000002: the same command goes on from it"
    with pytest.raises(UserError, match=message):
        checkpoints.wait()
    check_whole(checkpoints.find("last"), 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    assert machine("a").find("last").name == "step-000002"
    assert there(s3) == ["index.json", "step-000002"]
    check_whole(machine("b").find("best"), 2)


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
