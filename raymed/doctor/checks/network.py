"""Whether requests arrive where they are sent: on this machine, to the services, and between the nodes of a cluster.

A proxy that is set for the internet swallows what is meant for 127.0.0.1 or for a node, unless NO_PROXY names it.
"""

from urllib.parse import urlsplit

from raymed.doctor import there
from raymed.doctor.finding import Finding, failure, ok
from raymed.doctor.nodes import answers, probes, told
from raymed.doctor.place import Place

_ADVICE = (
    "name them in NO_PROXY and no_proxy, as addresses and not as ranges, which S3's client does not read: export "
    "NO_PROXY={hosts}; export no_proxy=$NO_PROXY, here and where Ray's nodes are started"
)
_CLOSED = "; where no proxy is set, a firewall is between: open all ports between the nodes of a cluster"


def this_machine(place: Place) -> Finding:
    """A server on the loopback, and every service, gets the same requests with the proxy variables as without."""
    server = there.Answering("127.0.0.1")
    own = [(f"http://{host}:{server.port}", server.word) for host in ("127.0.0.1", "localhost")]
    targets = [*own, *((url, "") for url in place.services().values())]
    problems = [problem for url, word in targets if (problem := there.swallowed(url, word))]
    server.close()
    if problems:
        silent = [problem for problem in problems if problem.startswith("no answer")]
        advice = "start what does not answer, or correct its address. " if silent else ""
        return failure("; ".join(problems), advice + _ADVICE.format(hosts=_hosts(targets)))
    return ok(f"127.0.0.1, localhost{''.join(f', {name}' for name in place.services())} are reached")


def between_nodes(place: Place) -> Finding:
    """Each node reaches a server on the next one, MLflow and S3; this machine reaches one on every node."""
    with probes() as nodes:
        servers, amiss = answers({name: node.listen.remote() for name, node in nodes.items()})
        ring = list(servers.values())
        services = [(url, "") for url in (place.mlflow, place.s3) if url]
        asked = {}
        for number, name in enumerate(servers):
            asked[name] = nodes[name].swallowed.remote([ring[(number + 1) % len(ring)], *services])
        found, late = answers(asked)
        mine = [problem for url, word in ring if (problem := there.swallowed(url, word))]
    problems = [f"from {name}: {problem}" for name, amount in found.items() for problem in amount]
    problems += mine
    if amiss or late:
        return failure("; ".join(told(amiss | late)), "see whether these nodes still live (`ray status`)")
    if problems:
        return failure("; ".join(problems), _ADVICE.format(hosts=_hosts([*ring, *services])) + _CLOSED)
    return ok(f"this machine and {len(nodes)} node(s) reach each other on ports of their choice, and the services")


def _hosts(targets: list[tuple[str, str]]) -> str:
    return ",".join(dict.fromkeys(["localhost", "127.0.0.1", *(urlsplit(url).hostname or "" for url, _ in targets)]))
