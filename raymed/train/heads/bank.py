"""Many linear heads on frozen features, trained as one program.

A head is a column: weights (S, K, D + 1) hold K configurations on S replicas (seeds, or folds), the bias last, as the
weight of a feature that is always 1. A step is one product with the features, one call of the loss whose
hyper-parameters are tensors, one product back, and one step of `ColumnAdamW`. The objective is the sum over all heads,
so that every head has the gradient it would have alone, and `keep` takes heads out without a trace in the others.

Every head is what the last phase of a `Unit` of its recipe and seed would give: the same first weights, batches,
schedule, average, evaluations, patience and best checkpoint (in float32; micro-batches add up to the same batch).
"""

import functools
import json
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from raymed.config import UserError, flatten
from raymed.data.dataset import DataSet
from raymed.data.sampling import RandomSampler
from raymed.metrics.columns import COLUMN_METRICS, column_metrics
from raymed.models.encoder import EncoderConfig, build_encoder
from raymed.models.head import LinearHead
from raymed.random import derive
from raymed.tasks.classifier import ClassifierRecipe, ClassifierTask
from raymed.tasks.task import Phase
from raymed.train.heads.column_adamw import ColumnAdamW
from raymed.train.loop import sampler_of

_CHUNK = 2**16  # logits at a time: the temporaries of the loss stay in the processor's cache
_LARGE = 2**22  # multiplications in a product from which oneDNN's is faster than MKL's
_BLOCK = 64  # steps whose batches are drawn together


@dataclass(frozen=True, eq=False)
class Replica:
    """A training set that every head of a bank sees: that of a seed's encoder, or of a fold."""

    data: DataSet
    features: np.ndarray
    """(N, D) float32, row i of image i of the data; a memory map will do."""
    seed: int


@dataclass(frozen=True)
class Reached:
    """What `HeadBank.advance` returns."""

    number: int
    """Of the evaluation, from 1."""
    step: int
    alive: tuple[int, ...]
    """Recipes that the columns of `metrics` and `loss` belong to."""
    metrics: dict[str, np.ndarray]
    """Of the validation split, each (S, K) float64. A replica whose patience is used up keeps its last values."""
    loss: np.ndarray
    """(S, K) of the last step."""
    ended: tuple[int, ...]
    """Recipes whose patience is now used up on every replica; no longer in the bank."""
    failed: tuple[int, ...]
    """Recipes whose loss, gradient or weights were not finite; no longer in the bank, their metrics are nan."""


@dataclass(frozen=True)
class Best:
    """A configuration at its best evaluation on each of S replicas."""

    weight: np.ndarray
    """(S, D) float32."""
    bias: np.ndarray
    """(S,) float32."""
    metrics: dict[str, np.ndarray]
    """Of the validation split, each (S,)."""
    evaluation: np.ndarray
    """(S,) number of that evaluation, from 1."""


_SHARED = ("beta2", "eps")  # of the optimisers of a bank


def group(recipes: Sequence[ClassifierRecipe]) -> list[list[int]]:
    """Indices of recipes that one bank can train: alike but for floats of the loss, of head.optim (not beta2 and eps),
    and head.ema_decay.

    A field that is None in one and a number in another tells them apart.
    """
    groups: dict[str, list[int]] = {}
    for index, recipe in enumerate(recipes):
        loss = f"losses.{recipe.loss_name}"
        own = [f"{loss}.{name}" for name in _float_fields(getattr(recipe.losses, recipe.loss_name))]
        own += [
            "head.ema_decay",
            *(f"head.optim.{name}" for name in _float_fields(recipe.head.optim) if name not in _SHARED),
        ]
        values = flatten(recipe)
        values |= {name: values[name] is None for name in own}
        groups.setdefault(json.dumps(values, sort_keys=True), []).append(index)
    return list(groups.values())


def _float_fields(config: Any) -> list[str]:
    hints = typing.get_type_hints(type(config))
    return [name for name, hint in hints.items() if hint in (float, float | None)]


