"""A checkpoint that outlives its world size, engine and ZeRO stage, and is written while training goes on.

A folder: `weights.safetensors` (NETWORK.NAME), `average.safetensors` (the same with averages, where kept),
`optimizer.safetensors` (NETWORK.PARAMETER/KEY), `memory.safetensors` (what the task remembers, if anything), and
`state.json` (phase, step, best value so far, file hashes). Randomness needs no state: every draw is a function of the
step.

Saving copies the state, which is all that training waits for; a thread writes the folder, names it in `index.json` and
brings both to the bucket, where the storage has one. A folder that no index names is never found, and the next save
removes it, so a process may be killed at any point.
"""

import errno
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

from filelock import FileLock
from torch import Tensor

from raymed.config import UserError
from raymed.distributed import agreed, all_gather_object, rank
from raymed.ledger import CHECKPOINT, span
from raymed.storage import exists, is_remote, local_folder_copy, push_file, remote_of, working_copy, write_atomic
from raymed.storage.client import give_up
from raymed.train.checkpoints.bucket import Bucket
from raymed.train.checkpoints.files import damaged, read_state, read_tensors, sync, write_folder
from raymed.train.checkpoints.index import Index
from raymed.train.engines.engine import OptimizerState
from raymed.train.nets import Networks

_WEIGHTS, _AVERAGE, _OPTIMIZER, _MEMORY = (
    "weights.safetensors",
    "average.safetensors",
    "optimizer.safetensors",
    "memory.safetensors",
)


