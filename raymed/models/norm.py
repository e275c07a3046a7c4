"""Normalisation that gives N workers with B/N images what one worker with B images gets.

`GlobalBatchNorm2d` takes its statistics over the images of all workers (CPU too: torch's SyncBatchNorm is CUDA only).
Group normalisation (Wu and He, 2018) does not look beyond one image.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raymed.distributed import all_gather_with_grad, world_size


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of the global batch, forward and backward.

    With one process, and in evaluation, it is `nn.BatchNorm2d`. With several, each contributes its mean, its sum of
    squared deviations and its count, which are combined by the update of Chan, Golub and LeVeque (1983); the gather is
    differentiable, and the running statistics are the same on every rank. Half precision is reduced in float32.
    `drop` and `act` follow the normalisation, as in timm's BatchNormAct2d.
    """

    drop: nn.Module
    act: nn.Module

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> "GlobalBatchNorm2d":
        """The same layer, sharing parameters and buffers."""
        copy = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        copy.weight, copy.bias, copy.training = norm.weight, norm.bias, norm.training
        copy.running_mean, copy.running_var = norm.running_mean, norm.running_var
        copy.num_batches_tracked = norm.num_batches_tracked
        copy.drop, copy.act = _followers(norm)
        return copy

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.drop, self.act = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> same shape and dtype; B may differ between ranks."""
        normalised = self._global(x) if self.training and world_size() > 1 else super().forward(x)
        return self.act(self.drop(normalised))

    def _global(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var, count = _global_moments(wide)
        self._track(mean.detach(), var.detach() * count / (count - 1))
        scale = torch.rsqrt(var + self.eps)
        y = (wide - mean[:, None, None]) * scale[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        running_mean, running_var, seen = self.running_mean, self.running_var, self.num_batches_tracked
        if running_mean is None or running_var is None or seen is None:  # track_running_stats=False
            return
        seen.add_(1)
        momentum = 1 / seen.item() if self.momentum is None else self.momentum
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased_var.to(running_var.dtype), momentum)


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and number of values per channel () over the images of all ranks."""
    count = x.new_full((1,), x.numel() / x.shape[1])
    mean = x.mean(dim=(0, 2, 3))
    squares = (x - mean[:, None, None]).square().sum(dim=(0, 2, 3))
    gathered = all_gather_with_grad(torch.cat([mean, squares, count])[None])
    means, all_squares, counts = gathered.split([len(mean), len(mean), 1], dim=1)
    total = counts.sum()
    global_mean = (counts * means).sum(0) / total
    global_squares = (all_squares + counts * (means - global_mean).square()).sum(0)
    return global_mean, global_squares / total, total.detach()


class GroupNorm2d(nn.GroupNorm):
    """GroupNorm in the place of a BatchNorm2d, eight channels a group; `drop` and `act` as in timm's BatchNormAct2d."""

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> "GroupNorm2d":
        """A group normalisation with the weight and bias of `norm`; its running statistics have no counterpart."""
        groups = norm.num_features // math.gcd(norm.num_features, 8)
        copy = cls(groups, norm.num_features, norm.eps, norm.affine)
        copy.weight, copy.bias, copy.training = norm.weight, norm.bias, norm.training
        copy.drop, copy.act = _followers(norm)
        return copy

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.drop, self.act = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)))


def use_global_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm2d, timm's BatchNormAct2d too, by GlobalBatchNorm2d; state-dict keys stay."""
    return _replace(module, GlobalBatchNorm2d.of)


def use_groupnorm(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm2d, timm's BatchNormAct2d too, by GroupNorm2d with the same weights and biases."""
    return _replace(module, GroupNorm2d.of)


def _replace(module: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> nn.Module:
    if isinstance(module, nn.BatchNorm2d):
        return make(module)
    for name, child in module.named_children():
        setattr(module, name, _replace(child, make))
    return module


def _followers(norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The drop and act layers of timm's BatchNormAct2d; identities for a plain BatchNorm2d."""
    return getattr(norm, "drop", nn.Identity()), getattr(norm, "act", nn.Identity())
