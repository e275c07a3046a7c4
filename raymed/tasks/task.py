"""What is learned, and nothing about where: the vocabulary that tasks are written in and the training loop reads.

A `Task` names its networks and yields losses. The loop (`raymed.train`) turns every yielded loss into a backward pass,
and a step, on that network's engine; it knows nothing else about the task. A recipe is a tuple of `Phase`s.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from raymed.bundle import Bundle
from raymed.config import UserError, check_choice, check_range
from raymed.data.dataset import Batch
from raymed.metrics.meters import Meter
from raymed.random import derive, seed_layers


@dataclass(frozen=True)
class Optim:
    """How a network's weights move. Parameters with fewer than two axes (biases, norms) are not decayed."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    momentum: float = 0.9
    """AdamW's first beta, or SGD's Nesterov momentum."""
    beta2: float = 0.999
    """AdamW's second beta."""
    eps: float = 1e-8
    """AdamW's."""
    schedule: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    """one_cycle: up by a cosine and down to nothing, momentum moving against it; cosine: linear warm-up, then down to
    zero; constant: linear warm-up, then level."""
    warmup: float = 0.25
    """Fraction of the steps in which the learning rate rises."""
    clip: float | None = 1.0
    """Largest norm of the gradient of all parameters together; None = off."""

    def __post_init__(self) -> None:
        check_choice("optim.name", self.name, ("adamw", "sgd"))
        check_choice("optim.schedule", self.schedule, ("one_cycle", "cosine", "constant"))
        check_range("optim.lr", self.lr, 0)
        check_range("optim.weight_decay", self.weight_decay, 0)
        check_range("optim.momentum", self.momentum, 0, 1, high_open=True)
        check_range("optim.beta2", self.beta2, 0, 1, high_open=True)
        check_range("optim.eps", self.eps, 0, low_open=True)
        check_range("optim.warmup", self.warmup, 0, 1, high_open=True)
        if self.clip is not None:
            check_range("optim.clip", self.clip, 0, low_open=True)


@dataclass(frozen=True)
class Ema:
    """Exponential moving average of a network's weights, used for evaluation and for what leaves training.

    The decay at update t is min(decay, (1 + t) / (10 + t)), so that short runs are not held by their first weights.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        check_range("ema.decay", self.decay, 0, 1, high_open=True)


@dataclass(frozen=True)
class Network:
    """Something with weights. Without `optim` it is not trained: kept in eval mode, frozen, replicated, no engine."""

    module: nn.Module
    optim: Optim | None = None
    ema: Ema | None = None
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    """Parameter -> factor of its learning rate, where it is not 1."""


@dataclass
class Loss:
    """One backward pass. It trains exactly one network; parts that share a loss belong to one module."""

    trains: str
    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Logged; summed over a step's micro-batches and averaged over the workers. "loss" is what curves show."""
    step: bool = True
    """False: only accumulate the gradient."""


@dataclass(frozen=True)
class Step:
    """One training step of a phase, as one worker sees it: its share of every micro-batch."""

    number: int
    seed: int
    rank: int
    micro: tuple[Batch, ...]

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """(k, micro-batch k), with torch's generator seeded for k: stochastic layers repeat when it is asked again."""
        for k, batch in enumerate(self.micro):
            seed_layers(derive(self.seed, "layers", self.number, k, self.rank))
            yield k, batch


class Memory(Mapping[str, Tensor]):
    """What a task remembers between steps: tensors by name, read and written in place or by item assignment.

    Names, shapes and dtypes are those of `Task.memory()` and stay; a value of another kind raises UserError. What is
    read shares its numbers with the memory but no graph: a gradient never reaches back over a step.
    """

    def __init__(self, start: Mapping[str, Tensor], device: torch.device):
        self._held = {
            name: value.detach().to(device).clone(memory_format=torch.contiguous_format)
            for name, value in start.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._held[name].detach()

    def __setitem__(self, name: str, value: Tensor) -> None:
        if name not in self._held:
            raise UserError(f"nets.memory has no {name!r}: Task.memory() names {', '.join(self._held) or 'nothing'}")
        held = self._held[name]
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (held.shape, held.dtype):
            raise UserError(f"nets.memory[{name!r}] is {_kind(held)} and stays so, got {_kind(value)}")
        held.copy_(value.detach())

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def _kind(value: object) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)


class Nets(Protocol):
    """The loop's proxies for a task's networks."""

    @property
    def memory(self) -> Memory:
        """What `Task.memory` began, on the device, as the steps so far have left it."""
        ...

    def __getitem__(self, name: str) -> Any:
        """The network as a function: through its engine while it trains (raw if it is one of `Task.double_backward`),
        otherwise raw, frozen and in eval mode."""
        ...

    def training(self, name: str) -> AbstractContextManager[None]:
        """Within: this one network is in training mode. The flags before are restored on leaving."""
        ...

    def module(self, name: str) -> nn.Module:
        """The raw module, e.g. for Grad-CAM or for export."""
        ...


