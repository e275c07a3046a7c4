"""Scoring a split over all workers, with the same bits for any number of them.

Batches are fixed by the order of the manifest and dealt out whole, so that a sample is always computed in the same
company. Every worker computes the same number of batches (networks may communicate); one that has none left computes a
batch again and drops it. The meters then put the samples back in manifest order.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from raymed.data.dataset import Batch, DataSet
from raymed.distributed import all_gather_object, rank, world_size
from raymed.ledger import HOST_TO_DEVICE, span
from raymed.metrics.meters import Meter
from raymed.tasks.task import Phase
from raymed.train.nets import Networks

_BATCH = 128


class Feed:
    """Batches of a data set on the device, with the cached outputs of frozen networks where a phase keeps them."""

    def __init__(self, data: DataSet, device: torch.device):
        self.data = data
        self.device = device
        self.cached: dict[str, Tensor] = {}

    def batch(self, rows: np.ndarray) -> Batch:
        """The images of these rows, or what was cached in their place."""
        batch = self._cached_batch(rows) if self.cached else self.data.batch(rows)
        with span(HOST_TO_DEVICE):
            return batch.to(self.device)

    def _cached_batch(self, rows: np.ndarray) -> Batch:
        where = torch.as_tensor(rows)
        cached = {name: values[where] for name, values in self.cached.items()}
        return Batch(None, torch.as_tensor(self.data.labels[rows]), torch.as_tensor(self.data.rows[rows]), cached)

    def keep_frozen(self, phase: Phase, networks: Networks) -> None:
        """Compute what the untrained networks say of every image, once. Collective."""
        rows = np.concatenate([self.data.splits[name] for name in sorted(self.data.splits)])
        parts = []
        with torch.no_grad():
            for chunk, counts in _shares(rows):
                if counts:
                    outputs = phase.task.frozen(self.batch(chunk), networks)
                    parts.append((chunk, {name: value.float().cpu() for name, value in outputs.items()}))
        gathered = [part for parts in all_gather_object(parts) for part in parts]
        for name in gathered[0][1]:
            first = gathered[0][1][name]
            values = torch.zeros(len(self.data.labels), *first.shape[1:])
            for chunk, outputs in gathered:
                values[torch.as_tensor(chunk)] = outputs[name]
            self.cached[name] = values


def evaluate(phase: Phase, networks: Networks, feed: Feed, split: str) -> dict[str, Meter]:
    """The phase's meters after the whole split, alike on every worker. Collective."""
    meters = phase.task.meters()
    with networks.averaged():
        for chunk, counts in _shares(feed.data.splits[split]):
            batch = feed.batch(chunk)
            prediction = phase.task.predict(batch, networks)
            for meter in meters.values() if counts else ():
                meter.update(prediction, batch, batch.index)
    gathered = all_gather_object(meters)
    whole = phase.task.meters()
    for worker in gathered:
        for name, meter in whole.items():
            meter.merge(worker[name])
    return whole


def values(meters: dict[str, Meter]) -> dict[str, float]:
    """All meters' values in one dictionary."""
    return {name: value for meter in meters.values() for name, value in meter.compute().items()}


def _shares(rows: np.ndarray) -> Iterator[tuple[np.ndarray, bool]]:
    """This worker's batches of the rows, each with whether it counts."""
    chunks = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
    rounds = -(-len(chunks) // world_size())
    for k in range(rank(), rounds * world_size(), world_size()):
        yield (chunks[k], True) if k < len(chunks) else (chunks[0], False)


def shard(batch_rows: np.ndarray, accumulate: int) -> list[np.ndarray]:
    """This worker's rows of every micro-batch: micro-batch k is the k-th piece of the global batch, and worker r has
    the r-th piece of that, so that a micro-batch holds the same samples for any number of workers."""
    return [np.array_split(micro, world_size())[rank()] for micro in np.array_split(batch_rows, accumulate)]
