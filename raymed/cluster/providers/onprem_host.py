"""One host of an on-prem cluster: what it is, what is put on it, and its services.

All of it goes by scripts of sh, as root or through `sudo -n`; what is secret goes by their standard input.
"""

import dataclasses
import getpass
import hashlib
import io
import json
import platform
import shlex
import sys
import tarfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from raymed.cluster import outgoing
from raymed.cluster.providers.launcher import PROJECT, filled
from raymed.cluster.providers.ssh import Failed, Host
from raymed.config import UserError

SERVICES = ("raymed-head", "raymed-mlflow", "raymed-worker")
TIMER = "raymed-logs.timer"
"""On every host: old logs go."""
_OF_TIMER = ("raymed-logs.service", TIMER)
UNITS = PROJECT / "cluster" / "onprem"
_CODE, _TEXTS = ("pyproject.toml", "raymed"), ("LICENSE", "README.md")
_PACKAGES = ("raymed", "ray", "flask-wtf")  # by the last one MLflow asks for passwords
_INSTALL_SECONDS = 3600.0
_INSTALLED = "raymed-project"  # in the virtual environment: the digest of the project that `install` brought
_TO_BE = "/run/raymed-environment"  # of services, while it is tried

_ADDRESS = 'set -- $SSH_CONNECTION; echo "$3"'
# Prints NAME=VALUE lines; <words> are filled in.
_SURVEY = """
echo "system=$(uname -s)"; echo "user=$(id -un)"; echo "uid=$(id -u)"; echo "gid=$(id -g)"
set -- $SSH_CONNECTION; echo "address=$3"
if [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; then echo "root=yes"; fi
[ -d /run/systemd/system ] && command -v systemd-run >/dev/null && echo "systemd=yes"
echo "mark=$(head -n 1 /etc/raymed/cluster 2>/dev/null)"
echo "owner=$(tail -n 1 /etc/raymed/cluster 2>/dev/null)"
echo "project=$(cat <project> 2>/dev/null)"
[ -x <venv>/bin/python ] && echo "versions=$(<venv>/bin/python -c <probe>)"
exit 0
"""
_PROBE = """
import importlib.metadata as m, json, sys
found = {"python": ".".join(map(str, sys.version_info[:3]))}
for name in %s:
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps(found))
"""
# As the services will see it: their user, their variables. The first host puts a mark, the others must see it.
_STORAGE = """
import os, sys
from raymed.config import UserError
from raymed.storage.locations import exists, join, read_bytes, write_bytes
from raymed.storage.paths import resolve_storage
try:
    storage = os.environ["RAYMED_HOME"]
    resolve_storage(storage)
    mark = join(storage, ".raymed-hosts")
    if sys.argv[1] == "first":
        write_bytes(mark, sys.argv[2].encode())
    elif not exists(mark) or read_bytes(mark).decode() != sys.argv[2]:
        sys.exit(f"{storage} is not the folder that the head sees there: mount the same one on every host")
except UserError as error:
    sys.exit(str(error))
"""
_REACHES = """
import socket, sys
for port in sys.argv[2:]:
    try:
        socket.create_connection((sys.argv[1], int(port)), 10).close()
    except OSError as error:
        sys.exit(f"cannot reach the head at {sys.argv[1]}:{port} ({error}): hosts must reach each other on all ports")
"""


