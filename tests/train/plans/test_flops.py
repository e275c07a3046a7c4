"""FLOPs against numbers made by hand, peaks against the data sheets."""

import dataclasses

import pytest
import torch
from small import recipe
from torch import nn

from raymed.tasks.task import Loss, Network, Optim, Phase, Task
from raymed.train.compute import Compute
from raymed.train.plans.flops import flops_per_sample, measured_peak, mfu, peak_flops, published_peak

COMPUTE = Compute(threads=1, device="cpu")


@dataclasses.dataclass
class Net(Task):
    """One network on inputs of one shape, its mean as the loss."""

    module: type[nn.Module]
    shape: tuple[int, ...]

    def networks(self):
        return {"net": Network(self.module(), Optim("sgd"))}

    def losses(self, step, nets):
        for k, batch in step.batches():
            with nets.training("net"):
                value = nets["net"](torch.ones(len(batch), *self.shape)).mean()
                yield Loss("net", value, {"loss": value.detach()}, step=k == len(step.micro) - 1)


class Linears(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 7))


class Convolutions(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False))


class Blocks(nn.Module):
    """A layer that can be computed again."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.again = nn.Linear(30, 20), nn.Linear(20, 7), False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.again = enable

    def forward(self, x):
        if self.again:
            return self.second(
                torch.utils.checkpoint.checkpoint(lambda y: self.first(y).relu(), x, use_reentrant=False)
            )
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        # forward and the weights' gradient for both layers, the input's for the second alone: 2 x in x out each
        (Linears, (30,), 2 * (2 * 30 * 20) + 3 * (2 * 20 * 7)),
        # 10 x 10 places, 27 products for each of 8 channels, then 8 for each of 4
        (Convolutions, (3, 10, 10), 2 * (2 * 100 * 27 * 8) + 3 * (2 * 100 * 8 * 4)),
    ],
)
def test_by_hand(data, module, shape, expected, accumulate):
    phase = Phase("p", Net(module, shape), 5, 12, accumulate=accumulate)
    assert flops_per_sample(phase, data, 0, COMPUTE) == expected
    assert flops_per_sample(phase, data, 0, dataclasses.replace(COMPUTE, workers=2)) == expected


def test_what_is_computed_again_does_not_count(data, manifest):
    phase = Phase("p", Net(Blocks, (30,)), 5, 12)
    plain = flops_per_sample(phase, data, 0, COMPUTE)
    assert plain == 2 * (2 * 30 * 20) + 3 * (2 * 20 * 7)
    assert flops_per_sample(phase, data, 0, dataclasses.replace(COMPUTE, activation_checkpointing=True)) == plain
    config = recipe(manifest)
    once, twice = (
        flops_per_sample(dataclasses.replace(config.phases(data)[0], batch_size=6 * k, accumulate=k), data, 0, COMPUTE)
        for k in (1, 2)
    )
    assert once == twice > 1e7


def test_counting_leaves_nothing_behind(data, manifest):
    before = torch.get_rng_state()
    head = recipe(manifest).phases(data)[1]  # on cached features of 128 numbers: one logit, no gradient for them
    assert flops_per_sample(head, data, 3, COMPUTE) == 2 * (2 * 128)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "bf16", "tf32", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 495, 67),
        ("NVIDIA H100 PCIe", 756, 378, 51),
        ("NVIDIA H200", 989, 495, 67),
        ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312, 156, 19.5),
        ("NVIDIA L4", 121, 60, 30.3),
        ("NVIDIA L40S", 362, 183, 91.6),
        ("NVIDIA A10", 125, 62.5, 31.2),
        ("NVIDIA A10G", 70, 35, 31.5),
        ("Tesla V100-SXM2-16GB", 125, 15.7, 15.7),
        ("Tesla V100-PCIE-32GB", 112, 14, 14),
        ("Tesla T4", 65, 8.1, 8.1),
        ("NVIDIA RTX A6000", 155, 77.4, 38.7),
        ("NVIDIA GeForce RTX 4090", 165, 82.6, 82.6),
        ("NVIDIA GeForce RTX 3090", 71, 35.6, 35.6),
    ],
)
def test_published_peaks(name, bf16, tf32, fp32):
    values = [published_peak(name, *how) for how in (("bf16", False), ("fp32", True), ("fp32", False))]
    assert [value[0] / 1e12 for value in values if value] == pytest.approx([bf16, tf32, fp32])
    assert values[0] and values[0][1].startswith("data sheet of") and values[0][1].endswith("dense bf16")


@pytest.mark.parametrize("name", ["NVIDIA T400", "NVIDIA GeForce RTX 4090 Laptop GPU", "AMD Instinct MI300X"])
def test_unknown_gpus_have_no_published_peak(name):
    assert published_peak(name, "bf16", True) is None


def test_a_cpu_is_measured():
    value, source = peak_flops(torch.device("cpu"), "fp32")
    assert source == "measured matmul" and 1e9 < value < 1e14
    assert measured_peak(torch.device("cpu"), "fp32", torch.get_num_threads()) == value  # not measured again


def test_mfu():
    """3 TFLOPs an image, 200 images/s on 8 devices of 312 TFLOP/s: 600 of 2496."""
    assert mfu(3e12, 200, 312e12, 8) == pytest.approx(600 / 2496)
