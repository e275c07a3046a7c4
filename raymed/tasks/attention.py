"""Attention pooling fitted to a finished classifier: energies from the frozen features of its training images.

The energies start at zero, which is the mean of logits. How far training goes, and under how much weight decay, is what
makes the labels of the validation cases most likely. Likely means after calibration, while fitting and when comparing:
a loss that is weighted, or sees classes in equal numbers, leaves logits that are all too high or too low, and attention
must not gain by choosing images that hide it. The best of many states looks good by luck too: what gains no more than
two standard errors is not taken, and the mean it stays. So too where an encoder fits its training images perfectly, and
leaves no errors there to learn from.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raymed.config import UserError
from raymed.metrics.calibration import Calibration
from raymed.models.attention_pool import AttentionPool, case_logits
from raymed.random import derive
from raymed.threads import one_thread

WEIGHT_DECAYS = (0.1, 1.0, 10.0)
STEPS = 100
EVERY = 5
"""Steps between two looks at the validation cases."""
LR = 0.01
ERRORS = 2.0
"""Standard errors of the gain on validation that it must exceed."""
_PREFIX = "attention."  # of its tensors among a bundle's extras


@dataclass(frozen=True)
class CaseImages:
    """N images of U cases, as a finished classifier sees them.

    features: (N, D) of its encoder. logits: (N,) of its head. cases: (N,) int, the case of each image. targets: (U,) of
    {0, 1}, of the cases in ascending order of their numbers (as in a `LevelTable`).

    Raises UserError where shapes do not fit, or a feature or logit is not finite.
    """

    features: np.ndarray
    logits: np.ndarray
    cases: np.ndarray
    targets: np.ndarray

    def __post_init__(self) -> None:
        num_cases = len(np.unique(self.cases))
        shapes = {self.features.shape[:1], self.logits.shape, self.cases.shape}
        if self.features.ndim != 2 or len(shapes) > 1 or self.targets.shape != (num_cases,) or not num_cases:
            raise UserError(
                "attention wants features (N, D), logits (N,), cases (N,) and one target a case, got "
                f"{self.features.shape}, {self.logits.shape}, {self.cases.shape} of {num_cases} cases, and "
                f"{self.targets.shape} targets"
            )
        if not (np.isfinite(self.features).all() and np.isfinite(self.logits).all()):
            raise UserError("a feature or logit is not finite: the classifier has diverged; train it anew")


def fit_attention(
    train: CaseImages, val: CaseImages, seed: int, *, hidden: int = 32
) -> tuple[AttentionPool, dict[str, Any]]:
    """The attention under which the labels of training cases are likely, as far as validation cases confirm it.

    Minimises the mean negative log-likelihood of a case, under P(y = 1) = sigmoid(s z + b) with s and b learned beside
    it, by AdamW over all cases at once, from zero energies, once for each of WEIGHT_DECAYS. Of the states met, one
    every EVERY of STEPS steps, the one with the lowest on validation, with Platt's s and b (`Calibration.fit`), is
    taken if it gains on the mean of logits more than ERRORS standard errors of that gain over cases, otherwise the
    mean: there it is never worse. s and b are not kept: a calibration is fitted to the cases' scores as to any others.
    On the CPU, the same bits for any number of threads.

    Args:
        train: what the energies are fitted on. val: what decides about decay and steps; other patients.
        seed: of V and U. hidden: rows of each.

    Returns:
        The pool, in eval mode, and a report, plain JSON: applied, reason, weight_decay and steps (None and 0 of the
        mean), cases and images of both; on validation, calibrated there, before and after {nll} of the mean of logits
        and of what was chosen, gain {nll, standard_error} of the best state met.

    Raises:
        UserError: features of training and validation of different widths.
    """
    if train.features.shape[1] != val.features.shape[1]:
        raise UserError(f"features of {train.features.shape[1]} and {val.features.shape[1]} numbers: of two encoders?")
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights", "attention"))
        mean = AttentionPool(train.features.shape[1], hidden)
        _standardise(mean, train.features)
        inside, outside = _Cases.of(train), _Cases.of(val)
        before = outside.losses(mean)
        best, best_pool, decay, steps = before, mean, None, 0
        for tried in WEIGHT_DECAYS:
            for step, pool in _states(mean, inside, tried):
                losses = outside.losses(pool)
                if losses.mean() < best.mean():
                    best, best_pool, decay, steps = losses, copy.deepcopy(pool), tried, step
    gain = before - best
    error = float(np.std(gain, ddof=1) / np.sqrt(len(gain))) if len(gain) > 1 else float("inf")
    applied = bool(gain.mean() > ERRORS * error)
    report = {
        "applied": applied,
        "reason": f"its gain on the mean of logits is {'' if applied else 'not '}above {ERRORS:g} standard errors",
        "weight_decay": decay if applied else None,
        "steps": steps if applied else 0,
        "cases": {"train": len(train.targets), "val": len(val.targets)},
        "images": {"train": len(train.logits), "val": len(val.logits)},
        "before": {"nll": float(before.mean())},
        "after": {"nll": float(best.mean() if applied else before.mean())},
        "gain": {"nll": float(gain.mean()), "standard_error": error if np.isfinite(error) else None},
    }
    return (best_pool if applied else mean).eval().requires_grad_(False), report


def image_energies(pool: AttentionPool, features: np.ndarray) -> np.ndarray:
    """Features (N, D) -> (N,) float64 energies, the same bits for any number of threads."""
    with one_thread(), torch.no_grad():
        return pool(torch.tensor(features, dtype=torch.float32)).double().numpy()


def attention_tensors(pool: AttentionPool) -> dict[str, Tensor]:
    """What of a pool goes into a bundle's extras."""
    return {_PREFIX + name: tensor for name, tensor in pool.state_dict().items()}


