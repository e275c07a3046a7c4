"""Machines that you have: Linux hosts that SSH reaches, with a folder that all of them mount, or a bucket.

    python -m raymed.cluster up onprem --hosts admin@10.0.0.1 admin@10.0.0.2 --storage /mnt/raymed

The first is the head: Ray's head and MLflow. The others are workers. Each part is a systemd service (cluster/onprem/),
which comes back after a crash and a reboot, and writes to the journal. Dashboard and MLflow are reached from here by
SSH. On a host lie

    /etc/raymed/       whose cluster it is of, the token, the environment of the services with passwords and keys
    /var/lib/raymed/   working copies, caches, Ray's session, MLflow's database; `down` leaves it, without Ray's session

Ray's own launcher for such machines is not used: it takes any host key, leaves your private key on the head, ends every
Ray on a host with `ray stop`, and nothing that it starts comes back after a reboot.
"""

import dataclasses
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from raymed.cluster import state
from raymed.cluster.providers import Line, onprem_environment, onprem_host, tunnels
from raymed.cluster.providers.onprem_environment import GCS, MLFLOW
from raymed.cluster.providers.onprem_host import Machine
from raymed.cluster.providers.ssh import Failed, Host, check_here, on_each
from raymed.cluster.providers.tunnels import Tunnel
from raymed.cluster.services import Silent, mlflow, ray
from raymed.cluster.state import Cluster
from raymed.config import UserError
from raymed.storage import write_private

START_SECONDS = 300.0
_DASHBOARD = 8265
_NAME = re.compile(r"([A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9][\w.:-]*")
_PATH = re.compile(r"/[\w./+-]+")
_AGAIN = "python -m raymed.cluster up onprem, with the flags of the first time, brings it up to date"


@dataclass(frozen=True)
class Config:
    """A cluster of machines that you have. Its user there must be root, or may use sudo without a password."""

    storage: str
    """Where everything lasting goes: a folder that every host mounts at the same path, or s3://BUCKET/PREFIX, with the
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL and AWS_REGION of this shell or, where it has none, those
    that the cluster has."""
    hosts: tuple[str, ...] = ()
    """[USER@]ADDRESS of each, as ssh takes it; the first is the head."""
    hosts_file: Path | None = None
    """A file with a host a line, in place of --hosts."""
    key: Path | None = None
    """The private key's file; None: what ssh finds."""
    ssh_config: Path | None = None
    """A file in place of ~/.ssh/config: ports, jump hosts."""
    venv: str = "/opt/raymed/venv"
    """The virtual environment on every host, with this raymed and this Ray."""
    install: bool = False
    """Make the virtual environment, or bring it up to date, where it is missing, has other versions or was not made of
    this project as it is now."""
    python: str = f"python3.{sys.version_info.minor}"
    """What makes the virtual environment."""
    wheels: str | None = None
    """With --install: a folder on every host that has all packages as wheels; nothing is fetched then."""
    environment: Path | None = None
    """A file of NAME=VALUE lines for the services and jobs on all hosts: AWS_CA_BUNDLE, REQUESTS_CA_BUNDLE and
    SSL_CERT_FILE (paths there), HTTPS_PROXY, NO_PROXY, NCCL_SOCKET_IFNAME, ... None: those that the cluster has; a file
    without lines takes them away."""
    head_works: bool = False
    """The head's host is a worker too. A single host always is; one that was, stays it until the cluster is down."""

    def __post_init__(self):
        if not self.storage.startswith("s3://") and not _PATH.fullmatch(self.storage):
            raise UserError(f"--storage must be an absolute path or s3://BUCKET/PREFIX, got {self.storage!r}")
        if not _PATH.fullmatch(self.venv):
            raise UserError(f"--venv must be an absolute path of letters, digits, . _ + and -, got {self.venv!r}")
        if self.wheels and not self.install:
            raise UserError("--wheels is for --install: give both")

    def names(self) -> list[str]:
        """The hosts. Raises UserError for none, for both flags, for one that is given twice or cannot be one."""
        if bool(self.hosts) == (self.hosts_file is not None):
            raise UserError(
                "give --hosts USER@ADDRESS ..., or --hosts-file FILE with one a line; the first is the head"
            )
        given = list(self.hosts) or _lines(self.hosts_file)
        for name in given:
            if not _NAME.fullmatch(name):
                raise UserError(f"a host is [USER@]ADDRESS, got {name!r}")
        if not given or len(set(given)) < len(given):
            raise UserError(f"hosts must be one or more, each of them once, got {', '.join(given) or 'none'}")
        return given


