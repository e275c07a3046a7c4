"""Clusters that Ray's own launcher makes from a file (`ray up`): what aws and gcp have in common.

The file is cluster/PROVIDER.yaml with <words> filled in. The filled one lies in the state's folder, as do the token and
the variables that the machines get by it, for their owner's eyes alone, and a copy of what they get of the project. The
way in is SSH through the cloud's own proxy; dashboard and MLflow are reached by tunnels that end at 127.0.0.1.
"""

import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raymed.cluster import outgoing, state
from raymed.cluster.providers import Line
from raymed.cluster.providers.tunnels import Tunnel, close, opened, port_for
from raymed.cluster.state import Cluster
from raymed.config import UserError
from raymed.storage import write_private

PROJECT = Path(__file__).resolve().parents[3]
_TOKEN, _VARIABLES, _COPY, _LIMITS_FILE = "ray.token", "node.env", "project", "limits.yaml"
_OF_PROJECT = ("LICENSE", "README.md", "cluster/node.sh", "pyproject.toml", "raymed")
_DASHBOARD, _MLFLOW = 8265, 5000  # on the head, whose other ports nobody but the cluster reaches
_USER = "raymed"
_LOGS = {
    # What a cloud answers, what went wrong, and what is done to a machine.
    "autoscaler": "tail -n 40 /tmp/ray/session_latest/logs/monitor.{log,err,out}",
    "head": "tail -n 20 /tmp/ray/session_latest/logs/gcs_server.out",
    "mlflow": "sudo journalctl --no-pager --lines 40 --unit raymed-mlflow",
}
# What the autoscaler reads again while it runs.
_LIMITS = ("idle_timeout_minutes", "max_workers", "min_workers", "upscaling_speed")
_HEADS = "echo ray-heads: $(pgrep --count --exact gcs_server)"


@dataclass(frozen=True)
class Launch:
    """What one provider adds.

    template: the file with <words>; values: what they become.
    variables: of every machine, beside those that all get.
    place: where the machines are, in the cloud's terms: a cluster elsewhere is another one.
    machines: names of those that the cluster has there now. Raises UserError where the cloud cannot say.
    end: the command that ends machines by their names.
    change: what is set in the file's content at last.
    max_workers: None: that of the cluster that is remembered, else what the file says.
    """

    provider: str
    template: Path
    values: Mapping[str, str]
    variables: dict[str, str]
    place: Mapping[str, str]
    machines: Callable[[], Sequence[str]]
    end: Callable[[Sequence[str]], str]
    change: Callable[[dict[str, Any]], None] = lambda config: None
    max_workers: int | None = None


def need(*programs: str, by: Mapping[str, str]) -> None:
    """Raises UserError for a program that this machine lacks. by: program -> how it is had."""
    for program in programs:
        if shutil.which(program) is None:
            raise UserError(
                f"{program} is not on this machine's PATH, and the way to the cluster needs it: {by[program]}"
            )


def written(launch: Launch) -> Path:
    """The filled file, as Ray's own validation takes it, beside what the machines get. Raises UserError otherwise."""
    content, home = _content(launch), state.folder()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not (home / _TOKEN).is_file():
        write_private(home / _TOKEN, secrets.token_hex(32))
    write_private(home / _VARIABLES, _lines(launch.variables | _shared(home)))
    _copied(home / _COPY)
    path = home / f"{launch.provider}.yaml"
    write_private(path, _dumped(content))
    return path


def last(provider: str) -> dict[str, Any]:
    """What the file of the cluster that is remembered says; nothing where none is."""
    import yaml

    path = state.folder() / f"{provider}.yaml"
    return yaml.safe_load(path.read_text()) if state.load() and path.is_file() else {}


def _content(launch: Launch) -> dict[str, Any]:
    """Of the filled file, as Ray's own validation takes it. Raises UserError otherwise."""
    import yaml

    home = state.folder()
    own = {"token": str(home / _TOKEN), "variables": str(home / _VARIABLES), "project": str(home / _COPY)}
    try:
        content = yaml.safe_load(filled(launch.template.read_text(), {**own, **launch.values}))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{launch.template} cannot be read: {error}") from None
    most = last(launch.provider).get("max_workers") if launch.max_workers is None else launch.max_workers
    if most is not None:
        content["max_workers"] = most
    launch.change(content)
    checked(content, launch.template)
    return content


def filled(text: str, values: Mapping[str, str]) -> str:
    """Text with its <words> replaced. Raises UserError for one that nobody gave; `<<` and lines of comment stay."""

    def value(match: re.Match) -> str:
        if match[1] not in values:
            raise UserError(f"<{match[1]}> is none of what a cluster file may name: {', '.join(sorted(values))}")
        return values[match[1]]

    lines = text.splitlines(keepends=True)
    return "".join(line if line.lstrip().startswith("#") else re.sub(r"<([a-z_]+)>", value, line) for line in lines)