def load_attention(extras: Mapping[str, Tensor]) -> AttentionPool | None:
    """The pool in a bundle's extras, in eval mode, or None where there is none."""
    tensors = {name.removeprefix(_PREFIX): t for name, t in extras.items() if name.startswith(_PREFIX)}
    if not tensors:
        return None
    hidden, in_features = tensors["signal.weight"].shape
    pool = AttentionPool(in_features, hidden)
    pool.load_state_dict(tensors)
    return pool.eval().requires_grad_(False)


class FeatureMeter:
    """The features and logits of a split, for `CaseImages`: (N, D) float32 and (N,) float64 in order of the row number
    `index` (N,), a row seen more than once, as padding is, once."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def update(self, prediction: dict[str, Tensor], batch: Any, index: Tensor) -> None:
        """prediction: "features" (B, D) and "logit" (B,)."""
        features, logits = prediction["features"].float(), prediction["logit"].double()
        self._parts.append((index.cpu().numpy(), features.cpu().numpy(), logits.cpu().numpy()))

    def merge(self, other: Self) -> None:
        """Add what another worker's meter has seen."""
        self._parts += other._parts

    def compute(self) -> dict[str, float]:
        """Nothing: it only remembers."""
        return {}

    @property
    def index(self) -> np.ndarray:
        return self._rows()[0]

    @property
    def features(self) -> np.ndarray:
        return self._rows()[1]

    @property
    def logits(self) -> np.ndarray:
        return self._rows()[2]

    def _rows(self) -> list[np.ndarray]:
        index, *values = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        index, first = np.unique(index, return_index=True)
        return [index, *(column[first] for column in values)]


@dataclass(frozen=True)
class _Cases:
    """`CaseImages` as tensors."""

    features: Tensor
    logits: Tensor
    member: Tensor
    targets: Tensor

    @classmethod
    def of(cls, images: CaseImages) -> "_Cases":
        def tensor(values: np.ndarray) -> Tensor:
            return torch.tensor(values, dtype=torch.float32)

        member = torch.from_numpy(np.unique(images.cases, return_inverse=True)[1])
        return cls(tensor(images.features), tensor(images.logits), member, tensor(images.targets))

    def pooled(self, pool: AttentionPool) -> Tensor:
        """(U,) logits."""
        return case_logits(self.logits, pool(self.features), self.member, len(self.targets))

    @torch.no_grad()
    def calibrated(self, pool: AttentionPool) -> tuple[np.ndarray, Calibration]:
        """(U,) float64 logits, and Platt's calibration of them."""
        logits = self.pooled(pool).double().numpy()
        return logits, Calibration.fit(logits, self.targets.double().numpy())

    def losses(self, pool: AttentionPool) -> np.ndarray:
        """(U,) float64 negative log-likelihoods, calibrated."""
        logits, platt = self.calibrated(pool)
        z = logits / platt.temperature + platt.bias
        return np.logaddexp(0, z) - self.targets.double().numpy() * z


def _standardise(pool: AttentionPool, features: np.ndarray) -> None:
    """Let the pool see features of mean 0 and standard deviation 1; those that never vary, 0."""
    scale = features.std(0, dtype=np.float64)
    pool.centre.copy_(torch.from_numpy(features.mean(0, dtype=np.float64)))
    pool.scale.copy_(torch.from_numpy(np.where(scale > 0, scale, 1.0)))


def _states(start: AttentionPool, cases: _Cases, decay: float) -> Iterator[tuple[int, AttentionPool]]:
    """(step, pool) every EVERY steps of one descent."""
    pool, (_, platt) = copy.deepcopy(start), cases.calibrated(start)
    sharpness, bias = (torch.tensor(value, requires_grad=True) for value in (1 / platt.temperature, platt.bias))
    groups = [
        {"params": list(pool.parameters()), "weight_decay": decay},
        {"params": [sharpness, bias], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=LR)
    for step in range(1, STEPS + 1):
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(sharpness * cases.pooled(pool) + bias, cases.targets).backward()
        optimiser.step()
        if step % EVERY == 0:
            yield step, pool