def up(config: Config) -> Cluster:
    """Bring it up, or up to date: hosts that are new in the list join, those no longer in it are left.

    Raises UserError, for all hosts at once and before anything is written to one of them: for one that cannot be
    reached or used, belongs to another cluster, lacks a bundle of certificates that it is to use, or has no Python or
    other versions. Later, but before a service is stopped or started, for what --install cannot make the same, and for
    storage that a host cannot write or does not share; at last, for a head that a host cannot reach; `down` then ends
    what there is. What is not in the list and cannot be ended is remembered, and told of.
    """
    names, before = config.names(), state.load()
    check_here(config.key, config.ssh_config)
    if before and before.facts["hosts"][0] != names[0]:
        raise UserError(f"the head is {before.facts['hosts'][0]}, and stays first: to change it, take the cluster down")
    number = before.facts["id"] if before else secrets.token_hex(8)
    machines = _usable(config, names, number)
    cluster = _planned(config, before, machines, number)
    _check_bundles(cluster, machines)
    state.save(onprem_environment.untried(cluster, before) if before else cluster)
    if config.install:
        _install(config, machines)
    _put(config, cluster, machines)
    cluster = _through_tunnels(cluster)
    _wait(config, cluster, machines)
    return cluster


def _lines(path: Path | None) -> list[str]:
    try:
        text = path.read_text() if path else ""
    except OSError as error:
        raise UserError(f"--hosts-file {path} cannot be read: {error.strerror}") from None
    return [line for line in (line.partition("#")[0].strip() for line in text.splitlines()) if line]


def _usable(config: Config, names: Sequence[str], number: str) -> list[Machine]:
    """The hosts as they are, in their order. Raises UserError, for all of them, for what is wrong with any."""
    key, ssh_config = (str(path.absolute()) if path else None for path in (config.key, config.ssh_config))
    found: dict[str, Machine] = {}

    def look(name: str) -> None:
        machine = found[name] = onprem_host.survey(Host(name, key, ssh_config), config.venv)
        if machine.mark and machine.mark.split()[0] != number:
            raise UserError(
                f"{name}: it belongs to a cluster that {machine.owner} brought up: take that down from there or, "
                "where nobody remembers it, remove /etc/raymed and the services raymed-* there"
            )
        if not config.install:
            onprem_host.check_versions(machine, config.venv)

    on_each(names, look)
    machines = [found[name] for name in names]
    addresses = [machine.address for machine in machines]
    if len(set(addresses)) < len(addresses):
        raise UserError(f"two hosts are one machine: {', '.join(f'{m.host.name} is {m.address}' for m in machines)}")
    if not config.install:
        onprem_host.check_pythons(machines, config.venv)
    return machines


def _planned(config: Config, before: Cluster | None, machines: Sequence[Machine], number: str) -> Cluster:
    """The cluster as it will be. Token, password and ports here stay what they were."""
    variables = onprem_environment.of_user(config.environment, before)
    ports = {name: tunnels.port_for(before, name) for name in ("dashboard", "mlflow")}
    addresses = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    token = state.folder() / "token"
    if not token.is_file():
        write_private(token, secrets.token_hex(32))
    environment = onprem_environment.of_clients(config.storage, addresses, token, before)
    names = [machine.host.name for machine in machines]
    works, worked = config.head_works or len(names) == 1, before is not None and before.facts.get("head_works", False)
    if worked and not works:
        print(f"{names[0]} stays a worker too, since jobs may run there; after `down` it need not be one", flush=True)
    had = _all_hosts(before) if before else []
    listed = {machine.address for machine in machines} | {name.rpartition("@")[2] for name in names}
    facts = {
        "variables": variables,
        "id": number,
        "hosts": names,
        "left": [host.name for host in had if host.name.rpartition("@")[2] not in listed],
        "head_works": works or worked,
        "key": machines[0].host.key,
        "ssh_config": machines[0].host.config,
        "head": machines[0].address,
        "tunnels": ports,
    }
    cluster = Cluster("onprem", addresses, environment, before.processes if before else (), facts)
    onprem_environment.check_free(variables, cluster)
    return cluster


def _check_bundles(cluster: Cluster, machines: Sequence[Machine]) -> None:
    """Raises UserError, for all hosts, for certificates that the services' user cannot read on one."""
    named = onprem_environment.bundles(cluster.facts["variables"])
    on_each(machines, lambda machine: onprem_host.check_readable(machine, named))


