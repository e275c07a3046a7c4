"""The peer of jobs/bench_train.py: a training loop as one writes it for one model, in nothing but torch and numpy.

Reads a folder: images.npy (N, C, H, W) uint8, labels.npy (N,), order.npy (steps, B) rows of every batch, weights.pt,
and config.json. Imports nothing else of this project.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // math.gcd(channels, 8), channels)


Norm = Callable[[int], nn.Module]
NORMS: dict[str, Norm] = {"batch": nn.BatchNorm2d, "group": group_norm}


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, 3, stride), norm(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs, 3), norm(outputs)
        self.shortcut = nn.Identity()
        if stride > 1:
            pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
            self.shortcut = nn.Sequential(pool, conv(inputs, outputs, 1), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn1(self.conv1(x)), inplace=True)
        return F.silu(self.shortcut(x) + self.bn2(self.conv2(y)), inplace=True)


class ResNet(nn.Module):
    def __init__(self, channels: int, norm: Norm, widths: tuple[int, ...] = (16, 32, 64, 128)):
        super().__init__()
        self.stem = nn.Sequential(conv(channels, widths[0], 3), norm(widths[0]), nn.SiLU(inplace=True))
        before = (widths[0], *widths)
        self.blocks = nn.Sequential(*(Block(before[k], w, 1 if k == 0 else 2, norm) for k, w in enumerate(widths)))
        self.linear = nn.Linear(widths[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(self.stem(x)).mean((2, 3))).squeeze(1)


class PlainTraining:
    """One training, as many steps at a time as asked for."""

    def __init__(self, folder: Path, steps: int, device: str = "cpu"):
        """steps: of the whole schedule."""
        config = json.loads((folder / "config.json").read_text())
        self.images = torch.from_numpy(np.load(folder / "images.npy")).to(device)
        self.labels = torch.from_numpy(np.load(folder / "labels.npy")).float().to(device)
        self.order = torch.from_numpy(np.load(folder / "order.npy"))
        self.mean, self.std = (torch.tensor(config[name], device=device)[:, None, None] for name in ("mean", "std"))
        self.model = ResNet(self.images.shape[1], NORMS[config["norm"]])
        self.model.load_state_dict(torch.load(folder / "weights.pt"))
        self.model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.forward: nn.Module = self.model
        self.parameters = list(self.model.parameters())
        self.weights = [p.detach() for p in self.parameters]
        self.ema = [weight.clone() for weight in self.weights]
        self.ema_decay, self.clip = config["ema_decay"], config["clip"]
        decayed = [p for p in self.parameters if p.ndim >= 2]
        others = [p for p in self.parameters if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": config["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config["lr"], betas=(config["momentum"], 0.999))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            config["lr"],
            total_steps=steps,
            pct_start=config["warmup"],
            base_momentum=0.85,
            max_momentum=config["momentum"],
        )
        self.done = 0
        self.losses: list[float] = []

    def train(self, steps: int) -> None:
        """So many further steps."""
        pending = []
        for _ in range(steps):
            pending.append(self.step())
            if len(pending) == 10:
                self.losses += self.read(torch.stack(pending))
                pending = []
        if pending:
            self.losses += self.read(torch.stack(pending))

    def read(self, losses: Tensor) -> list[float]:
        return losses.tolist()

    def loss(self) -> Tensor:
        rows = self.order[self.done]
        x = (self.images[rows].float() / 255 - self.mean) / self.std
        return F.binary_cross_entropy_with_logits(self.forward(x), self.labels[rows])

    def step(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.average()
        self.done += 1
        return loss.detach()

    @torch.no_grad()
    def average(self) -> None:
        decay = min(self.ema_decay, (1 + self.done) / (10 + self.done))
        torch._foreach_lerp_(self.ema, self.weights, 1 - decay)