def checked(config: Mapping[str, Any], name: Path) -> None:
    """Ray's validation of a cluster's file. Raises UserError with what it says."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(dict(config)))
    except (jsonschema.ValidationError, ValueError, KeyError, NotImplementedError) as error:
        where = ".".join(map(str, getattr(error, "absolute_path", ())))
        raise UserError(f"{name} is not what `ray up` takes: {where} {getattr(error, 'message', error)}") from None


def up(launch: Launch) -> Cluster:
    """Bring it up. Where Ray runs on its head already, that goes on, and nothing but limits changes.

    Raises UserError, before anything starts, for a cluster that is up elsewhere or is of somebody else, and for one
    that runs and would have to start again. Later, where Ray's launcher fails; `down` ends what it had started.
    """
    before = state.load()
    check_place(before, launch.place)
    there = launch.machines()
    if before is None:
        _check_nobodys(launch, there)
    elif there and _runs(before):
        return opened(_limited(launch, before), _tunnels(before))
    path = written(launch)
    tunnels = {"dashboard": port_for(before, "dashboard"), "mlflow": port_for(before, "mlflow")}
    cluster = Cluster(
        launch.provider,
        addresses={name: f"http://127.0.0.1:{port}" for name, port in tunnels.items()},
        environment=_of_clients(launch.variables, tunnels["mlflow"]),
        processes=before.processes if before else (),
        facts={"file": str(path), "tunnels": tunnels, "place": dict(launch.place), "launched": time.time()},
    )
    state.save(cluster)
    _launch(path)
    return opened(cluster, _tunnels(cluster))


def _launch(path: Path, *flags: str) -> None:
    if ray(["up", "--yes", "--disable-usage-stats", *flags, str(path)]):
        raise UserError(
            "`ray up` failed, as it says above: mend that and bring the cluster up again, or take down what has "
            "started: python -m raymed.cluster down"
        )


def _check_nobodys(launch: Launch, there: Sequence[str]) -> None:
    """Raises UserError for machines that nobody here remembers: Ray would take their head for its own, and end it."""
    if there:
        where = ", ".join(f"{name} {value}" for name, value in launch.place.items())
        raise UserError(
            f"a cluster raymed runs in {where} already ({', '.join(there)}), and {state.folder()} does not know it, so "
            "nothing was started: take it down from where it was brought up or, if it is nobody's any more, end its "
            f"machines: {launch.end(there)}"
        )


def _runs(cluster: Cluster) -> bool:
    """Whether Ray runs on the head. Raises UserError where the head does not answer."""
    said = _said(cluster, _HEADS)
    found = re.search(r"^ray-heads: (\d+)", said, re.MULTILINE)
    if found is None:
        raise UserError(
            f"the cluster has machines, but its head does not say whether Ray runs ({said.strip()[-500:]}): try again, "
            "or python -m raymed.cluster down"
        )
    return found[1] != "0"


def _limited(launch: Launch, before: Cluster) -> Cluster:
    """The cluster that runs, with the limits that are asked for. Raises UserError for other changes: Ray would have to
    start again for them, on the head or, of workers, on other machines."""
    path, content, was = Path(before.facts["file"]), _content(launch), last(launch.provider)
    if changed := [*_changed(was, content), *_changed_variables(launch)]:
        raise UserError(
            f"the cluster runs, and was brought up with other {', '.join(changed)}; to change that ends what runs: "
            "python -m raymed.cluster down, then up"
        )
    if content == was:
        return before
    print("the autoscaler gets other limits; Ray is not started again", flush=True)
    limits = path.with_name(_LIMITS_FILE)
    # Jobs run there, with what setup would install anew.
    write_private(limits, _dumped(content | {"head_setup_commands": []}))
    _launch(limits, "--no-restart")
    write_private(path, _dumped(content))
    if ray(["exec", "--disable-usage-stats", str(path), "bash ~/raymed/cluster/node.sh limits"]):
        print("jobs will count with the limits from before", file=sys.stderr, flush=True)
    return before


def _changed(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of what differs, but for limits."""
    old, new = _without_limits(was), _without_limits(now)
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _without_limits(content: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {f"available_node_types.{name}": kind for name, kind in content.get("available_node_types", {}).items()}
    kinds = {name: {key: kind[key] for key in kind if key not in _LIMITS} for name, kind in kinds.items()}
    return {name: content[name] for name in content if name not in (*_LIMITS, "available_node_types")} | kinds


def _changed_variables(launch: Launch) -> list[str]:
    home = state.folder()
    was, now = _variables(home), launch.variables | _shared(home)
    return sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))


def check_place(before: Cluster | None, place: Mapping[str, str]) -> None:
    """Raises UserError where the cluster that is up is in another place: it would be forgotten, and go on costing."""
    was = before.facts.get("place", place) if before else place
    differing = [name for name in place if was.get(name) != place[name]]
    if differing:
        old, new = (", ".join(f"{name} {there.get(name)!r}" for name in differing) for there in (was, place))
        raise UserError(f"a cluster is up already, in {old}, not in {new}: python -m raymed.cluster down first")


