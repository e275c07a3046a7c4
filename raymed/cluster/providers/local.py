"""A cluster on this machine: two or more Ray nodes, MLflow and S3, each a process that outlives the command.

    python -m raymed.cluster up local --workers 2

All that it keeps lies in the state folder (`raymed.cluster.state`):

    data/            what stays: MLflow's runs and users, the objects of S3, ports and keys
    local/           RAYMED_LOCAL of the nodes: working copies and caches
    token            Ray's, new each time; gone with the cluster

Ray's own files lie in a folder of /tmp with a short name, since the paths of sockets may not have 108 bytes.
"""

import dataclasses
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from raymed.cluster import isolated, ports, processes, services, state
from raymed.cluster.providers import Line
from raymed.cluster.services import Silent, mlflow, ray, s3
from raymed.cluster.state import Cluster
from raymed.config import UserError
from raymed.storage import write_private
from raymed.storage.server import remove_sockets

START_SECONDS = 180.0
_GRACE = 5.0  # seconds for Ray, and then for MLflow, to end by themselves
_ASK_AGAIN = 0.2
_USUAL = {"dashboard": 8265, "mlflow": 5000, "s3": 8333, "serve": 8000}
_INTERNAL = (  # ports that nobody types
    *("gcs", "client", "s3-master", "s3-volume", "s3-filer"),
    *("metrics-head", "metrics-autoscaler", "metrics-dashboard"),
)
_OWN = ("RAY_", "MLFLOW_", "AWS_")  # variables of whoever calls `up` that are not for this cluster
_AGAIN = "see `logs`, then make cluster-down and make cluster-up; what is stored stays"
_OF_HEAD = ("gcs_server.out", "raylet.out", "dashboard.log")
_HEALTHY = "success"  # of Serve's proxies, and of no other program
_SERVE = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "raymed.serve.on_ray:around_proxy"}


@dataclass(frozen=True)
class Config:
    """A cluster on this machine. Ports: 0 takes the one of last time, else the usual one, else any free one."""

    workers: int = 1
    """Nodes that the CPUs and GPUs are divided among."""
    cpus: int | None = None
    """CPUs of all workers together; None: all of this machine."""
    isolated: bool = False
    """All of it in a network namespace that only this machine can reach (root only). Jobs have no network there."""
    dashboard_port: int = 0
    mlflow_port: int = 0
    s3_port: int = 0
    serve_port: int = 0
    """Where Ray Serve is to listen when something is deployed."""

    def __post_init__(self):
        if not 1 <= self.workers <= self.shared:
            raise UserError(f"--workers must be from 1 to the {self.shared} CPUs they share, got {self.workers}")

    @property
    def shared(self) -> int:
        """CPUs of all workers."""
        return (os.cpu_count() or 1) if self.cpus is None else self.cpus


def up(config: Config) -> Cluster:
    """Bring the cluster up, or find it up. What fails or is interrupted is ended before this returns.

    Raises UserError: a port is taken, a program is missing, a part does not start, or one that was up is down or is
    not as it is asked for.
    """
    with _alone():
        found = state.load()
        if found is not None:
            _check_same(found, config)
            return _whole(found)
        mlflow.check_installed()
        if config.isolated:
            isolated.check_allowed()
        cluster = _planned(config)
        state.save(cluster)  # from here on `down` finds what there is by its mark, also after a SIGKILL
        try:
            return _start(cluster, config)
        except BaseException:
            _end(cluster)
            raise


@contextmanager
def _alone() -> Iterator[None]:
    """Within: no other command starts or ends this cluster."""
    from filelock import FileLock, Timeout

    folder = state.folder()
    lock = FileLock(folder / "lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock.acquire()
    except Timeout:
        raise UserError(f"another up or down is at work in {folder}: wait for it, or end it with Ctrl-C") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): set RAYMED_CLUSTER to a folder") from None
    try:
        yield
    finally:
        lock.release()


def _check_same(cluster: Cluster, config: Config) -> None:
    """Raises UserError for flags that the cluster which is up was brought up without. A default asks for nothing."""
    have = cluster.facts | {f"{name}_port": cluster.facts["ports"][name] for name in _USUAL}
    asked = {f.name: value for f in dataclasses.fields(config) if (value := getattr(config, f.name)) != f.default}
    other = [_flag(name, value, have.get(name)) for name, value in asked.items() if value != have.get(name)]
    if other:
        raise UserError(f"a cluster is up without {', '.join(other)}: make cluster-down first")


