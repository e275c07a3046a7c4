"""Nodes that a cluster's autoscaler could still start.

Ray's autoscaler keeps to itself how far it may go. Ray has a place for that in a cluster's state, which Ray Train and
Ray Data read too, but fills it in nowhere. The head does it, once Ray has started there:

    python -m raymed.train.places.growth ~/ray_bootstrap_config.yaml     # the file that `ray up` has left
    python -m raymed.train.places.growth kuberay                         # $RAY_CLUSTER_NAME, as Kubernetes knows it
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymed.command import exit_code
from raymed.config import UserError

WHO_KNOWS = "`python -m raymed.cluster logs autoscaler` tells why none comes"
_HEAD = "raymed_head"
_WORKERS = "raymed_workers"  # beside the limits of resources: how many workers of all kinds together
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_OWN = ("memory", "object_store_memory")  # a node says itself what it has of these, whatever was stated

Node = Mapping[str, float]


@dataclass(frozen=True)
class Growth:
    """What may come: `nodes`, by their resources, `most` of them at a time."""

    nodes: tuple[Node, ...] = ()
    most: int = 0

    def best(self, worth: Callable[[Node], float]) -> list[Node]:
        """Those that may come together and are worth most."""
        return sorted(self.nodes, key=worth, reverse=True)[: self.most]


def growth(live: Sequence[Node]) -> Growth:
    """What the connected cluster's autoscaler could add to its live nodes; nothing where none has said so."""
    from ray._private.state import state  # Ray has no public way

    return _beyond(state.get_cluster_config(), live)


def _beyond(config: Any, live: Sequence[Node]) -> Growth:
    groups = [group for group in config.node_group_configs if group.name != _HEAD] if config else []
    left, nodes = list(live), []
    for group in sorted(groups, key=lambda group: -len(group.resources)):  # one with a GPU has what one without has
        kind = dict(group.resources)
        there = [node for node in left if _is_of(node, kind)]
        left = [node for node in left if not _is_of(node, kind)]
        # Of memory that nobody states, nobody can say that it will not do.
        nodes += [{"memory": sys.maxsize} | kind] * max(group.max_count - len(there), 0)
    most = config.max_resources[_WORKERS] - (len(live) - len(left)) if groups else 0
    return Growth(tuple(nodes), min(max(most, 0), len(nodes)))


def _is_of(node: Node, kind: Node) -> bool:
    return all(node.get(name, 0) == amount for name, amount in kind.items() if name not in _OWN)


def described(config: Mapping[str, Any]) -> Any:
    """How far a cluster's autoscaler may go, in Ray's own form (`ClusterConfig`).

    Args:
        config: as Ray's autoscaler reads it: available_node_types, head_node_type, max_workers.

    Raises:
        UserError: it is something else.
    """
    from ray.core.generated.autoscaler_pb2 import ClusterConfig  # type: ignore[attr-defined]

    try:
        head, most = config["head_node_type"], int(config["max_workers"])
        made = ClusterConfig(max_resources={_WORKERS: most})
        for name, kind in config["available_node_types"].items():
            count = 1 if name == head else min(int(kind.get("max_workers", 0)), most)
            group = made.node_group_configs.add(name=_HEAD if name == head else name, max_count=count)
            group.resources.update({resource: int(amount) for resource, amount in kind["resources"].items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"this is no configuration of an autoscaler ({type(error).__name__}: {error})") from None
    return made


def tell(config: Mapping[str, Any], address: str) -> None:
    """Put it into the state of the cluster whose GCS is at `address`."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    GcsClient(address=address).report_cluster_config(described(config).SerializeToString())


def read(source: str) -> Mapping[str, Any]:
    """The autoscaler's configuration: of a file, or for "kuberay" of the RayCluster that this pod belongs to.

    Raises UserError where it cannot be had.
    """
    if source == "kuberay":
        return _of_kubernetes()
    import yaml

    try:
        return yaml.safe_load(Path(source).expanduser().read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{source} cannot be read: {error}") from None


def _of_kubernetes() -> Mapping[str, Any]:
    from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

    if "RAY_CLUSTER_NAME" not in os.environ or not _NAMESPACE.is_file():
        raise UserError(
            "this is no pod of KubeRay's ($RAY_CLUSTER_NAME, a service account): give the autoscaler's file"
        )
    return AutoscalingConfigProducer(os.environ["RAY_CLUSTER_NAME"], _NAMESPACE.read_text().strip())()


def main(words: Sequence[str]) -> None:
    """Tell the cluster at $RAY_ADDRESS, else the one that runs on this machine."""
    from ray._private.services import canonicalize_bootstrap_address_or_die

    if len(words) != 1:
        raise UserError("usage: python -m raymed.train.places.growth FILE|kuberay")
    tell(read(words[0]), canonicalize_bootstrap_address_or_die(os.environ.get("RAY_ADDRESS", "auto")))


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