@dataclass(frozen=True)
class Machine:
    """A host as it was found."""

    host: Host
    user: str
    uid: int
    gid: int
    address: str
    """By which the others reach it: the one that SSH came in by."""
    mark: str = ""
    """CLUSTER DIGEST [PROJECT] of what was put on it; "" where nothing was."""
    owner: str = ""
    project: str = ""
    """The digest of the project that `install` brought; "" where it was brought otherwise."""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def as_service(self, venv: str, code: str, *arguments: str) -> str:
        """What Python prints for the services' user, with the services' environment. Raises Failed."""
        return as_root(self.host, self._service("/etc/raymed/environment", venv, code, *arguments))

    def as_service_to_be(self, environment: str, venv: str, code: str, *arguments: str) -> str:
        """The same with an environment that the services do not have yet: the text of its file."""
        run = self._service(_TO_BE, venv, code, *arguments)
        script = f"umask 077; trap 'rm -f {_TO_BE}' EXIT; cat > {_TO_BE} && {run} < /dev/null"
        return as_root(self.host, script, environment.encode())

    def _service(self, environment: str, venv: str, code: str, *arguments: str) -> str:
        own = [f"User={self.user}", f"EnvironmentFile={environment}", "StateDirectory=raymed"]
        words = ["systemd-run", "--quiet", "--wait", "--pipe", "--collect", *(w for p in own for w in ("-p", p))]
        return shlex.join([*words, f"{venv}/bin/python", "-c", code, *arguments])


def as_root(host: Host, script: str, data: bytes = b"", **how: float) -> str:
    """What a script prints that root runs. Raises Failed."""
    return host.run(f'$([ "$(id -u)" = 0 ] || echo sudo -n) sh -c {shlex.quote(script)}', data, **how)


def survey(host: Host, venv: str) -> Machine:
    """What a host is. Raises UserError for one that cannot be reached, or cannot be a node whatever is installed."""
    script = _SURVEY.replace("<venv>", venv).replace("<project>", f"{venv}/{_INSTALLED}")
    script = script.replace("<probe>", shlex.quote(_PROBE % (_PACKAGES,)))
    found = dict(line.split("=", 1) for line in host.run(script).splitlines() if "=" in line)
    if found["system"] != "Linux" or "systemd" not in found:
        raise UserError(f"{host.name}: it runs {found['system']} without systemd, and the services need that")
    if "root" not in found:
        raise UserError(
            f"{host.name}: {found['user']} may not use sudo without a password, which installing services needs"
        )
    return Machine(
        host=host,
        user=found["user"],
        uid=int(found["uid"]),
        gid=int(found["gid"]),
        address=found["address"],
        mark=found["mark"],
        owner=found["owner"],
        project=found["project"],
        versions=json.loads(found.get("versions") or "{}"),
    )


def own_versions() -> dict[str, str]:
    """This process's Python, Ray and raymed."""
    return {"python": ".".join(map(str, sys.version_info[:3])), "ray": version("ray"), "raymed": version("raymed")}


def check_versions(machine: Machine, venv: str) -> None:
    """Raises UserError for a host without Python, with other versions than here, or without what MLflow needs. The last
    number of Python's may be another one here: `check_pythons`."""
    if not machine.versions:
        raise UserError(
            f"{machine.host.name}: there is no Python at {venv}/bin/python: give --install to make the virtual "
            "environment, or --venv where it is"
        )
    found, own = _with_minor(machine.versions), _with_minor(own_versions())
    other = [
        f"{name} {found.get(name, 'missing')}, here {have}" for name, have in own.items() if found.get(name) != have
    ]
    if other:
        raise UserError(
            f"{machine.host.name}: {venv} has {'; '.join(other)}: give --install, or install the same versions"
        )
    if "flask-wtf" not in found:
        raise UserError(f"{machine.host.name}: MLflow in {venv} cannot ask for a password: pip install 'mlflow[auth]'")


def _with_minor(versions: Mapping[str, str]) -> dict[str, str]:
    return {**versions, "python": versions["python"].rpartition(".")[0]}


def check_pythons(machines: Sequence[Machine], venv: str) -> None:
    """Raises UserError for hosts with another Python than the first one, the head: Ray joins no node of another one,
    be it in the last number alone."""
    head = machines[0]
    other = [machine for machine in machines if machine.versions["python"] != head.versions["python"]]
    if other:
        told = ", ".join(f"{machine.host.name} has {machine.versions['python']}" for machine in other)
        raise UserError(
            f"Python in {venv} must be the same on all hosts, and {head.host.name}, the head, has "
            f"{head.versions['python']}, {told}: bring the same one to all, remove {venv} where it changes, and give "
            "--install"
        )