def _without_left(cluster: Cluster, machines: Sequence[Machine]) -> Cluster:
    """End the hosts that are no longer in the list; those where that failed stay remembered."""
    errors = _ended(cluster, _hosts(cluster, "left"), spared=[machine.address for machine in machines])
    for error in errors.values():
        print(f"no longer in the list, but not ended: {error}\n`up` and `down` try again", file=sys.stderr, flush=True)
    return dataclasses.replace(cluster, facts=cluster.facts | {"left": list(errors)})


def _install(config: Config, machines: list[Machine]) -> None:
    """Bring hosts with another project or other versions to those of here; what they are afterwards takes their place
    in the list."""
    project = onprem_host.project()

    def bring(i: int) -> None:
        machine = machines[i]
        if not onprem_host.has_installed(machine, config.venv, project):
            onprem_host.install(machine, config.venv, config.python, config.wheels, project)
            machines[i] = onprem_host.survey(machine.host, config.venv)
            onprem_host.check_versions(machines[i], config.venv)

    print("looking at each host's virtual environment; installing one takes minutes", flush=True)
    on_each(range(len(machines)), bring)
    onprem_host.check_pythons(machines, config.venv)


def _put(config: Config, cluster: Cluster, machines: Sequence[Machine]) -> None:
    """Files and services on all hosts, the head first, once all of them can write the storage; what was left ends."""
    token = (state.folder() / "token").read_text()
    environment = onprem_environment.of_services(config.venv, cluster)
    wanted: dict[str, onprem_host.Contents] = {}
    for machine in machines:
        is_head = machine is machines[0]
        words = {"user": machine.user, "venv": config.venv, "head": cluster.facts["head"], "address": machine.address}
        # One log monitor a machine, since two would tell a driver everything twice.
        words |= {"name": _worker(machine), "logs": str(not is_head).lower()}
        services = _services(cluster, is_head)
        wanted[machine.host.name] = onprem_host.contents(services, words, token, environment)

    def check(machine: Machine) -> None:
        is_first, contents = machine is machines[0], wanted[machine.host.name]
        onprem_host.check_storage(machine, config.venv, cluster.facts["id"], contents, is_first=is_first)

    def write(machine: Machine) -> None:
        contents = wanted[machine.host.name]
        onprem_host.write(machine, cluster.facts["id"], contents)
        onprem_host.start(machine, contents.services)

    print(f"bringing services to {len(machines)} host(s)", flush=True)
    check(machines[0])
    on_each(machines[1:], check)
    state.save(_without_left(cluster, machines))
    write(machines[0])
    on_each(machines[1:], write)


def _services(cluster: Cluster, is_head: bool) -> tuple[str, ...]:
    works = not is_head or cluster.facts.get("head_works", False)
    return (("raymed-head", "raymed-mlflow") if is_head else ()) + (("raymed-worker",) if works else ())


def _worker(machine: Machine) -> str:
    """Its node's name."""
    return f"worker-{machine.address}"


def _wait(config: Config, cluster: Cluster, machines: Sequence[Machine]) -> None:
    """Until all parts answer. Raises UserError, with the log of what does not."""
    until = time.monotonic() + START_SECONDS
    workers = {_worker(m) for m in machines if "raymed-worker" in _services(cluster, m is machines[0])}
    print(f"waiting for MLflow, the head and {len(workers)} worker(s)", flush=True)
    to_head, are_reached = (config.venv, cluster.facts["head"], GCS, MLFLOW), False
    while True:
        try:
            mlflow.ask(cluster.environment)
            there = ray.nodes(cluster.addresses["dashboard"], cluster.environment)
            if not (absent := {"head", *workers} - there.keys()):
                return
            missing = f"there is no node {', '.join(sorted(absent))}"
            if not are_reached:
                on_each(machines[1:], lambda m: onprem_host.check_reaches(m, *to_head))
                are_reached = True
        except Silent as silent:
            missing = str(silent)
        if time.monotonic() > until:
            raise UserError(
                f"the cluster is not whole after {START_SECONDS:g} s: {missing}. What its parts say: "
                f"python -m raymed.cluster logs NAME; {_AGAIN}"
            )
        time.sleep(1)


