"""The peer without raymed: linear heads with asymmetric loss, one after the other, as a careful plain script has them.

A problem is an npz file with, for S seeds: features (S, N, D) float32, targets (N,) float32, order (S, steps, B) int64
rows of every batch (B = 0: all rows in every step), first (S, D + 1) first weights with the bias behind, schedule
(steps, 2) learning rate and AdamW's first beta; and for K configurations gamma_neg, gamma_pos, clip (K,); and the
numbers weight_decay and max_norm.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Problem:
    """What stands in the file, as tensors."""

    def __init__(self, path: Path):
        arrays = np.load(path)
        self.features, self.targets = torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["targets"])
        self.order, self.first = torch.from_numpy(arrays["order"]), torch.from_numpy(arrays["first"])
        self.schedule = arrays["schedule"].tolist()
        self.configurations = np.stack([arrays[name] for name in ("gamma_neg", "gamma_pos", "clip")], axis=1).tolist()
        self.weight_decay, self.max_norm = float(arrays["weight_decay"]), float(arrays["max_norm"])


def asymmetric_loss(logits: Tensor, targets: Tensor, gamma_neg: float, gamma_pos: float, log_clip: Tensor) -> Tensor:
    """Mean over the batch; an exponent of zero costs nothing."""
    positive = F.logsigmoid(logits)
    negative = torch.logaddexp(F.logsigmoid(-logits), log_clip).clamp(max=0)
    if gamma_pos:
        positive = positive * torch.sigmoid(-logits) ** gamma_pos
    if gamma_neg:
        negative = negative * (torch.sigmoid(logits) - log_clip.exp()).clamp(min=1e-38) ** gamma_neg
    return -(targets * positive + (1 - targets) * negative).mean()


def train_head(problem: Problem, seed: int, configuration: int) -> Tensor:
    """(D + 1,) weights and bias after the last step of one head."""
    gamma_neg, gamma_pos, clip = problem.configurations[configuration]
    log_clip = torch.tensor(math.log(clip))
    features, order = problem.features[seed], problem.order[seed]
    weight = problem.first[seed, None, :-1].clone().requires_grad_()
    bias = problem.first[seed, -1:].clone().requires_grad_()
    groups = [{"params": [weight], "weight_decay": problem.weight_decay}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, fused=True)
    x, y = features, problem.targets
    for step, (lr, momentum) in enumerate(problem.schedule):
        if order.shape[1]:
            x, y = features.index_select(0, order[step]), problem.targets.index_select(0, order[step])
        asymmetric_loss(F.linear(x, weight, bias).squeeze(1), y, gamma_neg, gamma_pos, log_clip).backward()
        torch.nn.utils.clip_grad_norm_((weight, bias), problem.max_norm)
        for group in optimizer.param_groups:
            group["lr"], group["betas"] = lr, (momentum, 0.999)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([weight.detach()[0], bias.detach()])
