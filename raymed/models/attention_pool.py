"""Attention pooling: what each of a case's images counts for its answer, learned from the images' features.

Gated attention (Ilse et al., "Attention-based deep multiple instance learning", 2018, equations 8 and 9), over the
features h_i of a frozen encoder, gives image i an energy, and a case the weighted mean of its images' logits:

    e_i = w^T (tanh(V h_i) * sigmoid(U h_i))      a = softmax of e over the case's images      z = sum_i a_i z_i

There it weighs features, on which one classifier then works; here it weighs the logits of a finished one, so that a
case of one image keeps its answer, and w = 0 is the mean of logits. An energy depends on its image alone: it is
computed once an image, like the logit, and cases may be put together from images later (`pooled`).
"""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from raymed.config import UserError


class AttentionPool(nn.Module):
    """Features -> energies. A new one has w = 0: all images of a case count alike.

    Args:
        in_features: width of the features.
        hidden: rows of V and of U.

    Attributes: centre, scale: (in_features,) buffers; V and U see (features - centre) / scale.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, in_features: int, hidden: int = 32):
        super().__init__()
        self.signal = nn.Linear(in_features, hidden, bias=False)  # V
        self.gate = nn.Linear(in_features, hidden, bias=False)  # U
        self.weight = nn.Parameter(torch.zeros(hidden))  # w
        self.register_buffer("centre", torch.zeros(in_features))
        self.register_buffer("scale", torch.ones(in_features))

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_features) -> (B,) float32 energies."""
        inside = (features.float() - self.centre) / self.scale
        return (torch.tanh(self.signal(inside)) * torch.sigmoid(self.gate(inside))) @ self.weight


def case_logits(logits: Tensor, energies: Tensor, member: Tensor, num_cases: int) -> Tensor:
    """(U,) logits of cases, differentiable: sum_i a_i logits_i, a the softmax of energies over a case's images.

    Args:
        logits, energies: (N,) of images, of one dtype. member: (N,) int64, the case of each, 0, ..., U - 1.
        num_cases: U. Every case has an image.
    """
    highest = energies.detach().new_full((num_cases,), -torch.inf)
    highest = highest.scatter_reduce(0, member, energies.detach(), "amax")
    shares = torch.exp(energies - highest[member])
    total = shares.new_zeros(num_cases).index_add(0, member, shares)
    return shares.new_zeros(num_cases).index_add(0, member, shares * logits) / total


def pooled(logits: ArrayLike, energies: ArrayLike, cases: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """One score a case, the same to the last bit in whatever order the images stand.

    Args:
        logits: (N,) of the positive class. energies: (N,) of `AttentionPool`. cases: (N,) int, the case of each image.

    Returns:
        (U,) float64 probabilities, and (U,) int64 numbers of the cases, ascending: as `raymed.metrics.levels.aggregate`
        returns them.

    Raises:
        UserError: arrays of different lengths; a logit or an energy that is not finite.
    """
    from scipy.special import expit

    logits, energies = np.asarray(logits, np.float64), np.asarray(energies, np.float64)
    cases = np.asarray(cases, np.int64)
    if logits.ndim != 1 or not logits.shape == energies.shape == cases.shape:
        raise UserError(
            f"logits, energies and cases must all be (N,), got {logits.shape}, {energies.shape} and {cases.shape}"
        )
    for name, values in (("logits", logits), ("energies", energies)):
        if not np.isfinite(values).all():
            raise UserError(f"{name} must be finite, got {values[~np.isfinite(values)][0]}")
    ids, member = np.unique(cases, return_inverse=True)
    order = np.lexsort((energies, logits, member))  # sums do not depend on the order of images
    z, e, of = (torch.from_numpy(values[order]) for values in (logits, energies, member))
    return expit(case_logits(z, e, of, len(ids)).numpy()), ids