class HeadBank:
    """Heads of `recipes` on every one of `replicas`; train with `advance`, cut with `keep`, read with `best`.

    alive: indices of the recipes that are still in the bank, in the order of its columns. failed: of those that left it
    because they diverged. Raises UserError for an optimiser other than AdamW.
    """

    def __init__(self, recipes: Sequence[ClassifierRecipe], replicas: Sequence[Replica], device: torch.device):
        phases = [recipes[0].phases(replica.data)[-1] for replica in replicas]
        self.phase = phases[0]
        self.alive, self.failed = list(range(len(recipes))), set[int]()
        self.step = self.number = 0
        self.rows = _Rows(replicas, phases, device)
        self.losses = _Losses(recipes, device)
        optims = [recipe.head.optim for recipe in recipes]
        if optims[0].name != "adamw":
            raise UserError(f"heads are trained together by adamw only, got {optims[0].name}: add --sweep.no-batched")
        first = [_first_weights(phase, replica.seed) for phase, replica in zip(phases, replicas, strict=True)]
        weights = torch.stack(first)[:, None].repeat(1, len(recipes), 1).to(device)
        self.optimizer = ColumnAdamW(weights, optims, self.phase.steps)
        decays = [recipe.head.ema_decay for recipe in recipes if recipe.head.ema_decay is not None]
        self.average = _Average(weights, decays) if decays else None
        self.trace = torch.zeros(weights.shape[:2], device=device)  # finite as long as every loss and gradient was
        self.watch = _Watch(weights.clone(), self.phase)
        self.archive: dict[int, Best] = {}

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return not self.alive or self.step == self.phase.steps

    def advance(self) -> Reached:
        """Train to the next evaluation and score the validation split."""
        loss = self._train_step()
        while not self.phase.evaluates_after(self.step - 1):
            loss = self._train_step()
        self.number += 1
        return self._evaluate(loss)

    def keep(self, indices: Sequence[int]) -> None:
        """Take the heads of all other recipes out of the bank. indices: of recipes that are alive."""
        columns = sorted(self.alive.index(i) for i in indices)
        unchanged = len(columns) == len(self.alive)
        self.alive = [self.alive[k] for k in columns]
        if unchanged or not columns:  # without heads there is nothing left to do
            return
        chosen = torch.tensor(columns, dtype=torch.long, device=self.trace.device)
        self.optimizer.keep(chosen)
        if self.average:
            self.average.keep(chosen)
        self.losses.keep(chosen)
        self.watch.keep(columns)
        self.trace = self.trace[:, chosen]

    def best(self) -> dict[int, Best]:
        """Recipe -> its heads at their best evaluations, of those that are alive or whose patience is used up."""
        return self.archive | {i: self.watch.best(k) for k, i in enumerate(self.alive) if self.number}

    def _train_step(self) -> Tensor:
        """One step of all heads. Returns their losses (S, K)."""
        weights, features, targets = self.optimizer.weights, *self.rows.batch(self.step)
        scale = self.losses.scale(features.shape[1])
        loss = torch.zeros_like(self.trace)
        gradient = torch.zeros_like(weights)
        for x, y in _chunks(features, targets, heads=self.trace.numel()):
            logits = _dot(weights, x).requires_grad_()
            sums = self.losses(logits, y).sum(dim=2)
            (slope,) = torch.autograd.grad(sums.sum(), logits)
            gradient += _dot(slope, x.transpose(1, 2))
            loss += sums.detach()
        loss *= scale
        self.trace += self.optimizer.step(self.step, gradient * scale) + loss
        if self.average:
            self.average.update(weights)
        self.step += 1
        return loss

    def _evaluate(self, loss: Tensor) -> Reached:
        weights = self.average.shadow if self.average else self.optimizer.weights
        finite = (self.trace.isfinite() & weights.isfinite().all(dim=2)).cpu().numpy()
        failed = np.logical_or.reduce(self.watch.running & ~finite, axis=0)
        scored = [column_metrics(*self.rows.scores(weights, s)) for s in range(len(weights))]
        metrics = {name: np.stack([values[name] for values in scored]) for name in COLUMN_METRICS}
        seen, worn_out = self.watch.see(metrics, weights, self.number)
        metrics = {name: np.where(failed, np.nan, values) for name, values in seen.items()}
        alive = tuple(self.alive)
        diverged = tuple(i for k, i in enumerate(alive) if failed[k])
        ended = {i: self.watch.best(k) for k, i in enumerate(alive) if worn_out[k] and not failed[k]}
        self.archive |= ended
        self.failed |= set(diverged)
        self.keep([i for i in alive if i not in ended and i not in self.failed])
        return Reached(self.number, self.step, alive, metrics, loss.double().cpu().numpy(), tuple(ended), diverged)