@dataclass
class Progress:
    """How far a phase has come."""

    phase: str
    step: int = 0
    """Steps done."""
    evaluation: int = 0
    """Evaluations done."""
    best: float | None = None
    stale: int = 0
    """Evaluations since the best one."""
    finished: bool = False
    ema_updates: dict[str, int] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one phase: the best, the last `keep_last` and the pinned ones; nothing else is kept.

    Only rank 0 writes. A save that fails is a UserError at the next `save` or `wait`, of every worker.
    """

    def __init__(self, folder: Path, keep_last: int = 1, log: Path | None = None):
        """log: a file that tells of all steps up to a checkpoint, and is in the bucket before that counts there."""
        self.folder, self.keep_last, self.log = folder, keep_last, log
        self.index = folder / "index.json"
        url = remote_of(folder)
        self.bucket = Bucket(folder, url) if url else None
        self._saving: Future[None] | None = None

    def find(self, which: str) -> Path | None:
        """Folder of "last", "best" or of a checkpoint of that name, or None. A save in flight does not count yet.

        Where somebody has removed the last one, the one before is the last.
        """
        index = self._index()
        name = {"last": index.last, "best": index.best}.get(which, which)
        return self.folder / name if name in index.names() else None

    def save(self, networks: Networks, progress: Progress, best: bool) -> None:
        """Save a checkpoint and make it the last one, and the best one if it is.

        Collective. Returns when the state is copied; the rest is done by a thread. One save is in flight at most.
        """
        with span(CHECKPOINT):
            agreed(self.close)
            files = _copies(networks)
            progress.ema_updates = {name: average.updates for name, average in networks.averages.items()}
            if rank() == 0:
                self._saving = _in_background(partial(self._save, files, asdict(progress), best))

    def wait(self) -> None:
        """Wait until what was saved is whole: here, in the bucket and on every node. Collective."""
        with span(CHECKPOINT):
            agreed(self.close)
            self._spread()

    def close(self) -> None:
        """Let the save in flight end, and raise what went wrong with it. Not collective: the place is a `finally`.

        Whoever loses patience with a bucket that does not answer presses Ctrl-C.
        """
        saving, self._saving = self._saving, None
        try:
            if saving:
                saving.result()
        except KeyboardInterrupt:
            give_up()
            raise

    def failed(self) -> bool:
        """Whether the last save has come to nothing; the next `save` or `wait` says why."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def pull(self) -> None:
        """Bring the bucket's checkpoints to every node, and to the bucket what only rank 0's node has. Collective.

        Raises UserError where the workers do not all find the same last one then.
        """
        if self.bucket:
            agreed(lambda: self._meet() if rank() == 0 else None)
            self._spread()
        found: list[Path | None] = []
        agreed(lambda: found.append(self.find("last")))
        names = sorted({last.name if last else "none" for last in all_gather_object(found[0])})
        if len(names) > 1:
            raise UserError(
                f"the workers do not find the same last checkpoint in {self.folder}, but {' and '.join(names)}: give a "
                "storage that all nodes see, a shared folder or s3://BUCKET/PREFIX"
            )

    def refresh(self) -> None:
        """Bring here what has come further in the bucket; nothing goes there. Not collective."""
        if self.bucket and (there := self.bucket.index()).names():
            with self._locked():
                here = self._index()
                if here.step <= there.step:
                    self._adopt(there)

    def pin(self, which: str, reason: str) -> Path:
        """Keep a checkpoint ("last", "best" or a name) for ever. Returns its folder. A save in flight is waited for."""
        if self.bucket:
            self._meet()
        folder = self.find(which)
        if folder is None:
            raise UserError(f"{self.folder} has no checkpoint {which!r}")
        with self._locked():
            index = self._index()
            index = replace(index, pinned=index.pinned | {folder.name: reason})
            self._write_index(self.bucket.put(index) if self.bucket else index)
        return folder

    def _save(self, files: dict[str, dict[str, Tensor]], state: dict, best: bool) -> None:
        try:
            with self._locked():
                index = self._save_here(files, state, best)
                if self.bucket:
                    self._upload(self.bucket, index)
        except OSError as error:
            raise self._not_written(error, files, state["step"]) from error

    def _save_here(self, files: dict[str, dict[str, Tensor]], state: dict, best: bool) -> Index:
        index = self._index()
        name = index.free_name(state["step"])
        try:
            write_folder(self.folder / name, files, state)
            index = index.saved(name, best, self.keep_last)
            self._write_index(index)
        finally:
            self._prune()
        return index

    def _upload(self, bucket: Bucket, index: Index) -> None:
        try:
            if self.log:
                push_file(self.log)
            self._write_index(bucket.put(index))
        except UserError as error:
            raise UserError(
                f"{error}. The checkpoint is kept in {self.folder / str(index.last)}: the same command goes on from "
                f"it, and brings it to {bucket.url}"
            ) from error

    def _meet(self) -> None:
        """Of here and there, what has come further counts; what was pinned on either side stays pinned."""
        assert self.bucket
        with self._locked():
            here, there = self._index(), self.bucket.index()
            ahead = here if here.step > there.step else there
            index = replace(ahead, pinned=there.pinned | here.pinned)
            self._adopt(index)
            if index != there:
                if self.log:
                    push_file(self.log)
                self.bucket.put(index)

    def _spread(self) -> None:
        """Every other disk gets what the bucket has. Collective."""
        if self.bucket:  # whoever comes second to a disk finds it there; LOCAL_RANK does not tell disks apart
            agreed(self._follow if rank() > 0 else lambda: None)

    def _follow(self) -> None:
        assert self.bucket
        with self._locked():
            self._adopt(self.bucket.index())

    def _adopt(self, index: Index) -> None:
        assert self.bucket
        self.bucket.take(index.names())
        if index.names() or self.index.exists():
            self._write_index(index)
            self._prune()

    def _index(self) -> Index:
        """The checkpoints that are whole here."""
        if not self.index.is_file():
            return Index()
        index = Index.parse(self.index.read_bytes())
        if index is None:
            then = f"it is fetched from {self.bucket.url} again" if self.bucket else "the phase begins again"
            raise UserError(f"{self.index} is damaged. Remove it: {then}")
        return index.within({path.name for path in self.folder.glob("step-*")})

    def _write_index(self, index: Index) -> None:
        write_atomic(self.index, index.text())
        sync(self.folder)

    def _prune(self) -> None:
        """Remove what the index does not name, and what a killed process has left."""
        names = self._index().names()
        for path in self.folder.glob("*step-*"):
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(f".{self.index.name}.*"):
            path.unlink(missing_ok=True)

    def _locked(self) -> FileLock:
        """Held while the index changes: somebody may pin while a run saves."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder.with_name(f".{self.folder.name}.lock"))

    def _not_written(self, error: OSError, files: dict[str, dict[str, Tensor]], step: int) -> UserError:
        last = self._index().last
        kept = f"{last} is kept, and the same command goes on from it" if last else "there is none yet"
        what = f"the checkpoint of step {step} cannot be written to {self.folder}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
            free = shutil.disk_usage(self.folder).free
            room = f"it needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free"
            return UserError(f"{what}: {room}. Make room; {kept}")
        return UserError(f"{what}: {error.strerror or error}. Of the checkpoints before, {kept}")


def origin_of(location: str) -> Path:
    """The checkpoint that a phase may start from, here or brought here: a checkpoint's folder, or the best one of a
    phase's checkpoints. location: a path, or s3://... Raises UserError where there is nothing."""
    folder = working_copy(location) if is_remote(location) else Path(location).expanduser()
    if not exists(folder):
        raise UserError(f"{location} is not a checkpoint: there is nothing of that name")
    checkpoints = Checkpoints(folder)
    checkpoints.refresh()  # it may have been trained further on another node
    return checkpoints.find("best") or local_folder_copy(folder)


