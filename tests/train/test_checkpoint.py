"""Checkpoints: whole or not there, checked when read, optimiser state by name."""

import json

import pytest
import torch
from small import make_fit, recipe

from raymed.config import UserError
from raymed.train.checkpoint import Checkpoints, Progress, load_weights, resume, resume_optimizers
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
    assert resume(networks, checkpoints.find("best"), "p") == progress
