"""A compact ResNet for images of 28 to about 128 pixels a side, trained from scratch in minutes on a CPU.

He et al., "Deep residual learning", 2016, with a 3x3 stem of stride 1 in place of the 7x7 stem and the max-pooling, and
with average pooling in the shortcuts that shrink (ResNet-D, He et al., "Bag of tricks", 2019).
"""

import itertools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """No bias: the normalisation that follows has one."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


class Block(nn.Module):
    """silu(shortcut(x) + bn(conv(silu(bn(conv(x)))))). Channels change only where the resolution does."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = _conv(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv(out_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.silu = nn.SiLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride > 1:
            pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
            self.shortcut = nn.Sequential(pool, _conv(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.silu(self.bn1(self.conv1(x)))
        return self.silu(self.shortcut(x) + self.bn2(self.conv2(y)))


class ResNetSmall(nn.Module):
    """Stem, then one block for each width; each block after the first halves the resolution (28 px -> 4 x 4 maps).

    Has the methods by which `raymed.models.encoder.Encoder` uses timm's networks. 0.31 million parameters.
    """

    def __init__(self, in_channels: int = 1, widths: tuple[int, ...] = (16, 32, 64, 128)):
        super().__init__()
        self.head_hidden_size = widths[-1]
        self.grad_checkpointing = False
        self.stem = nn.Sequential(_conv(in_channels, widths[0], 3), nn.BatchNorm2d(widths[0]), nn.SiLU(inplace=True))
        blocks = [Block(widths[0], widths[0], stride=1)]
        blocks += [Block(before, width, stride=2) for before, width in itertools.pairwise(widths)]
        self.blocks = nn.Sequential(*blocks)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Block):
                nn.init.zeros_(module.bn2.weight)  # each block starts as its shortcut (Goyal et al., 2017)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) -> maps (B, head_hidden_size, H / 8, W / 8), rounded up."""
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return self.blocks(self.stem(x))
        for part in (self.stem, *self.blocks):
            x = checkpoint(part, x, use_reentrant=False)  # type: ignore[assignment]
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the stem and of each block for the backward pass, and compute the rest again there.
        See `raymed.models.checkpointing`."""
        self.grad_checkpointing = enable

    def forward_head(self, maps: Tensor, pre_logits: bool = True) -> Tensor:
        """Maps -> features (B, head_hidden_size), their means. There is no classifier to leave out."""
        return maps.mean(dim=(2, 3))
