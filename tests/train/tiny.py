"""Networks whose whole state is one number, saved and checked without any training."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from raymed.tasks.task import Ema, Network, Optim, Phase, Task
from raymed.train.checkpoints.checkpoint import Checkpoints, Progress, resume, resume_optimizers
from raymed.train.compute import Compute
from raymed.train.nets import Networks

FILES = ["average.safetensors", "memory.safetensors", "optimizer.safetensors", "weights.safetensors"]


@dataclass
class Tiny(Task):
    """One network with an optimiser and an average, one without, and a memory."""

    width: int = 8

    def networks(self):
        trained = Network(nn.Linear(self.width, self.width), Optim("adamw"), Ema(0.9))
        return {"net": trained, "fixed": Network(nn.Linear(3, 1))}

    def memory(self):
        return {"queue": torch.zeros(5)}


def build(width: int = 8) -> Networks:
    """Fresh networks with their engines."""
    networks = Networks(Phase("tiny", Tiny(width), 1000, 1), 0, Compute(channels_last=False))
    networks.build_engines(1000)
    return networks


@torch.no_grad()
def fill(networks: Networks, value: int) -> Networks:
    """Weights, averages, optimiser states and memory all become `value`."""
    for name in networks.networks:
        for parameter in networks.module(name).parameters():
            parameter.fill_(value)
    whole = {name: torch.full(p.shape, float(value)) for name, p in networks.module("net").named_parameters()}
    step = {"step": torch.tensor(float(value))}
    networks.engines["net"].load_optimizer_state({n: {"exp_avg": t, "exp_avg_sq": t} | step for n, t in whole.items()})
    networks.averages["net"].load(whole, value)
    networks.memory["queue"] = torch.full((5,), float(value))
    return networks


def save(checkpoints: Checkpoints, networks: Networks, step: int, best: bool = False) -> None:
    """Begin to save the state that is `step`."""
    checkpoints.save(fill(networks, step), Progress("tiny", step, best=float(step)), best)


def save_all(checkpoints: Checkpoints, networks: Networks, steps: list[int], best: int) -> None:
    """Save these steps one after the other."""
    for step in steps:
        save(checkpoints, networks, step, step == best)
    checkpoints.wait()


def check_whole(folder: Path, step: int) -> None:
    """Every number of every file is `step`, and so is what is resumed from it."""
    assert sorted(path.name for path in folder.iterdir()) == [*FILES[:3], "state.json", FILES[3]]
    for file in FILES:
        tensors = load_file(folder / file)
        assert tensors and all(torch.equal(t, torch.full_like(t, step)) for t in tensors.values()), (file, step)
    networks = Networks(Phase("tiny", Tiny(tensors["net.bias"].numel()), 1000, 1), 0, Compute(channels_last=False))
    progress = resume(networks, folder, "tiny")
    networks.build_engines(1000)
    resume_optimizers(networks, folder, progress)
    assert progress == Progress("tiny", step, best=float(step), ema_updates={"net": step})
    state = networks.engines["net"].optimizer_state()
    assert set(state) == {"weight", "bias"} and all(torch.all(v == step) for s in state.values() for v in s.values())
    assert torch.all(networks.memory["queue"] == step) and networks.averages["net"].updates == step
    assert all(torch.all(v == step) for averaged in (False, True) for v in networks.weights(averaged).values())


def kept(checkpoints: Checkpoints) -> list[str]:
    """Names in the folder."""
    return sorted(path.name for path in checkpoints.folder.iterdir())
