"""Whether clocks agree: S3 refuses requests that are 15 minutes off, and who holds a lock is told by time."""

import time
from email.utils import parsedate_to_datetime

from raymed.doctor.finding import Finding, failure, ok, warning
from raymed.doctor.nodes import answers, probes, told
from raymed.doctor.place import Place

_LITTLE, _MUCH = 5.0, 60.0  # seconds
_REMEDY = "set the clocks by NTP on every machine (`timedatectl set-ntp true`, or chrony)"


def of_services(place: Place) -> Finding:
    """The Date header of each service beside the clock of this machine."""
    off, silent = {}, []
    for name, url in place.services().items():
        seconds = _off(url)
        if seconds is None:
            silent.append(name)
        else:
            off[name] = seconds
    return _judged(off, f"; no time from {', '.join(silent)}" if silent else "")


def on_nodes(place: Place) -> Finding:
    """The clock of each node beside that of this machine."""
    import ray

    with probes() as nodes:
        _, late = answers({name: node.time.remote() for name, node in nodes.items()})  # now all have started
        off = {}
        for name in nodes.keys() - late.keys():
            before = time.time()
            theirs: float = ray.get([nodes[name].time.remote()], timeout=20)[0]
            after = time.time()
            off[name] = _beyond(theirs - before, theirs - after)
    if late:
        return failure("; ".join(told(late)), "see whether these nodes still live (`ray status`)")
    return _judged(off, "")


def _off(url: str) -> float | None:
    """Seconds that a server is ahead of this machine, at least; None where it does not say its time."""
    import warnings

    import requests

    warnings.simplefilter("ignore")  # of certificates: another check looks at them
    before = time.time()
    try:
        answer = requests.get(url, timeout=10, allow_redirects=False, verify=False)
        theirs = parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (requests.exceptions.RequestException, KeyError, ValueError):
        return None
    return _beyond(theirs + 1 - before, theirs - time.time())  # a header has whole seconds


def _beyond(most: float, least: float) -> float:
    """Of a difference that lies between two bounds, what is sure."""
    return least if least > 0 else min(most, 0.0)


def _judged(off: dict[str, float], more: str) -> Finding:
    worst = max((abs(seconds) for seconds in off.values()), default=0.0)
    if worst <= _LITTLE:
        return ok(f"within {_LITTLE:g} s of {', '.join(off) or 'nobody'}{more}")
    ways = {name: f"{abs(s):.0f} s {'ahead of' if s > 0 else 'behind'}" for name, s in off.items() if abs(s) > _LITTLE}
    text = ", ".join(f"{name} is {way} this machine's clock" for name, way in ways.items())
    return (failure if worst > _MUCH else warning)(f"{text}{more}", _REMEDY)