@dataclass(frozen=True)
class Project:
    """This project's own code and what it requires, as it goes to hosts."""

    archive: bytes
    digest: str
    """Differs where code or requirements do."""


def project() -> Project:
    """This project, as it is now."""
    buffer, digest = io.BytesIO(), hashlib.sha256()
    code = outgoing.files(PROJECT, _CODE)
    for name in code:
        content = (PROJECT / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in (*code, *outgoing.files(PROJECT, _TEXTS)):
            archive.add(PROJECT / name, name)
    return Project(buffer.getvalue(), digest.hexdigest()[:16])


def has_installed(machine: Machine, venv: str, wanted: Project) -> bool:
    """Whether a host has the versions of here, and got this very project by `install`."""
    try:
        check_versions(machine, venv)
    except UserError:
        return False
    return machine.project == wanted.digest


def install(machine: Machine, venv: str, python: str, wheels: str | None, wanted: Project) -> None:
    """Make the virtual environment, and install this project in it with all its packages. Raises UserError."""
    source = ["--no-index", "--find-links", wheels] if wheels else []
    pip = shlex.join([f"{venv}/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *source])
    script = f"""set -e
        command -v {shlex.quote(python)} >/dev/null || {{
            echo "there is no {python} on it: install it, or name another one with --python" >&2; exit 1; }}
        {venv}/bin/python -m pip --version >/dev/null 2>&1 || {{  # there is none, or it was half made
            mkdir -p {venv} && {shlex.quote(python)} -m venv {venv}; }}
        rm -f {venv}/{_INSTALLED}
        source=$(mktemp -d); trap 'rm -rf "$source"' EXIT
        tar -x -z --no-same-owner -C "$source"
        {pip} "$source[all]"
        echo {wanted.digest} > {venv}/{_INSTALLED}
        chown -R {machine.uid}:{machine.gid} {venv}
    """
    as_root(machine.host, script, wanted.archive, seconds=_INSTALL_SECONDS)


@dataclass(frozen=True)
class Contents:
    """What is to be put on a host: files below /etc, and the services that are to run."""

    services: tuple[str, ...]
    files: Mapping[str, tuple[str, int]]
    """Name -> text and mode."""

    def digest(self) -> str:
        """Differs where anything does."""
        return hashlib.sha256(repr((self.services, sorted(self.files.items()))).encode()).hexdigest()[:16]


def contents(
    services: tuple[str, ...], words: Mapping[str, str], token: str, environment: Mapping[str, str]
) -> Contents:
    """The services' units with their words filled in, and what is for their user's eyes alone."""
    names = (*(f"{name}.service" for name in services), *_OF_TIMER)
    units = {f"systemd/system/{name}": filled((UNITS / name).read_text(), words) for name in names}
    own = {"raymed/token": (token, 0o600), "raymed/environment": (_environment_file(environment), 0o600)}
    return Contents(services, {name: (text, 0o644) for name, text in units.items()} | own)


def _environment_file(values: Mapping[str, str]) -> str:
    """As systemd reads it."""
    for name, value in values.items():
        if "\n" in value:
            raise UserError(f"{name} has more than one line, and cannot be a service's variable")
    quoted = {name: value.replace("\\", "\\\\").replace('"', '\\"') for name, value in values.items()}
    return "".join(f'{name}="{value}"\n' for name, value in quoted.items())


def write(machine: Machine, cluster: str, wanted: Contents) -> None:
    """Put it on the host, take away services that it is no longer to have, and start the others with it and with the
    project that was installed. Nothing is done where they have all of it."""
    mark = f"{cluster} {wanted.digest()} {machine.project}".rstrip()
    if machine.mark == mark:
        return
    if machine.mark:
        told = "what its services start with has changed, so they start again, and what runs there ends"
        print(f"{machine.host.name}: {told}", flush=True)
    gone = " ".join(f"{name}.service" for name in SERVICES if name not in wanted.services)
    services = " ".join(wanted.services)
    # All at once, so that a connection that is lost leaves no host between stop and start.
    script = f"""set -e; umask 022
        cd /etc; mkdir -p raymed
        tar -x -p -f -
        systemctl disable --quiet --now {gone} 2>/dev/null || true
        (cd systemd/system; rm -f {gone})
        systemctl daemon-reload
        systemctl enable --quiet {services} {TIMER}
        systemctl stop {services} || true
        systemctl start {services} {TIMER}
    """
    owner = f"{getpass.getuser()} at {platform.node()}"
    last = {"raymed/cluster": (f"{mark}\n{owner}\n", 0o644)}  # says that all the rest is there
    as_root(machine.host, script, _archive({**wanted.files, **last}, machine))


def _archive(files: Mapping[str, tuple[str, int]], machine: Machine) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, (text, mode) in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(text.encode()), mode, int(time.time())
            if mode == 0o600:
                entry.uid, entry.gid = machine.uid, machine.gid
            archive.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


def check_readable(machine: Machine, paths: Mapping[str, str]) -> None:
    """Raises UserError for files that the services' user cannot read there. paths: variable -> path."""
    if not paths:
        return
    tests = " ".join(shlex.quote(f"{name}={path}") for name, path in paths.items())
    script = f'for one in {tests}; do [ -r "${{one#*=}}" ] || echo "$one"; done'
    if missing := machine.host.run(script).splitlines():
        raise UserError(
            f"{machine.host.name}: {machine.user} cannot read {', '.join(missing)} there: put the file on every host, "
            "at the same path"
        )


def check_storage(machine: Machine, venv: str, cluster: str, wanted: Contents, *, is_first: bool) -> None:
    """Raises UserError where the services, with what they are to have, could not write the storage, or do not share it
    with the first host, which must have been asked before. Services that run are left alone."""
    environment, _ = wanted.files["raymed/environment"]
    machine.as_service_to_be(environment, venv, _STORAGE, "first" if is_first else "other", cluster)


def check_reaches(machine: Machine, venv: str, head: str, *ports: int) -> None:
    """Raises UserError where a host cannot reach the head."""
    machine.as_service(venv, _REACHES, head, *map(str, ports))


def start(machine: Machine, services: tuple[str, ...]) -> None:
    """Start services that do not run; those that run go on."""
    as_root(machine.host, f"systemctl start {' '.join(services)}")


def end(host: Host, cluster: str, spared: Collection[str] = ()) -> None:
    """End and remove its services, MLflow last, so that what jobs have to say still finds it. What was stored stays.

    Nothing there is no error. Left alone: a host of another cluster by now, and one at a spared address."""
    if spared and host.run(_ADDRESS).strip() in spared:
        return
    units = {name: f"{name}.service" for name in SERVICES}
    files = " ".join([*units.values(), *_OF_TIMER])
    script = f"""
        case "$(head -n 1 /etc/raymed/cluster 2>/dev/null)" in "" | "{cluster} "*) ;; *) exit 0 ;; esac
        systemctl disable --quiet --now {TIMER} 2>/dev/null
        systemctl disable --quiet --now {units["raymed-head"]} {units["raymed-worker"]} 2>/dev/null
        systemctl disable --quiet --now {units["raymed-mlflow"]} 2>/dev/null
        cd /etc/systemd/system && rm -f {files} && systemctl daemon-reload
        systemctl reset-failed {files} 2>/dev/null
        rm -rf /etc/raymed /var/lib/raymed/ray
    """
    as_root(host, script)


def states(host: Host) -> dict[str, str]:
    """Its services, and how systemd says that they are: active, activating, failed, ... Raises Failed."""
    names = " ".join(SERVICES)
    script = f"""for name in {names}; do
        [ -e /etc/systemd/system/$name.service ] && echo "$name $(systemctl is-active $name)"
    done; exit 0"""
    return dict(line.split() for line in host.run(script).splitlines())


def journal(host: Host, service: str, lines: int = 40) -> str:
    """The last lines of a service's log, or why they cannot be read."""
    try:
        return as_root(host, f"journalctl --no-pager --output=cat --lines={lines} --unit={service}")
    except Failed as failed:
        return str(failed)
