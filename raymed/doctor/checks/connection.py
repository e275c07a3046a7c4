"""Whether Ray lets in who has the token, and nobody else."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from raymed.doctor.finding import Finding, failure, ok
from raymed.doctor.nodes import connected_plainly
from raymed.doctor.place import Place

_OPEN = (
    "start Ray with RAY_AUTH_MODE=token and a token of its own (`ray get-auth-token --generate`; RAY_AUTH_TOKEN_PATH): "
    "who reaches these ports runs what he likes on the cluster"
)

_DEAD = (
    "`python -m raymed.cluster status` says what is up; where the head is dead: down, then up. Else correct "
    "RAY_ADDRESS, which is HOST:PORT of the head of a cluster that this machine is a node of"
)
_REFUSED = "AuthenticationError"  # of Ray's


def connects(place: Place) -> Finding:
    """The head answers, takes the token, lets this process in as a driver, and one task runs."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    address = str(place.ray)
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path and not Path(path).is_file():  # Ray would end this process
        return failure(f"there is no token at {path}", _token())
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        return failure(f"nothing answers at {address} ({error})", _DEAD)
    try:
        GcsClient(address=address)  # `ray.init` would not say that it is the token
    except AuthenticationError:
        return failure(f"{address} does not take the token of this machine", _token())
    with connected_plainly():
        ray.get(ray.remote(num_cpus=0)(_nothing).remote(), timeout=40)
        has = ray.cluster_resources()
        alive = sum(node["Alive"] for node in ray.nodes())
    return ok(f"{place.ray}: {alive} node(s), {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs; a task ran")


def asks_for_token(place: Place) -> Finding:
    """The dashboard and the head's own port are asked with the token and without one."""
    import requests
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    with connected_plainly() as context:
        dashboard = place.dashboard or (f"http://{context.dashboard_url}" if context.dashboard_url else "")
    doors = []
    if dashboard:
        url = f"{dashboard.rstrip('/')}/api/jobs/"
        with_token = requests.get(url, headers=get_auth_headers_if_auth_enabled({}), timeout=15).status_code
        if with_token != 200:
            return failure(f"the dashboard {dashboard} answers {with_token} to this machine's token", _token())
        doors += ["the dashboard"] if requests.get(url, timeout=15).status_code == 200 else []
    without = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")} | {"RAY_AUTH_MODE": "disabled"}
    status = [sys.executable, "-m", "ray.scripts.scripts", "status", f"--address={place.ray}"]
    done = subprocess.run(status, env=without, capture_output=True, text=True, timeout=40)
    doors += [str(place.ray)] if done.returncode == 0 else []
    if doors:
        return failure(f"{' and '.join(doors)} let in a caller without a token", _OPEN)
    if _REFUSED not in done.stderr:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return failure(f"{place.ray} did not say whether it lets in a caller without a token: {last[:300]}", _DEAD)
    return ok(f"{place.ray}{' and the dashboard' if dashboard else ''} let in who has the token, and nobody else")


def _token() -> str:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH", "FILE")
    return f"give the cluster's own token: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH={path}"


def _nothing() -> None:
    """What a task does."""
