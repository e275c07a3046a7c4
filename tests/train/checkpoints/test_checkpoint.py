"""Checkpoints: whole or not there, checked when read, optimiser state by name, and how long they are kept."""

import json
import shutil
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillWaiting

import pytest
import torch
from filelock import FileLock
from small import make_fit, recipe
from tiny import FILES, build, check_whole, fill, kept, save, save_all

from raymed.config import UserError
from raymed.train.checkpoints.checkpoint import Checkpoints, Progress, load_weights, resume, resume_optimizers
from raymed.train.checkpoints.files import read_state
from raymed.train.checkpoints.index import Index
from raymed.train.compute import Compute
from raymed.train.nets import Networks


@pytest.fixture
def begun(manifest, data, tmp_path):
    """A fit stopped after eight of the twelve steps of its first phase."""
    fit = make_fit(recipe(manifest), tmp_path, data=data)
    run = fit.run()
    next(run), next(run)
    run.close()
    return fit


def test_reading_takes_no_memory_for_the_files(tmp_path):
    checkpoints = Checkpoints(tmp_path / "tiny")
    save_all(checkpoints, build(500), [1], best=1)
    folder = checkpoints.find("last")
    size = (folder / "weights.safetensors").stat().st_size
    tracemalloc.start()
    try:
        weights = load_weights(folder, averaged=False)
        assert tracemalloc.get_traced_memory()[1] < size / 2 and size > 1e6
    finally:
        tracemalloc.stop()
    assert weights["net.weight"].eq(1).all()


def test_what_is_in_it(begun):
    folder = begun.checkpoints("supcon").find("last")
    state = json.loads((folder / "state.json").read_text())
    assert (state["phase"], state["step"], state["evaluation"], state["finished"]) == ("supcon", 8, 2, False)
    assert state["ema_updates"] == {"contrastive": 8}
    assert sorted(p.name for p in folder.iterdir()) == [
        "average.safetensors", "optimizer.safetensors", "state.json", "weights.safetensors",
    ]  # fmt: skip


def test_optimiser_state_is_kept_by_name_and_comes_back(begun):
    phase = begun.phases[0]
    folder = begun.checkpoints("supcon").find("last")
    from safetensors.torch import load_file

    tensors = load_file(folder / "optimizer.safetensors")
    networks = Networks(phase, 99, Compute())
    progress = resume(networks, folder, "supcon")
    networks.build_engines(phase.steps)
    assert networks.engines["contrastive"].optimizer_state() == {}
    resume_optimizers(networks, folder, progress)
    state = networks.engines["contrastive"].optimizer_state()
    names = {name for name, _ in networks.module("contrastive").named_parameters()}
    assert set(state) == names and {name.split("/")[0] for name in tensors} == {f"contrastive.{n}" for n in names}
    for name in names:
        assert set(state[name]) == {"exp_avg", "exp_avg_sq", "step"} and state[name]["step"] == 8
        for key, value in state[name].items():
            assert torch.equal(value, tensors[f"contrastive.{name}/{key}"])
    assert networks.averages["contrastive"].updates == 8
    averages = load_weights(folder)
    for name, shadow in networks.averages["contrastive"].shadow.items():
        assert torch.equal(shadow, averages[f"contrastive.{name}"])


@pytest.mark.parametrize("file", ["weights", "average", "optimizer"])
def test_a_flipped_byte_is_found(begun, file):
    path = begun.checkpoints("supcon").find("last") / f"{file}.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 64
    path.write_bytes(raw)
    with pytest.raises(UserError, match=f"{file}.safetensors is damaged: .* Remove that checkpoint"):
        list(begun.run())


def test_a_half_written_folder_is_ignored_and_removed(begun):
    checkpoints = begun.checkpoints("supcon")
    half = checkpoints.folder / ".step-000012-1"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    unlisted = checkpoints.folder / "step-000011"
    unlisted.mkdir()
    assert checkpoints.find("last").name == "step-000008"
    list(begun.run())
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["index.json", "step-000012"]


def test_nothing_there():
    from pathlib import Path

    assert Checkpoints(Path("/nowhere")).find("best") is None
    with pytest.raises(UserError, match="/nowhere is not a checkpoint: it has no state.json"):
        load_weights(Path("/nowhere"))