def status(cluster: Cluster) -> Sequence[Line]:
    """Each service, as its host says; MLflow and the nodes, as they say themselves."""
    found: dict[str, list[Line]] = {}

    def look(host: Host) -> None:
        try:
            states = onprem_host.states(host)
            found[host.name] = [
                Line(part := _part(service, host), how == "active", _told(how, part)) for service, how in states.items()
            ] or [Line(host.name, False, f"it has none of the services: {_AGAIN}")]
        except Failed as failed:
            found[host.name] = [Line(host.name, False, str(failed))]

    on_each(_hosts(cluster), look)
    lines = [line for host in _hosts(cluster) for line in found[host.name]]
    left = "it is no longer in the list, but was not ended: `up`, as before, ends it when it can be reached"
    lines += [Line(host.name, False, left) for host in _hosts(cluster, "left")]
    try:
        cluster = _through_tunnels(cluster)
    except UserError as error:
        return [*lines, Line("dashboard", False, str(error)), Line("mlflow", False, "has no tunnel")]
    return [*lines, *_answers(cluster)]


def _part(service: str, host: Host) -> str:
    """By which `status` and `logs` name the service of a host."""
    return f"{service}@{host.name}"


def _told(how: str, part: str) -> str:
    return "" if how == "active" else f"{how}: python -m raymed.cluster logs {part} tells what it said; {_AGAIN}"


def _answers(cluster: Cluster) -> Iterator[Line]:
    url = cluster.addresses["dashboard"]
    for name, ask in {
        "dashboard": lambda: ray.ask_dashboard(url, cluster.environment),
        "mlflow": lambda: mlflow.ask(cluster.environment),
    }.items():
        try:
            yield Line(name, True, ask())
        except Silent as silent:
            yield Line(name, False, f"{silent}: {_AGAIN}")
    try:
        for name, node in sorted(ray.nodes(url, cluster.environment).items()):
            yield Line(f"node {name}", True, ray.describe(node))
    except Silent:
        return  # the dashboard's line says so


def down(cluster: Cluster) -> None:
    """End and remove the services of all hosts; storage and /var/lib/raymed stay.

    Raises UserError where a host cannot be reached: the others are ended, and that one is still remembered.
    """
    tunnels.close(state.load() or cluster)
    if errors := _ended(cluster, _all_hosts(cluster)):
        facts = cluster.facts | {"hosts": list(errors), "left": []}
        state.save(dataclasses.replace(cluster, processes=(), facts=facts))
        told = "\n".join(errors.values())
        raise UserError(
            f"{told}\nwhat runs there was not ended: `down` again when it can be reached or, where it is gone for "
            f"good, remove {state.folder() / state.FILE}"
        )
    (state.folder() / "token").unlink(missing_ok=True)
    state.forget()


@contextmanager
def reached(cluster: Cluster) -> Iterator[str]:
    """Within: the URL of Ray's dashboard; tunnels that have ended are opened again."""
    yield _through_tunnels(cluster).addresses["dashboard"]


def logs(cluster: Cluster) -> Mapping[str, Callable[[], str]]:
    """Of SERVICE@HOST: the journal of that host, or why it cannot be read."""
    hosts = _hosts(cluster)
    parts = [(service, host) for host in hosts for service in _services(cluster, host is hosts[0])]
    return {_part(service, host): partial(onprem_host.journal, host, service) for service, host in parts}


def _ended(cluster: Cluster, hosts: Sequence[Host], spared: Sequence[str] = ()) -> dict[str, str]:
    """End what it runs on hosts, but for those at spared addresses; the name of each where that failed, and why."""
    errors: dict[str, str] = {}

    def end(host: Host) -> None:
        try:
            onprem_host.end(host, cluster.facts["id"], spared)
        except Failed as failed:
            errors[host.name] = str(failed)

    on_each(hosts, end)
    return {host.name: errors[host.name] for host in hosts if host.name in errors}


def _hosts(cluster: Cluster, which: str = "hosts") -> list[Host]:
    """Those of the list, or those that were "left" out of it and are not ended yet."""
    return [Host(name, cluster.facts["key"], cluster.facts["ssh_config"]) for name in cluster.facts.get(which, ())]


def _all_hosts(cluster: Cluster) -> list[Host]:
    return _hosts(cluster) + _hosts(cluster, "left")


def _through_tunnels(cluster: Cluster) -> Cluster:
    """The cluster with its tunnels open. Raises UserError where the head cannot be reached."""
    return tunnels.opened(state.required(), _tunnels(cluster))  # others may have opened them anew, or ended it


def _tunnels(cluster: Cluster) -> list[Tunnel]:
    head = _hosts(cluster)[0]
    far = {"dashboard": f"127.0.0.1:{_DASHBOARD}", "mlflow": f"{cluster.facts['head']}:{MLFLOW}"}
    return [Tunnel(name, port, head.tunnel(port, far[name])) for name, port in cluster.facts["tunnels"].items()]