class _Rows:
    """Features, a 1 behind each, and labels of the replicas: batches of training rows, scores of validation rows."""

    def __init__(self, replicas: Sequence[Replica], phases: Sequence[Phase], device: torch.device):
        self.samplers = [sampler_of(p, r.data, r.seed) for p, r in zip(phases, replicas, strict=True)]
        self.features, labels, sizes = _gather(replicas, "train", device)
        self.labels = torch.from_numpy(labels).to(device, torch.float32)
        self.places = _places(replicas, sizes)
        batch = phases[0].batch_size
        self.whole = not phases[0].balanced and set(sizes) == {batch}  # then the order does not matter
        self.order = torch.empty(0, dtype=torch.long)
        val, val_labels, sizes = _gather(replicas, "val", device)
        self.val, self.val_labels = val.split(sizes), np.split(val_labels, np.cumsum(sizes)[:-1])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Features (S, B, D + 1) and targets (S, 1, B) of a step. Steps are asked for in order, from 0."""
        num = len(self.samplers)
        if self.whole:
            return self.features.view(num, -1, self.features.shape[1]), self.labels.view(num, 1, -1)
        if step % _BLOCK == 0:
            self.order = self._draw(step // _BLOCK)
        where = self.order[step % _BLOCK]
        features = self.features.index_select(0, where).view(num, -1, self.features.shape[1])
        return features, self.labels[where].view(num, 1, -1)

    def _draw(self, block: int) -> Tensor:
        """(_BLOCK, S * B) rows of `features` that make up the batches of a block of steps."""
        drawn = [
            place[_stream(sampler, block)].reshape(_BLOCK, -1)
            for place, sampler in zip(self.places, self.samplers, strict=True)
        ]
        return torch.from_numpy(np.concatenate(drawn, axis=1)).to(self.features.device)

    def scores(self, weights: Tensor, replica: int) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities (N, K) of a replica's validation rows, as `BinaryMeter` has them, and their targets (N,)."""
        from scipy.special import expit

        logits = self.val[replica] @ weights[replica].T
        return expit(logits.double().cpu().numpy()), self.val_labels[replica]


def _gather(replicas: Sequence[Replica], split: str, device: torch.device) -> tuple[Tensor, np.ndarray, list[int]]:
    """Features (sum of N, D + 1) and labels (sum of N,) of a split, replica after replica, and every replica's N."""
    parts = [replica.data.splits[split] for replica in replicas]
    sizes = [len(rows) for rows in parts]
    features = torch.ones(sum(sizes), replicas[0].features.shape[1] + 1)
    for replica, rows, place in zip(replicas, parts, features.split(sizes), strict=True):
        place[:, :-1] = torch.from_numpy(replica.features[rows])
    labels = np.concatenate([replica.data.labels[rows] for replica, rows in zip(replicas, parts, strict=True)])
    return features.to(device), labels, sizes


def _places(replicas: Sequence[Replica], sizes: list[int]) -> list[np.ndarray]:
    """For each replica: image -> its place among all replicas' training rows."""
    places = [np.zeros(len(replica.data.labels), np.int64) for replica in replicas]
    numbers = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    for replica, place, number in zip(replicas, places, numbers, strict=True):
        place[replica.data.splits["train"]] = number
    return places


def _stream(sampler: Any, block: int) -> np.ndarray:
    """The samples of a block of steps, one batch after the other."""
    if isinstance(sampler, RandomSampler):  # one long batch: every epoch is shuffled once, not once a step
        return replace(sampler, batch_size=_BLOCK * sampler.batch_size).indices(block)
    return np.concatenate([sampler.indices(step) for step in range(block * _BLOCK, (block + 1) * _BLOCK)])


