"""The proxies through which a task sees its networks, and where their weights start from."""

import hashlib
import pickle
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raymed.config import UserError
from raymed.models.checkpointing import checkpoint_activations
from raymed.random import derive
from raymed.tasks.task import Memory, Network, Phase, Task, setting_up
from raymed.train.compute import Compute
from raymed.train.engines.ema import Average
from raymed.train.engines.engine import Engine, build_engine, copied_state


class Networks:
    """The networks of one phase: built alike on every worker, moved by engines, seen by the task as `Nets`.

    At rest every network is in eval mode. Only the one in training goes through its engine; the others are called raw
    and frozen, since a loss that reaches two engines, or an engine's parameters past its forward pass, is wrong or an
    error under ZeRO.
    """

    def __init__(self, phase: Phase, seed: int, compute: Compute):
        self.compute = compute
        self.task = phase.task
        with setting_up(phase.task) as task:
            torch.manual_seed(derive(seed, "weights", phase.name))
            self.networks: dict[str, Network] = task.networks()
            torch.manual_seed(derive(seed, "memory", phase.name))
            self.memory = Memory(task.memory(), compute.resolved_device())
        self._containers = _containers(phase.task)
        self.engines: dict[str, Engine] = {}
        self.averages: dict[str, Average] = {}
        self.active: str | None = None
        for network in self.networks.values():
            compute.prepare(network.module).eval()
            if network.optim is None:
                network.module.requires_grad_(False)
        self.modes = {name: _Mode(network.module) for name, network in self.networks.items()}

    def build_engines(self, steps: int) -> None:
        """After the weights are where they start: an engine, and an average where asked, for each trained network."""
        trained = {name: network for name, network in self.networks.items() if network.optim is not None}
        self.compute.warn_where_useless([network.module for network in self.networks.values()])
        for name, network in trained.items():
            if self.compute.activation_checkpointing and not checkpoint_activations(network.module):
                warnings.warn(f"compute.activation_checkpointing has no effect on network {name!r}", stacklevel=2)
            self.engines[name] = build_engine(name, network, steps, self.compute)
            if network.ema is not None:
                self.averages[name] = self.engines[name].average(network.ema)

    def __getitem__(self, name: str) -> Any:
        if name == self.active:
            engine = self.engines[name]
            return engine.raw if name in self.task.double_backward else engine
        return lambda *inputs: self._raw(self.networks[name].module, *inputs)

    def _raw(self, module: nn.Module, *inputs: Tensor) -> Any:
        with self.compute.autocast():
            return module(*inputs)

    def module(self, name: str) -> nn.Module:
        """The raw module."""
        return self.networks[name].module

    @contextmanager
    def training(self, name: str) -> Iterator[None]:
        """Within, this network is in training mode and every other trained one is frozen."""
        if name not in self.engines:
            raise UserError(f"network {name!r} has no optimiser, so nothing can train it")
        others = [p for other in self.engines if other != name for p in self.module(other).parameters()]
        flags = [p.requires_grad for p in others]
        before, self.active = self.active, name
        self.modes[name].set(training=True)
        for p in others:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p, flag in zip(others, flags, strict=True):
                p.requires_grad_(flag)
            self.modes[name].set(training=False)
            self.active = before

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, networks that keep an average of their weights hold it; no gradient is recorded."""
        with ExitStack() as stack, torch.no_grad():
            for average in self.averages.values():
                stack.enter_context(average.swapped_in())
            yield

    def load_part(self, part: str, weights: dict[str, Tensor], source: Path) -> None:
        """Load `part` (a network, or a child of one) from a checkpoint's weights, which are named NETWORK.PARAMETER."""
        target = self._find_part(part)
        found = {
            name.split(f"{part}.", 1)[1]: value
            for name, value in weights.items()
            if name.startswith(f"{part}.") or f".{part}." in name
        }
        problems = _misfits(target.state_dict(), found)
        if problems:
            shown = "; ".join(problems[:3])
            raise UserError(f"{source} does not fit {part}: {shown}. Was it trained with another encoder?")
        target.load_state_dict(found)

    def _find_part(self, part: str) -> nn.Module:
        if part in self.networks:
            return self.module(part)
        for network in self.networks.values():
            if part in dict(network.module.named_children()):
                return getattr(network.module, part)
        raise UserError(f"no network has a part {part!r}; there are {', '.join(self.networks)}")

    def weights(self, averaged: bool) -> dict[str, Tensor]:
        """NETWORK.NAME -> tensor, of all networks, with the averages in place of their weights if asked. On rank 0;
        the others get nothing. Collective as soon as there are engines."""
        with ExitStack() as stack:
            if averaged:
                stack.enter_context(self.averaged())
            states = {network: self._whole_state(network) for network in self.networks}
        return {f"{network}.{name}": tensor for network, state in states.items() for name, tensor in state.items()}

    def _whole_state(self, network: str) -> dict[str, Tensor]:
        engine = self.engines.get(network)
        return engine.full_state() if engine else copied_state(self.module(network))

    def saved_memory(self) -> dict[str, Tensor]:
        """Copies on the CPU of what the task remembers. Warns of what it keeps elsewhere: a list or the like among
        its attributes that has changed in place."""
        changed = [name for name, seen in _containers(self.task).items() if self._containers.get(name) != seen]
        if changed:
            warnings.warn(
                f"{type(self.task).__name__}.{', .'.join(changed)} changed in place while the task trained, and is "
                "lost when the run resumes: what a task remembers belongs in nets.memory",
                stacklevel=2,
            )
        return {name: value.cpu().clone() for name, value in self.memory.items()}

    def load_memory(self, saved: dict[str, Tensor]) -> None:
        """The inverse of `saved_memory`. Raises UserError where names, shapes or dtypes are not those of the task."""
        problems = _misfits(dict(self.memory), saved)
        if problems:
            raise UserError(f"the checkpoint's memory is not this task's: {'; '.join(problems[:3])}")
        for name, value in saved.items():
            self.memory[name] = value

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """The inverse of `weights`."""
        for network in self.networks:
            prefix = f"{network}."
            own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            self.module(network).load_state_dict(own)