def load_weights(folder: Path, averaged: bool = True) -> dict[str, Tensor]:
    """NETWORK.NAME -> tensor of a checkpoint; the averages where it has them, unless told otherwise."""
    state = read_state(folder)
    file = _AVERAGE if averaged and _AVERAGE in state["sha256"] else _WEIGHTS
    return read_tensors(folder, file, state)


def load_memory(folder: Path) -> dict[str, Tensor]:
    """What the task remembered at a checkpoint."""
    state = read_state(folder)
    return read_tensors(folder, _MEMORY, state) if _MEMORY in state["sha256"] else {}


def resume(networks: Networks, folder: Path, phase: str) -> Progress:
    """Put weights and memory where the checkpoint left them and return how far it had come.

    Engines are built between this and `resume_optimizers`: they copy the weights they find.
    """
    state = read_state(folder)
    if not {f.name for f in fields(Progress)} < state.keys():
        raise damaged(folder / "state.json", "it does not say how far the phase had come")
    if state["phase"] != phase:
        raise UserError(f"{folder} is a checkpoint of phase {state['phase']!r}, not of {phase!r}")
    weights = read_tensors(folder, _WEIGHTS, state)
    if problems := _misfits(networks, weights):
        raise UserError(f"{folder} is a checkpoint of another model: {'; '.join(problems[:3])}")
    networks.load_weights(weights)
    networks.load_memory(load_memory(folder))
    return Progress(**{f.name: state[f.name] for f in fields(Progress)})


def resume_optimizers(networks: Networks, folder: Path, progress: Progress) -> None:
    """Put optimiser states and averages where the checkpoint left them. Collective."""

    def read() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        state = read_state(folder)
        averages = read_tensors(folder, _AVERAGE, state) if networks.averages else {}
        return read_tensors(folder, _OPTIMIZER, state), averages

    tensors, averages = agreed(read)
    for name, engine in networks.engines.items():
        engine.load_optimizer_state(_unflatten(tensors, name))
    for name, average in networks.averages.items():
        average.load(_part(averages, name), progress.ema_updates[name])


def _copies(networks: Networks) -> dict[str, dict[str, Tensor]]:
    """File name -> copies on the CPU of the tensors in it. Collective; they are whole on rank 0."""
    states = {name: engine.optimizer_state() for name, engine in networks.engines.items()}
    files = {_WEIGHTS: networks.weights(averaged=False), _OPTIMIZER: _flatten(states)}
    if networks.averages:
        files[_AVERAGE] = networks.weights(averaged=True)
    if memory := networks.saved_memory():
        files[_MEMORY] = memory
    return files


def _in_background(do: Callable[[], None]) -> Future[None]:
    """Python waits for such a thread before it exits."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    future = executor.submit(do)
    executor.shutdown(wait=False)
    return future


def _misfits(networks: Networks, found: dict[str, Tensor]) -> list[str]:
    """Where a checkpoint's weights are not those of the networks."""
    wanted = {
        f"{network}.{name}": value
        for network in networks.networks
        for name, value in networks.module(network).state_dict().items()
    }
    shapes = [{name: tuple(value.shape) for name, value in side.items()} for side in (wanted, found)]
    return [
        f"{name} has shape {shapes[1].get(name, 'none')}, wanted {shapes[0].get(name, 'none')}"
        for name in sorted(wanted.keys() | found.keys())
        if shapes[0].get(name) != shapes[1].get(name)
    ]


def _part(tensors: dict[str, Tensor], network: str) -> dict[str, Tensor]:
    """NAME -> tensor of one network."""
    prefix = f"{network}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _flatten(states: dict[str, OptimizerState]) -> dict[str, Tensor]:
    return {
        f"{network}.{parameter}/{key}": value.contiguous()
        for network, state in states.items()
        for parameter, values in state.items()
        for key, value in values.items()
    }


def _unflatten(tensors: dict[str, Tensor], network: str) -> OptimizerState:
    state: OptimizerState = {}
    for name, value in _part(tensors, network).items():
        parameter, key = name.rsplit("/", 1)
        state.setdefault(parameter, {})[key] = value
    return state