def _chunks(features: Tensor, targets: Tensor, heads: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(16, _CHUNK // heads // 16 * 16)
    return zip(features.split(size, dim=1), targets.split(size, dim=2), strict=True)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """a (S, M, P) times b (S, N, P) transposed: (S, M, N)."""
    if a.device.type == "cpu" and a[0].numel() * b.shape[1] >= _LARGE and torch.backends.mkldnn.is_available():
        product = torch.ops.mkldnn._linear_pointwise  # MKL, which bmm takes, leaves AVX-512 alone on AMD's processors
        return torch.stack([product(x, y, None, "none", [], "") for x, y in zip(a, b, strict=True)])
    return torch.bmm(a, b.transpose(1, 2))


class _Losses:
    """The recipes' losses as one: a field in which they differ is a tensor (K, 1) beside logits (S, K, B).

    The configuration axis is the last but one, so that the samples lie side by side in memory: with few configurations
    left, vector instructions still work on full rows.
    """

    def __init__(self, recipes: Sequence[ClassifierRecipe], device: torch.device):
        losses = [getattr(recipe.losses, recipe.loss_name) for recipe in recipes]
        values = {name: [getattr(loss, name) for loss in losses] for name in _float_fields(losses[0])}
        self.accumulate = recipes[0].head.accumulate
        self.reduction = losses[0].reduction
        self.fields = {
            name: torch.tensor(column, dtype=torch.float32, device=device)[:, None]
            for name, column in values.items()
            if len(set(column)) > 1
        }
        self.loss = replace(losses[0], reduction="none", **self.fields)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(S, K, B) losses of logits (S, K, B) for targets (S, 1, B)."""
        return self.loss(logits, targets)

    def scale(self, batch_size: int) -> float:
        """What the sum over a batch is multiplied by."""
        return 1 / batch_size if self.reduction == "mean" else 1 / self.accumulate

    def keep(self, columns: Tensor) -> None:
        """Leave only these configurations."""
        self.fields = {name: values[columns] for name, values in self.fields.items()}
        self.loss = replace(self.loss, **self.fields)


class _Average:
    """`raymed.train.engines.ema.Average` with a decay for every column."""

    def __init__(self, weights: Tensor, decays: Sequence[float]):
        self.shadow = weights.clone()
        self.decay = torch.tensor(decays, dtype=torch.float64, device=weights.device)[:, None]
        self.updates = 0

    def update(self, weights: Tensor) -> None:
        """After the optimiser's step."""
        decay = self.decay.clamp(max=(1 + self.updates) / (10 + self.updates))
        self.shadow.lerp_(weights, (1 - decay).float())
        self.updates += 1

    def keep(self, columns: Tensor) -> None:
        """Leave only these configurations."""
        self.shadow, self.decay = self.shadow[:, columns], self.decay[columns]


class _Watch:
    """The best evaluation of every head and its patience, by the rules of the training loop. Arrays are (S, K)."""

    def __init__(self, weights: Tensor, phase: Phase):
        self.monitor, self.patience = cast(str, phase.monitor), phase.patience
        self.sign = 1 if phase.mode == "max" else -1
        self.weights = weights
        shape = tuple(weights.shape[:2])
        self.best_value, self.stale = np.full(shape, np.nan), np.zeros(shape, int)
        self.evaluation, self.running = np.zeros(shape, int), np.ones(shape, bool)
        self.latest = {name: np.full(shape, np.nan) for name in COLUMN_METRICS}
        self.kept = {name: np.full(shape, np.nan) for name in COLUMN_METRICS}

    def see(
        self, metrics: dict[str, np.ndarray], weights: Tensor, number: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """After an evaluation. Returns the metrics, those of heads that had stopped as they were, and the columns (K,)
        all of whose heads have stopped."""
        self.latest = {name: np.where(self.running, metrics[name], old) for name, old in self.latest.items()}
        value = self.sign * self.latest[self.monitor]
        better = self.running & np.where(np.isnan(value), np.isnan(self.best_value), ~(value <= self.best_value))
        self.best_value = np.where(better, value, self.best_value)
        self.kept = {name: np.where(better, self.latest[name], old) for name, old in self.kept.items()}
        self.evaluation = np.where(better, number, self.evaluation)
        where = torch.from_numpy(better).to(weights.device)
        self.weights[where] = weights[where]
        self.stale = np.where(better, 0, self.stale + 1)
        if self.patience is not None:
            self.running &= self.stale < self.patience
        return self.latest, np.logical_and.reduce(~self.running, axis=0)

    def best(self, column: int) -> Best:
        """Of one configuration."""
        weights = self.weights[:, column].cpu().numpy()
        metrics = {name: values[:, column] for name, values in self.kept.items()}
        return Best(weights[:, :-1].copy(), weights[:, -1].copy(), metrics, self.evaluation[:, column])

    def keep(self, columns: list[int]) -> None:
        """Leave only these configurations."""
        self.weights = self.weights[:, columns]
        self.best_value, self.stale = self.best_value[:, columns], self.stale[:, columns]
        self.evaluation, self.running = self.evaluation[:, columns], self.running[:, columns]
        self.latest = {name: values[:, columns] for name, values in self.latest.items()}
        self.kept = {name: values[:, columns] for name, values in self.kept.items()}


def _first_weights(phase: Phase, seed: int) -> Tensor:
    task = cast(ClassifierTask, phase.task)
    return _drawn(task.encoder, task.preprocess.channels, task.prior, derive(seed, "weights", phase.name))


@functools.lru_cache(maxsize=64)
def _drawn(encoder: EncoderConfig, channels: int, prior: float, seed: int) -> Tensor:
    """(D + 1,) the first weights and bias of a head, drawn behind those of its encoder as `Networks` draws them.

    Kept from bank to bank: a large encoder takes longer to build than its heads to train.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        linear = LinearHead(build_encoder(encoder, channels).num_features, prior=prior).linear
        return torch.cat([linear.weight[0], linear.bias])
