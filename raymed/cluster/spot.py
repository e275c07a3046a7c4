"""On a machine that a cloud may take back: ask the machine's metadata for a notice, and tell Ray to drain its node.

    python -m raymed.cluster.spot --cloud aws        beside `ray start`, until the notice has come

A drained node gets no new work, and a training on it saves its state and goes on elsewhere. AWS gives about two
minutes, GCP half a minute before preemption, an hour before maintenance. Ends with 0 when the node is being drained.
"""

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import httpx

from raymed.config import UserError, check_range

_AWS, _GCP = "http://169.254.169.254", "http://metadata.google.internal"
_TIMEOUT_S = 2.0  # it is on this machine's own host
_CONNECT_S = 10.0
_TOKEN_S = 21600
_REBALANCE_S = 600  # a recommendation names no time: two minutes' notice may follow at any
_PREEMPTED_S = 25  # of the thirty that GCP gives
_MAINTENANCE_S = 3300  # of the hour


@dataclass(frozen=True)
class Notice:
    """The machine will be taken away."""

    reason: str
    seconds: int
    """From now on."""


@dataclass(frozen=True)
class SpotConfig:
    """How the metadata are asked, and which node is drained.

    cloud: whose machine this is.
    address: of the cluster; empty: $RAY_ADDRESS, else the one that this machine's Ray belongs to.
    node_id: of Ray's node; empty: the only one on this machine.
    rebalance: drain on AWS's rebalance recommendation too, which comes earlier, and often for nothing.
    poll_s: seconds between two questions.
    """

    cloud: Literal["aws", "gcp"] = "aws"
    address: str = ""
    node_id: str = ""
    rebalance: bool = False
    poll_s: float = 2.0

    def __post_init__(self) -> None:
        check_range("poll-s", self.poll_s, 0, low_open=True)


class Aws:
    """Notices of EC2, by IMDSv2. $AWS_EC2_METADATA_SERVICE_ENDPOINT leads elsewhere, as for AWS's own tools."""

    def __init__(self, rebalance: bool = False):
        base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or _AWS
        self._client = httpx.Client(base_url=base.rstrip("/"), timeout=_TIMEOUT_S, trust_env=False)
        self._rebalance, self._token = rebalance, ""

    def notice(self) -> Notice | None:
        """What the machine has been told, or None. Raises httpx.HTTPError where nobody answers."""
        if action := self._get("/latest/meta-data/spot/instance-action"):
            return Notice(f"spot: {action['action']}", max(0, int(_until(action["time"]))))
        if self._rebalance and self._get("/latest/meta-data/events/recommendations/rebalance"):
            return Notice("spot: rebalance recommendation", _REBALANCE_S)
        return None

    def _get(self, path: str) -> dict[str, str] | None:
        """None for 404: there is no notice. A token that has run out is exchanged."""
        for _ in range(2):
            if not self._token:
                lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
                self._token = self._client.put("/latest/api/token", headers=lifetime).raise_for_status().text
            answer = self._client.get(path, headers={"X-aws-ec2-metadata-token": self._token})
            if answer.status_code != 401:
                break
            self._token = ""
        if answer.status_code == 404:
            return None
        return answer.raise_for_status().json()


class Gcp:
    """Notices of Compute Engine. $GCE_METADATA_HOST leads elsewhere, as for Google's own tools."""

    def __init__(self) -> None:
        host = os.environ.get("GCE_METADATA_HOST")
        base = f"{f'http://{host}' if host else _GCP}/computeMetadata/v1/instance"
        flavor = {"Metadata-Flavor": "Google"}
        self._client = httpx.Client(base_url=base, headers=flavor, timeout=_TIMEOUT_S, trust_env=False)

    def notice(self) -> Notice | None:
        """What the machine has been told, or None. Raises httpx.HTTPError where nobody answers."""
        if self._get("/preempted") == "TRUE":
            return Notice("spot: preempted", _PREEMPTED_S)
        if (event := self._get("/maintenance-event")).startswith("TERMINATE"):
            return Notice(f"maintenance: {event}", _MAINTENANCE_S)
        return None

    def _get(self, path: str) -> str:
        return self._client.get(path).raise_for_status().text.strip()


def _until(moment: str) -> float:
    """Seconds from now to a time such as 2030-01-01T10:00:00Z."""
    return (datetime.fromisoformat(moment).astimezone(UTC) - datetime.now(UTC)).total_seconds()


def watch(source: Aws | Gcp, drain: Callable[[Notice], bool], poll_s: float = 2.0) -> Notice:
    """Ask until there is a notice, drain, and return it. What cannot be asked or drained now is tried again: one line
    says so."""
    silent = refused = False
    while True:
        try:
            notice, silent = source.notice(), False
        except (httpx.HTTPError, ValueError, KeyError) as error:
            if not silent:
                print(f"the machine's metadata do not answer ({error}): asking on", file=sys.stderr, flush=True)
            notice, silent = None, True
        if notice is not None:
            print(f"{notice.reason}, in {notice.seconds} s", flush=True)
            if drain(notice):
                return notice
            if not refused:
                print("Ray did not take it: trying again", file=sys.stderr, flush=True)
            refused = True
        time.sleep(poll_s)


def drain_node(address: str, node_id: str, notice: Notice) -> bool:
    """Tell Ray that its node will go. False where it cannot be told, or refuses."""
    words = [str(Path(sys.executable).with_name("ray")), "drain-node", f"--address={address}", f"--node-id={node_id}"]
    words += ["--reason=DRAIN_NODE_REASON_PREEMPTION", f"--reason-message={notice.reason}"]
    words += [f"--deadline-remaining-seconds={notice.seconds}"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        print((done.stderr or done.stdout).strip()[-500:], file=sys.stderr, flush=True)
    return done.returncode == 0


def own_node(address: str) -> tuple[str, str]:
    """(address of the cluster, id of this machine's Ray node). Raises UserError where there is none, or several."""
    import ray

    _reached(address)
    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray node runs on this machine ({error}): start the watcher after `ray start`") from None
    try:
        context, here = ray.get_runtime_context(), ray.util.get_node_ip_address()
        ids = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == here]
        gcs = context.gcs_address
    finally:
        ray.shutdown()
    if len(ids) != 1:
        raise UserError(f"{len(ids)} Ray nodes have the address {here} ({', '.join(ids)}): name one with --node-id")
    return gcs, ids[0]


def _reached(address: str) -> None:
    """Ray would ask a dead address for minutes. Raises UserError where nothing listens there."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):  # "", "auto"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise UserError(f"no Ray answers at {address} ({error}): give --address, or start the watcher later") from None


def run(config: SpotConfig) -> str:
    """Watch until the node is being drained."""
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    node_id = config.node_id
    if not (address and node_id):
        address, node_id = own_node(address)
    print(f"watching for notices of {config.cloud} for node {node_id} of {address}", flush=True)
    source = Aws(config.rebalance) if config.cloud == "aws" else Gcp()
    notice = watch(source, lambda notice: drain_node(address, node_id, notice), config.poll_s)
    return f"node {node_id} is being drained ({notice.reason})"


if __name__ == "__main__":
    from raymed.command import command

    command(SpotConfig, run)
