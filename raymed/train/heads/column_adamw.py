"""AdamW for many heads at once: every column has its own learning rate, decay, momentum, warm-up and clipping.

torch.optim.AdamW has one learning rate a group of tensors, so that K configurations would take K groups and K times the
calls. Here a step is a dozen operations on all columns, whatever their number; what differs from column to column is
looked up in a table of all steps. Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019,
algorithm 2, in the arithmetic of torch.optim.AdamW.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raymed.tasks.task import Optim
from raymed.train.engines.optim import schedule

_CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grads_with_norm_


class ColumnAdamW:
    """Moves weights (S, K, P) float32 in place: S replicas of K configurations with P parameters each.

    The last parameter of every head is its bias, which is not decayed. A head's gradient is clipped by its own norm.
    beta2 and eps are the same for all: those of the first.
    """

    def __init__(self, weights: Tensor, optims: Sequence[Optim], steps: int):
        self.weights = weights
        self.mean, self.square = torch.zeros_like(weights), torch.zeros_like(weights)
        self.scratch = torch.empty_like(weights)
        self.beta2, self.eps = optims[0].beta2, optims[0].eps
        self.table = torch.from_numpy(_table(optims, steps)).to(weights.device)
        clips = [optim.clip for optim in optims if optim.clip is not None]
        self.clip = torch.tensor(clips, device=weights.device) if clips else None

    @torch.no_grad()
    def step(self, number: int, gradient: Tensor) -> Tensor:
        """Step number `number` (from 0). Overwrites the gradient; returns its norm (S, K) before clipping."""
        decay, mix, rate = self.table[number]  # each (K, 1)
        norm = torch.linalg.vector_norm(gradient, dim=2)
        if self.clip is not None:
            gradient.mul_((self.clip / (norm + _CLIP_EPS)).clamp_(max=1.0)[:, :, None])
        self.weights[:, :, :-1].mul_(decay)
        self.mean.lerp_(gradient, mix)
        self.square.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        torch.sqrt(self.square, out=self.scratch).div_((1 - self.beta2 ** (number + 1)) ** 0.5).add_(self.eps)
        torch.div(self.mean, self.scratch, out=self.scratch)
        self.weights.addcmul_(self.scratch, rate)
        return norm

    def keep(self, columns: Tensor) -> None:
        """Leave only these configurations (indices of the K axis)."""
        self.weights, self.mean, self.square = (x[:, columns] for x in (self.weights, self.mean, self.square))
        self.scratch = torch.empty_like(self.weights)
        self.table = self.table[:, :, columns]
        self.clip = None if self.clip is None else self.clip[columns]


def _table(optims: Sequence[Optim], steps: int) -> np.ndarray:
    """(steps, 3, K, 1) float32: the factor of decay, the share of the gradient in the first moment, and what the update
    is multiplied by: minus the learning rate over the first moment's bias correction, by this step's beta1 alone."""
    scheduled = {optim: [schedule(optim, step, steps) for step in range(steps)] for optim in set(optims)}
    lr, beta1 = np.array([scheduled[optim] for optim in optims]).T  # each (steps, K)
    decay = 1 - lr * [optim.weight_decay for optim in optims]
    correction = 1 - beta1 ** np.arange(1, steps + 1)[:, None]
    return np.stack([decay, 1 - beta1, -lr / correction], axis=1)[..., None].astype(np.float32)