_sealed: WeakValueDictionary[int, "Task"] = WeakValueDictionary()


class Task:
    """Base of all tasks. A task holds configs and no state that changes: what it has to remember between steps is in
    `nets.memory`, which is part of a checkpoint. From when its networks are first built, setting an attribute of it
    raises UserError, save in `networks` and `memory`."""

    double_backward: frozenset[str] = frozenset()
    """Networks that losses differentiate twice (R1, path length): called raw while they train, and never above ZeRO
    stage 2, since neither DeepSpeed's hooks nor stage 3 allow a second derivative."""

    def __setattr__(self, name: str, value: Any) -> None:
        if _sealed.get(id(self)) is self:
            raise UserError(
                f"{type(self).__name__}.{name} is set while the task trains, and would be lost when the run resumes: "
                f"begin it in {type(self).__name__}.memory() and keep it in nets.memory[{name!r}]; for another "
                "setting make another task"
            )
        super().__setattr__(name, value)

    def memory(self) -> dict[str, Tensor]:
        """What is remembered between steps (a queue, an image pool, a counter), as it starts; here nothing.

        Every worker holds the same memory and must keep it so: write what all workers see. `all_gather` concatenates in
        rank order, and micro-batch k is cut into consecutive pieces in rank order (`raymed.train.evaluate.shard`), so
        what is gathered is in the order of the samples, whatever the number of workers. A queue, newest first:

            new = all_gather(features)  # (b, D) of this worker -> (B, D) of the micro-batch
            queue = nets.memory["queue"]
            nets.memory["queue"] = torch.cat([new, queue])[: len(queue)]

        Randomness in it comes from `raymed.random`, by (seed, step, sample). torch's generator is seeded alike on all
        workers when this is called, but not in `losses`.
        """
        return {}

    def networks(self) -> dict[str, Network]:
        """Fresh networks. The loop seeds torch's generator first, so that all workers build the same."""
        raise UserError(f"{type(self).__name__} names no networks")

    def losses(self, step: Step, nets: Nets) -> Iterator[Loss]:
        """The losses of one step, in order."""
        raise UserError(f"{type(self).__name__} has no losses")

    def predict(self, batch: Batch, nets: Nets) -> dict[str, Tensor]:
        """What the trained networks say of a batch; the first axis of every tensor is the sample."""
        raise UserError(f"{type(self).__name__} predicts nothing")

    def frozen(self, batch: Batch, nets: Nets) -> dict[str, Tensor]:
        """Outputs of the untrained networks that a phase with `cache=True` keeps, by name, for `batch.cached`."""
        raise UserError(f"{type(self).__name__} has nothing to cache")

    def meters(self) -> dict[str, Meter]:
        """Fresh meters; their values appear as METER's names in evaluations."""
        return {}

    def bundle(self, nets: Nets) -> Bundle:
        """What leaves training."""
        raise UserError(f"{type(self).__name__} has no bundle")


@contextmanager
def setting_up(task: Task) -> Iterator[Task]:
    """Within: the task may set attributes of itself. Afterwards it is sealed, in this process, for good."""
    _sealed.pop(id(task), None)
    yield task
    _sealed[id(task)] = task


@dataclass(frozen=True)
class Phase:
    """One stretch of training: a task, for so many steps, from where an earlier phase ended."""

    name: str
    task: Task
    steps: int
    batch_size: int
    """Global: over all workers and micro-batches."""
    accumulate: int = 1
    """Micro-batches a step."""
    balanced: bool = False
    """Equal numbers of every class in a batch."""
    evaluations: int = 1
    """How often the validation split is scored, evenly spaced, the last time at the end."""
    monitor: str | None = None
    """Validation metric that names the best checkpoint; None: the last one is the best."""
    mode: Literal["max", "min"] = "max"
    patience: int | None = None
    """Evaluations without improvement after which the phase ends; None = never."""
    starts_from: dict[str, str] = field(default_factory=dict)
    """Part -> where its weights come from: "PHASE.best", "PHASE.last" or a checkpoint's folder. A part is a network
    of that name, or a child of that name in a network."""
    cache: bool = False
    """Run the untrained networks once over all images, without augmentation (`Task.frozen`), instead of every step."""

    def __post_init__(self) -> None:
        check_range(f"{self.name}.steps", self.steps, 1)
        check_range(f"{self.name}.evaluations", self.evaluations, 1, self.steps)
        check_range(f"{self.name}.accumulate", self.accumulate, 1)
        if self.batch_size % self.accumulate:
            raise UserError(
                f"{self.name}.batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate})"
            )

    def evaluates_after(self, step: int) -> bool:
        """Whether the validation split is scored after step number `step` (from 0)."""
        return (step + 1) * self.evaluations // self.steps > step * self.evaluations // self.steps