def status(cluster: Cluster) -> Sequence[Line]:
    """The head as the cloud knows it, and what answers through the tunnels, which are opened again where they have
    ended."""
    done = subprocess.run([_ray(), "get-head-ip", cluster.facts["file"]], capture_output=True, text=True)
    head = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else []
    lines = [Line("head", bool(head), head[0] if head else "there is none: python -m raymed.cluster up, or down")]
    for tunnel in _tunnels(cluster):
        lines.append(_through(tunnel) if head else Line(tunnel.name, False, "there is no head"))
    return lines


def _through(tunnel: Tunnel) -> Line:
    try:
        return _answers(opened(state.required(), [tunnel]), tunnel)  # others may have opened it anew
    except UserError as error:
        return Line(tunnel.name, False, str(error))


def down(cluster: Cluster, check: Callable[[], None] = lambda: None) -> None:
    """End all machines; MLflow's database is brought to the storage before. Raises UserError where Ray's launcher
    fails: the cluster is then still remembered, since its machines cost money.

    check: looks for machines that are left; the cluster is remembered too where it raises.
    """
    file = cluster.facts["file"]
    if ray(["exec", "--disable-usage-stats", file, "sudo systemctl stop raymed-mlflow"]):
        print("MLflow did not end in order: what it was told in the last minute may be lost", file=sys.stderr)
    if ray(["down", "--yes", file]):
        raise UserError(f"`ray down {file}` failed, as it says above: machines may be running, and cost; try again")
    close(cluster)
    check()
    state.forget()


@contextmanager
def reached(cluster: Cluster) -> Iterator[str]:
    """Within: the URL of Ray's dashboard; the tunnels are opened again where they have ended."""
    opened(cluster, _tunnels(cluster))
    yield cluster.addresses["dashboard"]


def logs(cluster: Cluster) -> Mapping[str, Callable[[], str]]:
    """Of what runs on the head."""
    return {name: partial(_said, cluster, command) for name, command in _LOGS.items()}


def _said(cluster: Cluster, command: str) -> str:
    """What a command prints on the head, or why it did not run."""
    words = [_ray(), "exec", "--disable-usage-stats", cluster.facts["file"], command]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else done.stderr.strip()[-500:]


def ray(words: Sequence[str]) -> int:
    """Run Ray's command line for the user to see; its exit code."""
    return subprocess.run([_ray(), *words]).returncode


def _ray() -> str:
    return str(Path(sys.executable).with_name("ray"))


def _tunnels(cluster: Cluster) -> list[Tunnel]:
    far = {"dashboard": _DASHBOARD, "mlflow": _MLFLOW}
    file = cluster.facts["file"]
    return [
        Tunnel(name, port, [_ray(), "dashboard", file, f"--port={port}", f"--remote-port={far[name]}"])
        for name, port in cluster.facts["tunnels"].items()
    ]


def _answers(cluster: Cluster, tunnel: Tunnel) -> Line:
    """What is at the other end. Of the dashboard: how many machines, by the token."""
    import httpx

    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    path = "/nodes?view=summary" if tunnel.name == "dashboard" else "/health"
    url, bearer = f"{cluster.addresses[tunnel.name]}{path}", {"Authorization": f"Bearer {token}"}
    try:
        answer = httpx.get(url, headers=bearer, timeout=10, trust_env=False).raise_for_status()
        if tunnel.name == "mlflow":
            return Line("mlflow", True, cluster.addresses["mlflow"])
        nodes = answer.json()["data"]["summary"]
        alive = sum(node["raylet"].get("state") == "ALIVE" for node in nodes)
        return Line("dashboard", True, f"{cluster.addresses['dashboard']}, {alive} machine(s) with the head")
    except (httpx.HTTPError, ValueError, KeyError) as error:
        return Line(tunnel.name, False, f"no answer through the tunnel ({error}): python -m raymed.cluster logs head")


def _shared(home: Path) -> dict[str, str]:
    """Of every machine. The password stays what it was."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "raymed.serve.on_ray:around_proxy",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAYMED_NODE_PATIENCE": "1800",  # a spot machine that installs torch with CUDA takes longer than the usual
        "MLFLOW_TRACKING_USERNAME": _USER,
        "MLFLOW_TRACKING_PASSWORD": _variables(home).get("MLFLOW_TRACKING_PASSWORD") or secrets.token_urlsafe(24),
    }


def _variables(home: Path) -> dict[str, str]:
    """Those that the machines got last."""
    return dict(line.split("=", 1) for line in _read(home / _VARIABLES).splitlines() if "=" in line)


def _of_clients(variables: Mapping[str, str], mlflow_port: int) -> dict[str, str]:
    """Of whoever talks to it from this machine."""
    home = state.folder()
    shared = {name: value for name, value in _shared(home).items() if name.startswith("MLFLOW_")}
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(home / _TOKEN)}
    storage = {name: value for name, value in variables.items() if name in ("RAYMED_HOME", "AWS_DEFAULT_REGION")}
    return storage | shared | ray | {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mlflow_port}"}


def _copied(folder: Path) -> None:
    """What node.sh installs, as it is now, in a folder. Times stay, so that rsync sends only what has changed."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in outgoing.files(PROJECT, _OF_PROJECT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, folder / name)


def _dumped(content: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(content, sort_keys=False)


def _lines(variables: Mapping[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in variables.items())


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