def _flag(name: str, value: object, other: object) -> str:
    """As it was typed, and what the cluster has instead, where that was written down."""
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {value}" + (f" (it has {other})" if other is not None else "")


def _whole(cluster: Cluster) -> Cluster:
    """The cluster that is up, if all of it is."""
    down = [line for line in status(cluster) if not line.is_up]
    if down:
        told = "\n".join(f"  {line.name}: {line.detail}" for line in down)
        raise UserError(f"a cluster is up, but not all of it:\n{told}\nmake cluster-down, then make cluster-up")
    return cluster


def _planned(config: Config) -> Cluster:
    """The cluster as it will be, with nothing of it started yet."""
    folder = state.folder()
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    chosen, keys = _ports(config, data / "ports.json"), _secrets(data / "secrets.json")
    url = {name: f"http://127.0.0.1:{chosen[name]}" for name in _USUAL}
    environment = {
        "RAYMED_HOME": f"s3://{s3.BUCKET}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_API_SERVER_ADDRESS": url["dashboard"],  # Ray's own commands for jobs would take RAY_ADDRESS
        "MLFLOW_TRACKING_URI": url["mlflow"],
        "MLFLOW_TRACKING_USERNAME": mlflow.USER,
        "MLFLOW_TRACKING_PASSWORD": keys["mlflow_password"],
        "AWS_ENDPOINT_URL": url["s3"],
        "AWS_ACCESS_KEY_ID": keys["s3_access_key"],
        "AWS_SECRET_ACCESS_KEY": keys["s3_secret_key"],
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    } | _no_proxy()
    addresses = dict(url)
    if not config.isolated:
        environment["RAY_ADDRESS"] = addresses["ray"] = f"127.0.0.1:{chosen['gcs']}"
    temporary = tempfile.mkdtemp(prefix="raymed-", dir="/tmp")
    facts = {"temporary": temporary, "ports": chosen, "isolated": config.isolated}
    facts |= {"workers": config.workers, "cpus": config.shared}
    return Cluster("local", addresses, environment, (), facts)


def _ports(config: Config, path: Path) -> dict[str, int]:
    """A port for each name; those of last time where they are free, since working copies remember S3's."""
    before = json.loads(path.read_text()) if path.is_file() else {}
    chosen: dict[str, int] = {}
    names = [*_USUAL, *_INTERNAL, *(f"metrics-worker-{i + 1}" for i in range(config.workers))]
    asked = {name: getattr(config, f"{name}_port", 0) for name in names}
    for name in sorted(names, key=lambda name: not asked[name]):  # what is asked for is nobody else's
        liked = [port for port in (before.get(name), _USUAL.get(name)) if port]
        companion = ports.GRPC if name.startswith("s3") else 0
        taken = {*chosen.values(), *(p + ports.GRPC for n, p in chosen.items() if n.startswith("s3"))}
        chosen[name] = ports.choose(f"--{name}-port", asked[name], liked, taken, companion)
    write_private(path, json.dumps(before | chosen))
    if before.get("s3", chosen["s3"]) != chosen["s3"]:  # the same server at another port
        (state.folder() / "local" / "s3" / s3.BUCKET / ".endpoint").unlink(missing_ok=True)
    return chosen


def _secrets(path: Path) -> dict[str, str]:
    """MLflow's password and S3's keys: those of the first time, since the data were made with them."""
    users = path.parent / "mlflow" / "users.db"
    if not path.is_file() and users.is_file():
        raise UserError(f"{path} is gone, which has the password of {users}: bring it back, or remove {users.name} too")
    if not path.is_file():
        made = {"mlflow_password": secrets.token_urlsafe(24), "mlflow_session_key": secrets.token_hex(32)}
        made |= {"s3_access_key": secrets.token_hex(10).upper(), "s3_secret_key": secrets.token_urlsafe(30)}
        write_private(path, json.dumps(made))
    return json.loads(path.read_text())


def _no_proxy() -> dict[str, str]:
    """A proxy of the user's must not be asked for what is on this machine."""
    given = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    hosts = ",".join(dict.fromkeys([*filter(None, given.split(",")), "127.0.0.1", "localhost"]))
    return {"NO_PROXY": hosts, "no_proxy": hosts}


