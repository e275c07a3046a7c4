"""The running average of a network's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from raymed.tasks.task import Ema


class Average:
    """Shadow of a module's parameters, updated once an optimiser step; buffers are taken as they are.

    shadow <- d * shadow + (1 - d) * parameter, d = min(decay, (1 + t) / (10 + t)) at update t (from 0).

    An engine makes it (`Engine.average`). Where parameters are kept in shards, so are their averages: whole ones are
    what `Engine.full_state` says within `swapped_in`.
    """

    def __init__(self, module: nn.Module, ema: Ema):
        self.decay = ema.decay
        self.updates = 0
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters: dict[str, Tensor] = {name: self._held(p) for name, p in trained.items()}
        self.shadow = {name: held.detach().clone() for name, held in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After the optimiser's step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.shadow.values()), list(self.parameters.values()), 1 - decay)
        self.updates += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within: the module holds the averages. Its own weights come back bit for bit."""
        own = {name: held.detach().clone() for name, held in self.parameters.items()}
        self._write(self.shadow)
        try:
            yield
        finally:
            self._write(own)

    def load(self, weights: dict[str, Tensor], updates: int) -> None:
        """Continue from whole averages by parameter name after that many updates. Other names are ignored."""
        self.updates = updates
        for name, shadow in self.shadow.items():
            shadow.copy_(self._share(name, weights[name]))

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, held in self.parameters.items():
            held.copy_(values[name])

    def _held(self, parameter: Tensor) -> Tensor:
        """What this process keeps of a parameter."""
        return parameter

    def _share(self, name: str, whole: Tensor) -> Tensor:
        """What this process keeps of a whole average."""
        return whole
