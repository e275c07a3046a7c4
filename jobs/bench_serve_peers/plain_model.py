"""The model of the peers without raymed: a classifier of timm, an image by Pillow, and nothing else.

A folder holds config.json, {"backbone", "size", "mean", "std"}, and weights.safetensors with timm's names. Images are
grey squares.
"""

import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, fx, nn
from torch.nn.utils import fuse_conv_bn_eval


class PlainModel:
    """From the bytes of an image to a probability."""

    def __init__(self, folder: Path):
        config = json.loads((folder / "config.json").read_text())
        self.size, self.mean, self.std = config["size"], config["mean"], config["std"]
        self.network: Any = _timm().create_model(config["backbone"], num_classes=1, in_chans=1)
        self.network.load_state_dict(load_file(folder / "weights.safetensors"))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        network: Any = folded(self.network.eval())
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self.threads = torch.get_num_threads()
        self.threads = min((1, self.threads), key=self._seconds)

    def read(self, body: bytes) -> Tensor:
        """(1, size, size), normalised."""
        image = Image.open(io.BytesIO(body)).convert("F")
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).round_().div_(255)
        return pixels.sub_(self.mean).div_(self.std)[None]

    @torch.inference_mode()
    def probabilities(self, images: Sequence[Tensor]) -> list[float]:
        """Of each image, with the number of threads that is sooner for one, as raymed chooses too."""
        torch.set_num_threads(self.threads)
        return self.network(torch.stack(list(images)).to(self.device)).flatten().sigmoid().tolist()

    def _seconds(self, threads: int) -> float:
        """For an image; the least of some."""
        self.threads, image = threads, torch.rand(1, self.size, self.size)
        times = [time.perf_counter()]
        for _ in range(10):
            self.probabilities([image])
            times.append(time.perf_counter())
        return float(min(np.diff(times)))

    def answer(self, body: bytes) -> dict[str, float]:
        """Of one image, as it leaves the server."""
        return {"probability": self.probabilities([self.read(body)])[0]}


class _Layers(fx.Tracer):
    """Sees timm's normalisations, which hold an activation, as layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one step of the graph."""
        return isinstance(m, nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def folded(network: nn.Module) -> nn.Module:
    """With each normalisation in the convolution before it, as raymed serves a network too."""
    nodes: Any = _Layers().trace(network).nodes
    for after in nodes:
        before: Any = after.args[0] if after.args else None
        if after.op != "call_module" or getattr(before, "op", "") != "call_module" or len(before.users) > 1:
            continue
        convolution, norm = network.get_submodule(before.target), network.get_submodule(after.target)
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            _place(network, before.target, fuse_conv_bn_eval(convolution, norm))
            _place(network, after.target, getattr(norm, "act", nn.Identity()))
    return network


def _place(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def _timm() -> Any:
    """timm, which imports torchvision; one whose operators do not load beside a torch without CUDA cannot be imported
    until they are declared."""
    try:
        import timm
    except RuntimeError:
        declared = torch.library.Library("torchvision", "FRAGMENT")  # noqa: TOR901
        declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_declared"] = declared
        import timm
    return timm
