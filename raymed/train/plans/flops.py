"""Floating-point operations of a training, and what share of a device's peak they are (MFU).

Counted are the matrix products, convolutions and attentions of forward and backward pass, as torch's FlopCounterMode
sees them while a real micro-batch runs; a multiplication and an addition are two. Additions elsewhere (activations,
normalisation, optimiser) are left out, as usual for MFU (Chowdhery et al. 2022, PaLM, appendix B). What is computed
again to save memory does not count: neither activation checkpointing nor the second pass of a SupCon step in several
micro-batches.
"""

import functools
import re
import time

import torch

from raymed.data.dataset import DataSet
from raymed.tasks.task import Phase
from raymed.train.compute import Compute
from raymed.train.plans.dry_run import DryRun

_T = 1e12
_PEAKS = (  # word of the device's name; dense TFLOP/s in bf16 (fp16 where there is no bf16), in TF32, in fp32
    ("H200 NVL", 835, 418, 60),
    ("H200", 989, 495, 67),
    ("H100 NVL", 835, 418, 60),
    ("H100 PCIe", 756, 378, 51),
    ("H100", 989, 495, 67),
    ("A100", 312, 156, 19.5),
    ("L40S", 362, 183, 91.6),
    ("L40", 181, 90.5, 90.5),
    ("L4", 121, 60, 30.3),
    ("A10G", 70, 35, 31.5),
    ("A10", 125, 62.5, 31.2),
    ("V100 PCIe", 112, 14, 14),
    ("V100", 125, 15.7, 15.7),
    ("T4", 65, 8.1, 8.1),
    ("RTX A6000", 155, 77.4, 38.7),
    ("RTX 4090", 165, 82.6, 82.6),
    ("RTX 3090", 71, 35.6, 35.6),
)
"""Published peaks without sparsity, of tensor cores that accumulate in fp32, from NVIDIA's data sheets and white
papers; the first match counts. V100 and T4 have neither TF32 nor bf16; GeForce cards do that at half speed."""

_MEASURED_FOR = 0.2  # seconds


def flops_per_sample(phase: Phase, data: DataSet, seed: int, compute: Compute) -> float:
    """FLOPs of forward and backward pass of one sample, by one micro-batch in a scratch copy of the phase's networks.

    With several workers in a process group collective, since losses may communicate.
    """
    devices = [compute.resolved_device()] if compute.resolved_device().type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        run = DryRun(phase, data, seed, compute)
        if phase.cache:
            run.keep_frozen()
        return run.flops_per_sample()


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """(FLOP/s that the device can do at most, where that figure is from).

    For known GPUs a data sheet's: of the tensor cores for bf16 and, where torch is told to use TF32 for fp32
    (`torch.set_float32_matmul_precision`), of those for it. For others and for CPUs ("measured matmul") the speed of a
    large matrix product, with the threads that torch has now.
    """
    if device.type == "cuda":
        published = published_peak(
            torch.cuda.get_device_name(device), precision, torch.get_float32_matmul_precision() != "highest"
        )
        if published is not None:
            return published
    return measured_peak(device, precision, torch.get_num_threads()), "measured matmul"


def published_peak(name: str, precision: str, tf32: bool) -> tuple[float, str] | None:
    """The data sheet's figure for a GPU of this name, or None."""
    words = name.lower().replace("-", " ")
    for part, bf16, with_tf32, fp32 in _PEAKS:
        if re.search(rf"\b{part.lower()}\b", words) and "laptop" not in words:
            kind, value = ("bf16", bf16) if precision == "bf16" else ("TF32", with_tf32) if tf32 else ("fp32", fp32)
            return value * _T, f"data sheet of {part}, dense {kind}"
    return None


@functools.lru_cache
def measured_peak(device: torch.device, precision: str, threads: int) -> float:
    """FLOP/s of the best of several products of two large matrices, with the CPU threads that torch has. Once a process
    for each of them."""
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    seconds: list[float] = []
    while sum(seconds) < _MEASURED_FOR or len(seconds) < 3:
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def mfu(flops_per_sample: float, samples_per_second: float, peak: float, workers: int = 1) -> float:
    """Model FLOPs utilisation, 0 to 1: what was computed for the model, of what all workers' devices could compute."""
    return flops_per_sample * samples_per_second / (peak * workers)