def test_of_another_phase(begun):
    folder = begun.checkpoints("supcon").find("last")
    with pytest.raises(UserError, match="is a checkpoint of phase 'supcon', not of 'head'"):
        resume(Networks(begun.phases[0], 1, Compute()), folder, "head")


def test_progress_survives_json(begun):
    progress = Progress("p", 3, 1, best=0.1 + 0.2, stale=2, ema_updates={"a": 3})
    networks = Networks(begun.phases[0], 1, Compute())
    networks.build_engines(1)
    checkpoints = Checkpoints(begun.folder / "other")
    checkpoints.save(networks, progress, best=True)
    checkpoints.wait()
    assert resume(networks, checkpoints.find("best"), "p") == progress


def test_everything_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path / "tiny")
    save_all(checkpoints, build(), [3], best=3)
    check_whole(checkpoints.find("last"), 3)


def test_a_save_copies_the_state_and_lets_training_go_on(tmp_path):
    """While the files cannot be written yet, save has returned, the weights move on, and nothing is found."""
    checkpoints, networks = Checkpoints(tmp_path / "tiny"), build()
    save_all(checkpoints, networks, [1], best=1)
    with FileLock(tmp_path / ".tiny.lock"):
        save(checkpoints, networks, 2)
        fill(networks, 77)
        assert checkpoints.find("last").name == "step-000001" and kept(checkpoints) == ["index.json", "step-000001"]
    checkpoints.wait()
    check_whole(checkpoints.find("last"), 2)


def test_one_save_is_in_flight_at_most(tmp_path):
    checkpoints, networks = Checkpoints(tmp_path / "tiny"), build()
    with ThreadPoolExecutor() as other, FileLock(tmp_path / ".tiny.lock"):
        save(checkpoints, networks, 1)
        second = other.submit(save, checkpoints, networks, 2)
        with pytest.raises(StillWaiting):
            second.result(timeout=0.3)
        assert [t.name for t in threading.enumerate() if t.name.startswith("checkpoint")] == ["checkpoint_0"]
    second.result()
    checkpoints.wait()
    check_whole(checkpoints.find("last"), 2)
    check_whole(checkpoints.find("best"), 1)


def test_what_went_wrong_is_said_by_the_next_call_and_said_once(tmp_path):
    (tmp_path / "file").touch()
    checkpoints, networks = Checkpoints(tmp_path / "file" / "tiny"), build()
    message = "checkpoint of step 4 cannot be written to .*/file/tiny: Not a directory.* there is none yet"
    for call in (checkpoints.wait, checkpoints.close, lambda: save(checkpoints, networks, 5)):
        save(checkpoints, networks, 4)
        with pytest.raises(UserError, match=message):
            call()
        checkpoints.close()


@pytest.mark.parametrize("keep_last", [1, 3])
def test_the_best_the_last_and_the_pinned_ones_are_kept(tmp_path, keep_last):
    checkpoints, networks = Checkpoints(tmp_path / "tiny", keep_last), build()
    save_all(checkpoints, networks, [1, 2, 3], best=2)
    assert checkpoints.pin("last", "registered as net 1") == checkpoints.folder / "step-000003"
    save_all(checkpoints, networks, [4, 5, 6, 7, 8], best=0)
    recent = [f"step-{step:06d}" for step in range(9 - keep_last, 9)]
    assert kept(checkpoints) == ["index.json", "step-000002", "step-000003", *recent]
    assert json.loads(checkpoints.index.read_text())["pinned"] == {"step-000003": "registered as net 1"}
    assert checkpoints.find("step-000003").name == "step-000003" and checkpoints.find("step-000004") is None
    check_whole(checkpoints.find("best"), 2)
    with pytest.raises(UserError, match="has no checkpoint 'step-000004'"):
        checkpoints.pin("step-000004", "gone")


def test_the_same_step_again_does_not_touch_what_counts(tmp_path):
    checkpoints, networks = Checkpoints(tmp_path / "tiny"), build()
    save_all(checkpoints, networks, [1, 1], best=1)
    assert kept(checkpoints) == ["index.json", "step-000001-2"]
    check_whole(checkpoints.find("last"), 1)


