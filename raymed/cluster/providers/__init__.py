"""The places a cluster can be in, a module each, named as `up` names them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from raymed.cluster.state import Cluster
from raymed.config import check_choice

PROVIDERS = ("local", "onprem", "aws", "gcp", "kuberay")


@dataclass(frozen=True)
class Line:
    """One part of a cluster, as `status` tells of it."""

    name: str
    is_up: bool
    detail: str = ""
    """Where it listens, how much it has; of what is down, what to do."""


class Provider(Protocol):
    """A module that brings clusters up in one place.

    Config: a frozen dataclass, whose fields are the flags of `up`.
    """

    Config: type

    def up(self, config: Any) -> Cluster:
        """Bring a cluster up, or find it up, and return it; saved with `raymed.cluster.state.save` from the first thing
        started on, so that `down` ends half a cluster too. Raises UserError for what the user can mend."""
        ...

    def status(self, cluster: Cluster) -> Sequence[Line]:
        """How each part is, found by asking it."""
        ...

    def down(self, cluster: Cluster) -> None:
        """End all of it. Nothing that it started is left; what it stored stays."""
        ...

    def reached(self, cluster: Cluster) -> AbstractContextManager[str]:
        """Within: the URL of Ray's dashboard, by which jobs are submitted; through a tunnel where need be."""
        ...

    def logs(self, cluster: Cluster) -> Mapping[str, Callable[[], str]]:
        """Name -> what reads the last lines, of each part that has a log; nobody is asked before. A name is one word,
        and PART@HOST where several hosts may have that part."""
        ...


def provider(name: str) -> Provider:
    """The module of a provider. Raises UserError for an unknown one."""
    check_choice("provider", name, PROVIDERS)
    return import_module(f"{__name__}.{name}")  # type: ignore[return-value]