def _start(cluster: Cluster, config: Config) -> Cluster:
    began = time.monotonic()
    starter = _Starter(cluster)
    if config.isolated:
        isolated.create(starter.namespace)
        starter.start("relay", isolated.relay(starter.namespace, [starter.ports[name] for name in _USUAL]), here=True)
    names = [f"worker-{i + 1}" for i in range(config.workers)]
    print(f"starting S3, MLflow and Ray: a head and {len(names)} worker(s) of {config.shared} CPUs in all", flush=True)
    starter.start_services()
    starter.start_head()
    starter.wait("head")
    for name, share in zip(names, ray.shares(len(names), config.shared), strict=True):
        starter.start_worker(name, share)
    for name in ("s3", "mlflow", *names):
        starter.wait(name)
    print(f"all parts answer after {time.monotonic() - began:.0f} s", flush=True)
    return starter.cluster


class _Starter:
    """Starts the parts one by one, each remembered at once."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self.ports: Mapping[str, int] = cluster.facts["ports"]
        self.temporary = Path(cluster.facts["temporary"])
        self.namespace = self.temporary.name
        self.folder = state.folder()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_OWN)}
        self.environment = kept | {processes.MARK: str(self.temporary)}

    def start(
        self, name: str, command: Sequence[str], own: Mapping[str, str] | None = None, *, folder=None, here=False
    ) -> None:
        """Start a part; `here`: not in the namespace."""
        within = isolated.within(self.namespace) if self.cluster.facts["isolated"] and not here else []
        log = self.folder / "logs" / f"{name}.log"
        process = processes.start(name, [*within, *command], {**self.environment, **(own or {})}, log, folder)
        self.cluster = dataclasses.replace(self.cluster, processes=(*self.cluster.processes, process))
        state.save(self.cluster)

    def start_services(self) -> None:
        keys = json.loads((self.folder / "data" / "secrets.json").read_text())
        store, objects = self.folder / "data" / "mlflow", self.folder / "data" / "s3"
        objects.mkdir(exist_ok=True, mode=0o700)
        numbers = [self.ports[name] for name in ("s3", "s3-master", "s3-volume", "s3-filer")]
        pair = keys["s3_access_key"], keys["s3_secret_key"]
        self.start("s3", s3.command(objects, numbers, pair), folder=objects)
        own = mlflow.environment(store, keys["mlflow_password"], keys["mlflow_session_key"])
        self.start("mlflow", mlflow.command(store, self.ports["mlflow"]), own, folder=store)

    def start_head(self) -> None:
        token = Path(self.cluster.environment["RAY_AUTH_TOKEN_PATH"])
        write_private(token, secrets.token_hex(32))
        numbers = [self.ports[name] for name in ("gcs", "client", "dashboard", "metrics-head")]
        # Ray would take 44217 and 44227, on a machine with another Ray too.
        metrics = {
            f"{who}_METRIC_PORT": str(self.ports[f"metrics-{who.lower()}"]) for who in ("AUTOSCALER", "DASHBOARD")
        }
        self.start("head", ray.head(self.temporary, *numbers), self._of_nodes() | metrics)

    def start_worker(self, name: str, share: ray.Share) -> None:
        gpus = {"CUDA_VISIBLE_DEVICES": ",".join(share.gpus)} if share.gpus else {}
        command = ray.worker(name, self.temporary, self.ports["gcs"], self.ports[f"metrics-{name}"], share)
        self.start(name, command, self._of_nodes() | gpus)

    def _of_nodes(self) -> dict[str, str]:
        """Whatever runs on a node gets this: how it reaches the rest, and the programs beside this interpreter."""
        client = {
            k: v for k, v in self.cluster.environment.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
        }
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        local = {"RAYMED_LOCAL": str(self.folder / "local"), "RAYMED_CLUSTER": str(self.folder)}
        return client | local | _SERVE | {"PATH": path, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}

    def wait(self, name: str) -> None:
        """Until a part answers. Raises UserError when it ends, or does not answer in time."""
        process = next(p for p in self.cluster.processes if p.name == name)
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                _ask(self.cluster, name)
                return
            except Silent as silent:
                if processes.running(process) is None or time.monotonic() > until:
                    log = self.folder / "logs" / f"{name}.log"
                    raise UserError(
                        f"{name} did not start ({silent}); {log} ends with\n{processes.last_lines(log)}"
                    ) from None
            time.sleep(_ASK_AGAIN)


def _ask(cluster: Cluster, name: str) -> str:
    """How a part is, asked now. Raises Silent."""
    environment, url = cluster.environment, cluster.addresses["dashboard"]
    if name == "relay":
        return "lets this machine into the namespace"
    if name == "s3":
        return s3.ask(environment)
    if name == "mlflow":
        return mlflow.ask(environment)
    if name == "head":
        return ray.ask_dashboard(url, environment)
    node = ray.nodes(url, environment).get(name)
    if node is None:
        raise Silent("the head does not know it as alive")
    return ray.describe(node)


def status(cluster: Cluster) -> Sequence[Line]:
    """A line for each part, asked now; then what listens where."""
    lines = [_line(cluster, process) for process in cluster.processes]
    missing = [name for name in ("head", "s3", "mlflow") if name not in {line.name for line in lines}]
    lines += [Line(name, False, f"was never started: {_AGAIN}") for name in missing]
    return [*lines, _serve(cluster), *_listening(cluster)]


def _line(cluster: Cluster, process: state.Process) -> Line:
    if processes.running(process) is None:
        return Line(process.name, False, f"process {process.pid} has ended: {_AGAIN}")
    try:
        return Line(process.name, True, _ask(cluster, process.name))
    except Silent as silent:
        return Line(process.name, False, f"process {process.pid} runs, but {silent}: {_AGAIN}")


def _serve(cluster: Cluster) -> Line:
    """Nothing deployed, and so nobody who listens, is nothing wrong. The relay listens all the same, and hangs up."""
    import httpx

    url = cluster.addresses["serve"]
    hung_up = (httpx.ReadError, httpx.RemoteProtocolError) if cluster.facts["isolated"] else ()
    try:
        answer = httpx.get(f"{url}/-/healthz", timeout=services.SECONDS, trust_env=False)
    except (httpx.ConnectError, *hung_up):
        return Line("serve", True, f"nothing is deployed; it is to listen at {url}")
    except httpx.HTTPError as error:
        return Line("serve", False, f"no answer at {url} ({type(error).__name__}): {_AGAIN}")
    if answer.text != _HEALTHY:
        return Line("serve", False, f"{url} answers {answer.status_code}, {answer.text[:200]!r}: {_AGAIN}")
    return Line("serve", True, url)


def _listening(cluster: Cluster) -> list[Line]:
    family = {p.pid: p for p in processes.family(cluster.processes, cluster.facts["temporary"])}
    found = ports.listening(family)
    if cluster.facts["isolated"]:
        found |= ports.listening(family, isolated.within(Path(cluster.facts["temporary"]).name))
    metrics = {number for name, number in cluster.facts["ports"].items() if name.startswith("metrics")}
    lines = []
    for pid, places in sorted(found.items()):
        with suppress(psutil.Error):
            name = processes.title(family[pid])
            shown = [f"{at} (metrics, for anybody)" if int(at.rpartition(":")[2]) in metrics else at for at in places]
            lines.append(Line(f"port of {name} {pid}", True, ", ".join(shown)))
    return lines


def down(cluster: Cluster) -> None:
    """End all of it: first Ray, so that what jobs have just said is written. What is stored stays."""
    with _alone():
        _end(cluster)


def _end(cluster: Cluster) -> None:
    current = state.load() or cluster  # it may have more processes by now
    temporary = Path(current.facts["temporary"])
    for part in (("head", "worker-"), ("mlflow",)):
        processes.end([p for p in current.processes if p.name.startswith(part)], "", _GRACE)
    processes.end(current.processes, str(temporary))
    if current.facts["isolated"]:
        isolated.remove(temporary.name)
    shutil.rmtree(temporary, ignore_errors=True)
    remove_sockets([number for name, number in current.facts["ports"].items() if name.startswith("s3")])
    (state.folder() / "token").unlink(missing_ok=True)
    state.forget()


@contextmanager
def reached(cluster: Cluster) -> Iterator[str]:
    """Within: the URL of Ray's dashboard."""
    yield cluster.addresses["dashboard"]


def logs(cluster: Cluster) -> Mapping[str, Callable[[], str]]:
    """Of what each part prints, and Ray's own logs of its head."""
    found = {log.stem: log for log in sorted((state.folder() / "logs").glob("*.log"))}
    session = Path(cluster.facts["temporary"], "session_latest", "logs")
    found |= {log.name: log for name in _OF_HEAD if (log := session / name).is_file()}
    return {name: partial(processes.last_lines, log) for name, log in found.items()}
