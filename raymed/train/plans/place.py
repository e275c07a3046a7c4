"""Where the states of networks may lie: whole on every worker, in shards, or offloaded."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """How the states of networks lie on the workers."""

    stage: int
    """ZeRO's."""
    offload: bool = False

    def __str__(self) -> str:
        return f"ZeRO {self.stage}{' + offload' if self.offload else ''}"

    @property
    def flags(self) -> str:
        """What asks for it on a command line."""
        return f"--compute.zero-stage {self.stage}{' --compute.offload' if self.offload else ''}"


SHARDED = (Place(1), Place(2), Place(3))
OFFLOADED = (Place(2, True), Place(3, True))


def places(workers: int, gpu: bool) -> tuple[Place, ...]:
    """What there is to choose from, in the order of preference: one worker has nothing to shard, and only a GPU has
    another memory to offload to."""
    if workers == 1:
        return (Place(0), *OFFLOADED[: int(gpu)])
    return (Place(0), *SHARDED, *(OFFLOADED if gpu else ()))
