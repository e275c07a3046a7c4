"""A checkpoint that outlives its world size, engine and ZeRO stage.

A folder: `weights.safetensors` (NETWORK.NAME), `average.safetensors` (the same with averages, where kept),
`optimizer.safetensors` (NETWORK.PARAMETER/KEY), and `state.json` (phase, step, best value so far, file hashes). The
state is written last and the folder renamed into place, so a half-written one is never found. Randomness needs no
state: every draw is a function of the step.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from raymed.config import UserError
from raymed.distributed import rank, world_size
from raymed.storage import write_atomic
from raymed.train.engines import OptimizerState
from raymed.train.nets import Networks

_WEIGHTS, _AVERAGE, _OPTIMIZER, _STATE = (
    "weights.safetensors",
    "average.safetensors",
    "optimizer.safetensors",
    "state.json",
)


@dataclass
class Progress:
    """How far a phase has come."""

    phase: str
    step: int = 0
    """Steps done."""
    evaluation: int = 0
    """Evaluations done."""
    best: float | None = None
    stale: int = 0
    """Evaluations since the best one."""
    finished: bool = False
    ema_updates: dict[str, int] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one phase: `last` and `best`, and nothing else is kept."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.index = folder / "index.json"

    def find(self, which: str) -> Path | None:
        """Folder of "last" or "best", or None."""
        names = json.loads(self.index.read_text()) if self.index.is_file() else {}
        return self.folder / names[which] if which in names else None

    def save(self, networks: Networks, progress: Progress, best: bool) -> None:
        """Write a checkpoint and make it the last one, and the best one if it is.

        Collective: rank 0 writes, and all go on when the checkpoint is there.
        """
        states = {name: engine.optimizer_state() for name, engine in networks.engines.items()}
        if rank() == 0:
            self._save(networks, progress, states, best)
        if world_size() > 1:
            torch.distributed.barrier()

    def _save(self, networks: Networks, progress: Progress, states: dict[str, OptimizerState], best: bool) -> None:
        name = f"step-{progress.step:06d}"
        progress.ema_updates = {name: average.updates for name, average in networks.averages.items()}
        temporary = self.folder / f".{name}-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files = {_WEIGHTS: networks.weights(averaged=False), _OPTIMIZER: _flatten(states)}
        if networks.averages:
            files[_AVERAGE] = networks.weights(averaged=True)
        hashes = {file: _write(temporary / file, tensors) for file, tensors in files.items()}
        write_atomic(temporary / _STATE, json.dumps(asdict(progress) | {"sha256": hashes}, indent=2) + "\n")
        shutil.rmtree(self.folder / name, ignore_errors=True)
        os.replace(temporary, self.folder / name)
        self._point_to(name, best or self.find("best") is None)

    def _point_to(self, name: str, best: bool) -> None:
        names = json.loads(self.index.read_text()) if self.index.is_file() else {}
        names |= {"last": name} | ({"best": name} if best else {})
        write_atomic(self.index, json.dumps(names) + "\n")
        for folder in self.folder.glob("*step-*"):
            if folder.name not in names.values():
                shutil.rmtree(folder, ignore_errors=True)


def load_weights(folder: Path, averaged: bool = True) -> dict[str, Tensor]:
    """NETWORK.NAME -> tensor of a checkpoint; the averages where it has them, unless told otherwise."""
    state = _state(folder)
    file = _AVERAGE if averaged and _AVERAGE in state["sha256"] else _WEIGHTS
    return _read(folder, file, state)


def resume(networks: Networks, folder: Path, phase: str) -> Progress:
    """Put weights and averages where the checkpoint left them and return how far it had come.

    Engines are built between this and `resume_optimizers`: they copy the weights they find.
    """
    state = _state(folder)
    if state["phase"] != phase:
        raise UserError(f"{folder} is a checkpoint of phase {state['phase']!r}, not of {phase!r}")
    networks.load_weights(_read(folder, _WEIGHTS, state))
    return Progress(**{name: value for name, value in state.items() if name != "sha256"})


def resume_optimizers(networks: Networks, folder: Path, progress: Progress) -> None:
    """Put optimiser states and averages where the checkpoint left them. Collective."""
    state = _state(folder)
    tensors = _read(folder, _OPTIMIZER, state)
    for name, engine in networks.engines.items():
        engine.load_optimizer_state(_unflatten(tensors, name))
    shadows = _read(folder, _AVERAGE, state) if networks.averages else {}
    for name, average in networks.averages.items():
        average.updates = progress.ema_updates[name]
        for parameter, shadow in average.shadow.items():
            shadow.copy_(shadows[f"{name}.{parameter}"])


def _flatten(states: dict[str, OptimizerState]) -> dict[str, Tensor]:
    return {
        f"{network}.{parameter}/{key}": value.contiguous()
        for network, state in states.items()
        for parameter, values in state.items()
        for key, value in values.items()
    }


def _unflatten(tensors: dict[str, Tensor], network: str) -> OptimizerState:
    state: OptimizerState = {}
    for name, value in tensors.items():
        if name.startswith(f"{network}."):
            parameter, key = name.removeprefix(f"{network}.").rsplit("/", 1)
            state.setdefault(parameter, {})[key] = value
    return state


def _write(path: Path, tensors: dict[str, Tensor]) -> str:
    from safetensors.torch import save

    data = save(tensors)
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def _state(folder: Path) -> dict:
    if not (folder / _STATE).is_file():
        raise UserError(f"{folder} is not a checkpoint: it has no {_STATE}")
    return json.loads((folder / _STATE).read_text())


def _read(folder: Path, file: str, state: dict) -> dict[str, Tensor]:
    from safetensors.torch import load

    data = (folder / file).read_bytes()
    if hashlib.sha256(data).hexdigest() != state["sha256"][file]:
        raise UserError(f"{folder / file} is damaged: its sha256 is not the one in {_STATE}. Remove that checkpoint")
    return load(data)