class _Mode:
    """A module's training mode. `nn.Module.train` takes a microsecond or more for each layer, and is called twice a
    step: here the flags of the layers are written directly, where no layer does more than that."""

    def __init__(self, module: nn.Module):
        self.module = module
        layers = list(module.modules())
        plain = all(type(layer).train is nn.Module.train for layer in layers)
        self.flags = [vars(layer) for layer in layers] if plain else None

    def set(self, training: bool) -> None:
        """As `module.train(training)`."""
        if self.flags is None:
            self.module.train(training)
            return
        for flags in self.flags:
            flags["training"] = training


def check_network_stages(phases: Iterable[Phase], compute: Compute) -> None:
    """Raise UserError where `compute.network_stages` names a network that none of a recipe's phases has. The networks
    are built to ask for their names, if any is named."""
    named = [entry.partition("=")[0] for entry in compute.network_stages]
    known: set[str] = set()
    for phase in phases if named else ():
        with setting_up(phase.task) as task:
            known |= task.networks().keys()
    for name in named:
        if name not in known:
            raise UserError(
                f"compute.network_stages: there is no network {name!r}; there are {', '.join(sorted(known))}"
            )


def _containers(task: Task) -> dict[str, bytes]:
    """A digest of every attribute of a task that can change in place: containers, arrays and tensors."""
    kinds = (list, dict, set, deque, bytearray, np.ndarray, Tensor)
    held = {name: value for name, value in vars(task).items() if isinstance(value, kinds)}
    return {name: _digest(value) for name, value in held.items()}


def _digest(value: object) -> bytes:
    try:
        data = pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError):  # it holds functions or open files
        data = repr(value).encode()
    return hashlib.sha256(data).digest()


def _misfits(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """What keeps the found weights from being loaded where the wanted ones are."""
    return (
        [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
        + [f"{name} is not expected" for name in sorted(found.keys() - wanted.keys())]
        + [
            f"{name} is {tuple(found[name].shape)}, wanted {tuple(wanted[name].shape)}"
            for name in sorted(wanted.keys() & found.keys())
            if found[name].shape != wanted[name].shape
        ]
    )