def test_a_removed_checkpoint_leaves_the_one_before(tmp_path):
    checkpoints, networks = Checkpoints(tmp_path / "tiny", keep_last=2), build()
    save_all(checkpoints, networks, [1, 2, 3, 4], best=2)
    shutil.rmtree(checkpoints.find("last"))
    check_whole(checkpoints.find("last"), 3)
    shutil.rmtree(checkpoints.find("best"))  # whoever went on from 3 would never have a best one again
    assert checkpoints.find("last") is None and checkpoints.find("best") is None
    save_all(checkpoints, networks, [2], best=0)
    assert kept(checkpoints) == ["index.json", "step-000002"] and checkpoints.find("best").name == "step-000002"


def test_after_a_lost_best_one_only_those_before_it_are_of_use():
    pinned = {"step-2": "a", "step-8": "b"}
    index = Index("step-9", "step-6", ["step-5", "step-9"], pinned)
    whole = index.names()
    assert index.within(whole) == index
    assert index.within(whole - {"step-6"}) == Index("step-5", None, ["step-5"], pinned)
    assert index.within(whole - {"step-6", "step-5"}).last == "step-2"
    assert index.within(set()) == Index()


@pytest.mark.parametrize("file", FILES)
def test_a_byte_flipped_or_lost_in_any_file_is_found(tmp_path, file):
    checkpoints = Checkpoints(tmp_path / "tiny")
    save_all(checkpoints, build(), [3], best=3)
    path = checkpoints.find("last") / file
    whole = path.read_bytes()
    advice = "Remove that checkpoint, the folder .*/step-000003: the run goes on from the one before"
    for position in (0, 9, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        for content, how in ((flipped, "its sha256 is not"), (whole[:position], f"{len(whole)} were written")):
            path.write_bytes(content)
            with pytest.raises(UserError, match=f"/{file} is damaged: .*{how}.*{advice}"):
                check_all_read(checkpoints)
    path.unlink()
    with pytest.raises(UserError, match=f"/{file} is damaged: it is missing"):
        check_all_read(checkpoints)


def check_all_read(checkpoints: Checkpoints) -> None:
    folder, networks = checkpoints.find("last"), build()
    resume_optimizers(networks, folder, resume(networks, folder, "tiny"))


def test_a_byte_flipped_in_what_says_what_there_is_is_found(tmp_path):
    """Each byte of state.json and index.json."""
    checkpoints = Checkpoints(tmp_path / "tiny")
    save_all(checkpoints, build(), [3], best=3)
    folder = checkpoints.find("last")
    reads = {folder / "state.json": lambda: read_state(folder), checkpoints.index: lambda: checkpoints.find("last")}
    for path, read in reads.items():
        whole = path.read_bytes()
        for position in range(len(whole)):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 8]) + whole[position + 1 :])
            with pytest.raises(UserError, match=f"{path} is damaged.* Remove"):
                read()
        path.write_bytes(whole)


def test_the_state_of_something_else_is_refused(tmp_path):
    from raymed.train.checkpoints.files import sealed

    checkpoints = Checkpoints(tmp_path / "tiny")
    save_all(checkpoints, build(), [3], best=3)
    (checkpoints.find("last") / "state.json").write_text(sealed({"phase": "tiny", "step": 3}))
    with pytest.raises(UserError, match="state.json is damaged: it does not say how far .* Remove that checkpoint"):
        resume(build(), checkpoints.find("last"), "tiny")


def test_of_another_model(tmp_path):
    checkpoints = Checkpoints(tmp_path / "tiny")
    save_all(checkpoints, build(width=9), [3], best=3)
    wide = r"net.bias has shape \(9,\), wanted \(8,\); net.weight has shape \(9, 9\), wanted \(8, 8\)"
    with pytest.raises(UserError, match=f"of another model: {wide}"):
        resume(build(), checkpoints.find("last"), "tiny")


def test_files_can_be_read_by_whom_the_folder_lets(tmp_path):
    checkpoints = Checkpoints(tmp_path / "tiny")
    save_all(checkpoints, build(), [3], best=3)
    folder = checkpoints.find("last")
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {folder.stat().st_mode & 0o666}
