"""Check that a contrastive loss is on several processes what it is on one: its value, and the gradients it sends back.

    python jobs/check_contrastive.py                                 # every contrastive loss of raymed, 3 processes
    python jobs/check_contrastive.py --loss dhn_nce --processes 4
    python jobs/check_contrastive.py --loss mymodule:MyLoss --equal  # yours, from the current folder

Two linear encoders make unit features of some pairs of an image and a text. Each process has its share of the pairs,
and gradients are averaged over the processes, as DDP and DeepSpeed do it. They must be those of one process with all
pairs. Gradients are compared, since Adam hides a wrong factor from the weights, but not from clipping and weight decay.

A loss of yours is any callable that takes (image_features, text_features), (b, D) each, and returns a scalar; a class
is called without arguments first, in a process group. The value compared is the mean over the processes. The exit code
is 1 where a loss differs.
"""

import importlib
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from raymed.command import command
from raymed.config import UserError, check_choice, check_range
from raymed.distributed import leave_group
from raymed.losses import PAIR_LOSSES, PairLoss, SupConLoss

SUPCON = "supcon"
PATIENCE = timedelta(minutes=1)  # with a process that does not take part
Record = dict[str, Tensor]
"""The value, and gradients by parameter."""


@dataclass(frozen=True)
class CheckContrastive:
    """Which losses, and on how many processes of this machine."""

    loss: tuple[str, ...] = (*PAIR_LOSSES, SUPCON)
    """Names of raymed's losses, or MODULE:NAME of yours."""
    processes: int = 3
    equal: bool = False
    """The same number of pairs on every process for losses of yours, if they need that."""
    tolerance: float = 1e-5
    """Of differences, relative to the value and to the largest gradient."""

    def __post_init__(self) -> None:
        check_range("processes", self.processes, 2)
        check_range("tolerance", self.tolerance, 0, low_open=True)

    def counts(self, name: str) -> list[int]:
        """Pairs of each process."""
        equal = name == SUPCON or (self.equal and name not in PAIR_LOSSES)
        return [4 if equal else 2 + (3 * rank + 1) % 5 for rank in range(self.processes)]


def check(config: CheckContrastive) -> str:
    """Compare, print a table, and exit with 1 where a loss differs."""
    for name in config.loss:
        find(name)
    with tempfile.TemporaryDirectory(prefix="check-contrastive-") as folder:
        try:
            work(0, 1, config, folder)
            multiprocessing.set_forkserver_preload(["raymed.losses"])  # imported once for all processes
            inputs = (config.processes, config, folder)
            torch.multiprocessing.start_processes(work, inputs, config.processes, start_method="forkserver")
        except Exception as error:
            leave_group()
            hint = "" if config.equal else "\nIf the loss needs the same number of pairs on every process: --equal"
            raise UserError(f"a process failed: {error}{hint}") from None
        expected, found = (torch.load(f"{folder}/{world}.pt") for world in (1, config.processes))
    print(f"{'loss':<24} {'pairs':<14} {'value':>12} {'of one process':>14} {'gradients differ by':>19}  verdict")
    verdicts = []
    for name in config.loss:
        difference, verdict = compare(found[name], expected[name], config.tolerance)
        values = f"{found[name]['value']:>12.8f} {expected[name]['value']:>14.8f}"
        print(f"{name:<24} {'+'.join(map(str, config.counts(name))):<14} {values} {difference:>19.1e}  {verdict}")
        verdicts.append(verdict)
    if set(verdicts) != {"equal"}:
        sys.exit(1)
    return f"{config.processes} processes train as one does."


def compare(found: Record, expected: Record, tolerance: float) -> tuple[float, str]:
    """(largest difference of gradients, relative to the largest gradient; "equal", or what is wrong)."""
    own, right = (torch.cat([r[k].flatten() for k in sorted(expected) if k != "value"]) for r in (found, expected))
    difference = ((own - right).abs().max() / right.abs().max()).item()
    factor = (own @ right / (right @ right)).item()
    if not difference <= tolerance:
        times = ((own - factor * right).abs().max() / right.abs().max()).item() <= 10 * tolerance
        return difference, f"gradients are {factor:.4f} of what they should be" if times else "gradients differ"
    same = torch.isclose(found["value"], expected["value"], rtol=tolerance, atol=tolerance)
    return difference, "equal" if same else "values differ"


def work(rank: int, world: int, config: CheckContrastive, folder: str) -> None:
    """One process: values and averaged gradients of all losses, saved by rank 0."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous{world}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=PATIENCE)
    records = {name: gradients(name, config.counts(name), rank, world) for name in config.loss}
    if rank == 0:
        torch.save(records, f"{folder}/{world}.pt")
    leave_group()


def gradients(name: str, counts: list[int], rank: int, world: int) -> Record:
    """What a step with a loss gives, averaged over the processes; rank 0 of one process has all pairs."""
    generator = torch.Generator().manual_seed(0)
    num, start = sum(counts), sum(counts[:rank])
    mine = slice(start, start + counts[rank]) if world > 1 else slice(0, num)
    inputs = torch.randn(2, num, 6, generator=generator, dtype=torch.float64)[:, mine]
    weights = {"image": torch.randn(6, 4, generator=generator), "text": torch.randn(6, 4, generator=generator)}
    weights |= {"log_scale": torch.tensor(1.2), "bias": torch.tensor(-2.0)}
    weights = {key: weight.double().requires_grad_() for key, weight in weights.items()}
    image, text = (F.normalize(x @ weights[key], dim=1) for x, key in zip(inputs, ("image", "text"), strict=True))

    loss, cases = find(name)(), torch.arange(num)
    cases[-1] = 0  # the first and the last process have pairs of one case
    if isinstance(loss, PairLoss):
        value = loss(image, text, cases[mine], weights["log_scale"].exp(), weights["bias"])
    elif isinstance(loss, SupConLoss):
        value = loss(torch.stack([image, text], dim=1), cases[mine])
    else:
        value = loss(image, text)
    value.backward()
    record = {key: w.grad if w.grad is not None else torch.zeros_like(w) for key, w in weights.items()}
    record["value"] = value.detach().double()
    for tensor in record.values():
        dist.all_reduce(tensor)
        tensor /= world
    return record


def find(name: str) -> Callable[[], Any]:
    """What makes the loss of a name. Raises UserError where there is none."""
    if ":" not in name:
        check_choice("loss", name, (*PAIR_LOSSES, SUPCON, "MODULE:NAME"))
        return (PAIR_LOSSES | {SUPCON: SupConLoss})[name]
    module, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        loss = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"loss {name}: {error}; MODULE is looked for in the current folder first") from None
    return loss if isinstance(loss, type) else lambda: loss


if __name__ == "__main__":
    command(CheckContrastive, check)
