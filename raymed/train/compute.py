"""Where and how fast: workers, engine, precision, device. Nothing here changes what is learned."""

import os
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from raymed.config import UserError, check_choice, check_range
from raymed.distributed import world_size
from raymed.tasks.task import Phase


@dataclass(frozen=True)
class Compute:
    """The machine's side of a run. The same recipe gives the same curve whatever stands here (bf16 apart)."""

    workers: int = 1
    """1: this process, or one Ray Train worker of the cluster that the job was submitted to. More: that many, each with
    its share of every batch."""
    min_workers: int | None = None
    """Fewer workers than `workers` that will do: the group shrinks when a node is lost and grows when one joins, and
    the batch stays, in more micro-batches. None: all or none."""
    node_patience: float | None = None
    """Seconds to wait for nodes that are missing, as for a spot machine that starts and installs; the job ends then.
    None: $RAYMED_NODE_PATIENCE of the cluster, else 600."""
    engine: Literal["auto", "torch", "deepspeed"] = "auto"
    """auto: torch for one worker, DeepSpeed for several."""
    zero_stage: int = 0
    """DeepSpeed: 0 replicates everything, 1 shards the optimiser's state, 2 the gradients too, 3 the weights too."""
    network_stages: tuple[str, ...] = ()
    """Other stages for single networks, as NETWORK=STAGE."""
    offload: bool = False
    """DeepSpeed, stages 2 and 3: the optimiser and its state stay in the memory of the CPU."""
    activation_checkpointing: bool = False
    """Keep only the inputs of a network's blocks and compute the rest again in the backward pass: less memory, about a
    third more time."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: fp32 weights, forward pass under autocast."""
    compile: bool = False
    """torch.compile the networks in training (torch engine)."""
    keep_checkpoints: int = 1
    """Last checkpoints that are kept, beside the best and the registered ones."""
    checkpoint_minutes: float = 10.0
    """Longest time between two checkpoints; every evaluation saves one too."""
    channels_last: bool = True
    """Convolutions in NHWC memory order: 20 to 40 % faster on CPUs. With the torch engine and at ZeRO stage 0; stages 1
    to 3 keep the weights of a network in training flat, in NCHW order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    """CPU threads a worker; None: torch's own choice alone, the CPUs that Ray gives elsewhere."""
    cpus_per_worker: int = 1
    """CPUs that Ray reserves for a worker or a trial; a lone one gets more where they are free."""

    def __post_init__(self) -> None:
        check_range("compute.workers", self.workers, 1)
        if self.min_workers is not None:
            check_range("compute.min_workers", self.min_workers, 1, self.workers)
        if self.node_patience is not None:
            check_range("compute.node_patience", self.node_patience, 0)
        check_choice("compute.engine", self.engine, ("auto", "torch", "deepspeed"))
        check_range("compute.zero_stage", self.zero_stage, 0, 3)
        self._check_stages()
        check_choice("compute.precision", self.precision, ("fp32", "bf16"))
        check_choice("compute.device", self.device, ("auto", "cpu", "cuda"))
        check_range("compute.cpus_per_worker", self.cpus_per_worker, 1)
        check_range("compute.keep_checkpoints", self.keep_checkpoints, 1)
        check_range("compute.checkpoint_minutes", self.checkpoint_minutes, 0, low_open=True)
        if self.resolved_engine(self.workers) == "torch":
            for name in ("zero_stage", "network_stages", "offload"):
                if getattr(self, name):
                    warnings.warn(f"compute.{name} has no effect with the torch engine", stacklevel=3)

    def _check_stages(self) -> None:
        for entry in self.network_stages:
            name, _, stage = entry.partition("=")
            if not name or stage not in ("0", "1", "2", "3"):
                raise UserError(
                    f"compute.network_stages must be like generator=2, with a stage from 0 to 3, got {entry!r}"
                )
        stages = [self.zero_stage, *(int(entry.partition("=")[2]) for entry in self.network_stages)]
        if self.offload and not any(stage >= 2 for stage in stages):
            raise UserError("compute.offload needs ZeRO stage 2 or 3: set compute.zero_stage")

    def stage_of(self, network: str) -> int:
        """The ZeRO stage of a network."""
        own = dict(entry.split("=") for entry in self.network_stages)
        return int(own.get(network, self.zero_stage))

    def check_phase(self, phase: Phase) -> None:
        """Raise UserError where a network of the phase cannot have the ZeRO stage that it would have."""
        if self.resolved_engine(self.workers) == "torch":
            return
        for name in sorted(phase.task.double_backward):
            if self.stage_of(name) == 3:
                raise UserError(
                    f"phase {phase.name}: {type(phase.task).__name__} differentiates {name} twice, which ZeRO stage 3 "
                    "cannot: the first backward pass lets go of the weights that the second one needs. Give it "
                    f"another stage with --compute.network-stages {name}=2"
                )

    def resolved_engine(self, workers: int | None = None) -> str:
        """ "torch" or "deepspeed"."""
        if self.engine != "auto":
            return self.engine
        return "deepspeed" if (workers or world_size()) > 1 else "torch"

    def resolved_device(self) -> torch.device:
        """This worker's device."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("compute.device is cuda, but torch sees no GPU here: use --compute.device cpu")
        if self.device == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())

    def autocast(self) -> AbstractContextManager:
        """bf16 autocast, or nothing."""
        kind = self.resolved_device().type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def use_threads(self) -> None:
        """Set torch's CPU threads for this process."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def prepare(self, module: nn.Module) -> nn.Module:
        """Onto the device, in the memory order asked for."""
        module = module.to(self.resolved_device())
        for tensor in (*module.parameters(), *module.buffers()) if self.channels_last else ():
            if tensor.ndim == 4:  # images have four axes, volumes a memory order of their own
                # not contiguous(), which leaves weights of one input channel in an order that their outputs copy
                tensor.data = tensor.data.to(memory_format=torch.channels_last)
        return module

    def warn_where_useless(self, modules: list[nn.Module]) -> None:
        """Warn of options that do nothing for these networks on this machine."""
        kinds = (nn.Conv2d, nn.ConvTranspose2d)
        convolves = any(isinstance(m, kinds) for module in modules for m in module.modules())
        if self.channels_last and not convolves:
            warnings.warn("compute.channels_last has no effect: no network here convolves images", stacklevel=2)
        if self.precision == "bf16" and self.resolved_device().type == "cpu" and not _cpu_has_bf16():
            warnings.warn("compute.precision=bf16 saves no time here: this CPU computes bf16 in fp32", stacklevel=2)


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
