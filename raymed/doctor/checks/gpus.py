"""Whether the GPUs that are there compute."""

from pathlib import Path

from raymed.doctor import there
from raymed.doctor.finding import Finding, failure, ok, warning
from raymed.doctor.nodes import answers, probes, told
from raymed.doctor.place import Place

_REMEDY = (
    "compare `nvidia-smi` with `python -c 'import torch; print(torch.version.cuda)'`: a torch for CPUs, or one for a "
    "newer CUDA than the driver's, sees no GPU; a container needs --gpus all"
)


def this_machine(place: Place) -> Finding:
    """Each GPU multiplies two matrices."""
    import torch

    devices = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    if not devices and not torch.cuda.is_available():
        return ok("no GPU here: work runs on the CPU")
    try:
        return ok(f"{there.multiplied()} multiplied two matrices")
    except RuntimeError as error:
        return failure(f"{', '.join(devices) or 'a GPU'} is there, and {error}", _REMEDY)


def on_nodes(place: Place) -> Finding:
    """A GPU of each node that offers some multiplies two matrices."""
    with probes(gpus=1) as nodes:
        found, late = answers({name: node.multiplied.remote() for name, node in nodes.items()})
    busy = [name for name, problem in late.items() if problem.startswith("no answer")]
    broken = {name: problem for name, problem in late.items() if name not in busy}
    if broken:
        return failure("; ".join(told(broken)), f"{_REMEDY}; or start the node without --num-gpus")
    if busy:
        return warning(f"in use, so not tried: a GPU of {', '.join(busy)}", "run the doctor again when it is free")
    if not nodes:
        return ok("no node offers a GPU")
    return ok("; ".join(f"{name}: {devices}" for name, devices in found.items()))
