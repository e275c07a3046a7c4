"""Asking every node of a cluster: one actor on each, with time limits, and errors as lines."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from raymed.doctor import there

PATIENCE = 60.0
"""Seconds for an answer; the first one starts a process."""


@contextmanager
def connected_plainly() -> Iterator[Any]:
    """Within: this process is a driver of $RAY_ADDRESS, without raymed's settings on the nodes, which may lack raymed.
    What `ray.init` tells of the cluster is given."""
    import ray

    context = ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield context
    finally:
        ray.shutdown()


@contextmanager
def probes(
    *, gpus: float = 0, cpus_only: bool = False, as_jobs: bool = False, at_least: int = 0
) -> Iterator[dict[str, Any]]:
    """A `there.Probe` on every node, by the node's name.

    gpus: nodes that have so many, which are taken. cpus_only: nodes that have CPUs for work. as_jobs: with the settings
    that jobs take to the nodes. at_least: where there are fewer nodes, some get several.
    """
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from raymed.train.places.cluster import connected

    cloudpickle.register_pickle_by_value(there)
    kind = ray.remote(num_cpus=0, num_gpus=gpus)(there.Probe)
    with connected() if as_jobs else connected_plainly():
        chosen = [n for n in alive() if n["Resources"].get("GPU", 0) >= gpus]
        chosen = [n for n in chosen if n["Resources"].get("CPU") or not cpus_only]
        several = -(-at_least // len(chosen)) if chosen else 0
        actors = {}
        for node in chosen:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            for number in range(max(1, several)):
                name = name_of(node) if several <= 1 else f"{name_of(node)} #{number + 1}"
                actors[name] = kind.options(scheduling_strategy=strategy).remote()
        yield actors


def each(function: Callable[..., Any], *arguments: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """What a function of raymed returns on every node, with the settings that jobs take there; see `answers`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from raymed.train.places.cluster import connected

    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    with connected():
        asked = {}
        for node in alive():
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[name_of(node)] = remote.options(scheduling_strategy=strategy).remote(*arguments)
        return answers(asked)


def alive() -> list[dict[str, Any]]:
    """The nodes that live."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def name_of(node: Mapping[str, Any]) -> str:
    """What a person knows a node by."""
    return f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']}, {node['NodeID'][:8]})"


def answers(asked: Mapping[str, Any], seconds: float = PATIENCE) -> tuple[dict[str, Any], dict[str, str]]:
    """({name: answer}, {name: why there is none}) of references, after at most so many seconds."""
    import ray

    names = {reference: name for name, reference in asked.items()}
    done, late = ray.wait(list(names), num_returns=len(names), timeout=seconds) if names else ([], [])
    found, amiss = {}, {names[reference]: f"no answer within {seconds:g} s" for reference in late}
    for reference in done:
        try:
            found[names[reference]] = ray.get(reference)
        except Exception as error:  # whatever the node's own code raised comes back as it was
            amiss[names[reference]] = str(error).strip().splitlines()[-1][:300]
    return {name: found[name] for name in asked if name in found}, amiss


def told(amiss: Mapping[str, str]) -> list[str]:
    """Lines of what `answers` did not get."""
    return [f"{name}: {problem}" for name, problem in amiss.items()]
