"""On Kubernetes, by KubeRay's operator: cluster/kuberay, filled in and applied with kubectl.

Nothing listens outside the cluster's namespace: dashboard and MLflow are reached by kubectl's port-forward. Passwords
and the token are secrets of the namespace; here they lie in the state's folder, for their owner's eyes alone.
"""

import base64
import hashlib
import json
import os
import secrets
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from raymed.cluster import state
from raymed.cluster.providers import Line
from raymed.cluster.providers.launcher import PROJECT, check_place, need
from raymed.cluster.providers.tunnels import Tunnel, close, opened, port_for
from raymed.cluster.state import Cluster
from raymed.cluster.variables import read_variables
from raymed.config import UserError
from raymed.storage import write_private

FILES = PROJECT / "cluster" / "kuberay"
_CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/rayclusters.ray.io"
_HELM = "helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0"
_OURS = {"app.kubernetes.io/part-of": "raymed"}
_KINDS = "rayclusters.ray.io,deployments,services,networkpolicies,serviceaccounts,configmaps,secrets"
_TOKEN = "auth_token"
_FIRST = {"image": "raymed:0.1.0", "size": "small"}
_AGAIN = "python -m raymed.cluster up kuberay, with the flags of the first time, brings it up to date"
_WAIT = "900s"  # an image of several GB is pulled
_FAR = {"dashboard": ("service/raymed-head-svc", 8265), "mlflow": ("service/mlflow", 5000)}
_LOGS = {
    "head": ["--selector=ray.io/node-type=head", "--container=ray"],
    "autoscaler": ["--selector=ray.io/node-type=head", "--container=autoscaler"],
    "mlflow": ["deployment/mlflow"],
}


@dataclass(frozen=True)
class Config:
    """Flags of `up kuberay`.

    storage: s3://BUCKET/PREFIX.
    image: of cluster/docker/Dockerfile, where the nodes of Kubernetes find it. None: that of the last `up`, at first
        raymed:0.1.0.
    size: the overlay. None: that of the last `up`, at first small.
    secrets: a file of NAME=VALUE lines for all pods, such as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL; none where the
        service accounts stand for a role. None: those that the namespace has; a file without lines takes them away.
    context: of kubectl; default: the current one.
    """

    storage: str
    image: str | None = None
    size: Literal["small", "large"] | None = None
    secrets: Path | None = None
    namespace: str = "raymed"
    context: str | None = None


def up(config: Config) -> Cluster:
    """Bring it up, or up to date. Raises UserError, before anything is made, for a missing kubectl, a cluster that is
    up elsewhere, a Kubernetes that does not answer, one without KubeRay, and for a cluster that is there with another
    storage, image or size: its pods would keep that. Secrets may change; pods that are there have them when they start
    again, MLflow's at once."""
    if not config.storage.startswith("s3://"):
        raise UserError(f"--storage must be s3://BUCKET/PREFIX, which all pods reach, got {config.storage!r}")
    need("kubectl", by={"kubectl": "apt install kubernetes-client, or from kubernetes.io"})
    context = config.context or _current_context()
    place = {"context": context, "namespace": config.namespace}
    before = state.load()
    check_place(before, place)
    kubectl = _kubectl(context, config.namespace)
    _check_operator(kubectl)
    lasting = _lasting(config, before)
    is_there = _check_same(kubectl, config.namespace, lasting)
    kept = _kept(kubectl, config.namespace)
    own = _secrets(config, kept)
    folder = written(config, lasting, own)
    tunnels = {name: port_for(before, name) for name in _FAR}
    cluster = Cluster(
        "kuberay",
        addresses={name: f"http://127.0.0.1:{port}" for name, port in tunnels.items()},
        environment=_of_clients(config, tunnels["mlflow"]),
        processes=before.processes if before else (),
        facts={"kubectl": kubectl, "folder": str(folder), "tunnels": tunnels, "place": place, **lasting},
    )
    state.save(cluster)
    _apply(kubectl, folder, config.namespace)
    if is_there and own != kept:
        again = " ".join([*kubectl, "delete", "pod", "--selector=ray.io/cluster=raymed"])
        print(f"Ray's pods keep the old secrets until they start again, which ends what runs: {again}", flush=True)
    _told(kubectl, "wait", "--for=condition=HeadPodReady", "raycluster/raymed", f"--timeout={_WAIT}")
    _told(kubectl, "rollout", "status", "deployment/mlflow", f"--timeout={_WAIT}")
    return opened(cluster, _tunnels(cluster))


def written(config: Config, lasting: Mapping[str, str], own: Mapping[str, str]) -> Path:
    """A folder that kubectl can apply: an overlay of cluster/kuberay with this cluster's image, settings and secrets.
    Its folders job and serve are to be applied by the user, and have the same image and namespace.

    lasting: storage, image and size, by which the next `up` knows them. own: all secrets, which take the place of those
    that are there.
    """
    folder = state.folder() / "kuberay"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    lines = [f"{name}={value}\n" for name, value in own.items() if name != _TOKEN]
    write_private(folder / "secret.env", "".join(lines))
    write_private(folder / "ray.token", own[_TOKEN])
    name, _, tag = lasting["image"].rpartition(":")
    if not name or "/" in tag:
        raise UserError(f"--image must be NAME:TAG, got {lasting['image']!r}")
    common = {"namespace": config.namespace, "images": [{"name": "raymed", "newName": name, "newTag": tag}]}
    content = {
        "labels": [{"pairs": _OURS}],
        "generatorOptions": {"disableNameSuffixHash": True, "labels": _OURS},
        "configMapGenerator": [{"name": "raymed", "literals": [f"{k}={v}" for k, v in _settings(config).items()]}],
        "secretGenerator": [
            {"name": "raymed", "envs": ["secret.env"]},
            {"name": "raymed-token", "files": [f"{_TOKEN}=ray.token"]},
        ],
        "patches": [
            _annotated("RayCluster", "/metadata", {f"raymed/{name}": value for name, value in lasting.items()}),
            # By this Kubernetes starts MLflow again where they have changed.
            _annotated("Deployment", "/spec/template/metadata", {"raymed/secrets": _digest(own)}),
        ],
    }
    _write_kustomization(folder, FILES / "overlays" / lasting["size"], common | content)
    for own_cluster in ("job", "serve"):
        (folder / own_cluster).mkdir(exist_ok=True, mode=0o700)
        _write_kustomization(folder / own_cluster, FILES / own_cluster, common)
    return folder


def status(cluster: Cluster) -> Sequence[Line]:
    """The cluster as KubeRay tells of it, MLflow, and the tunnels, which are opened again where they have ended."""
    kubectl = cluster.facts["kubectl"]
    lines = [
        _ray_line(_json(kubectl, "get", "raycluster/raymed")),
        _mlflow_line(_json(kubectl, "get", "deployment/mlflow")),
    ]
    for tunnel in _tunnels(cluster):
        try:
            found = opened(state.required(), [tunnel])  # others may have opened it anew, or ended the cluster
            lines.append(Line(f"way to {tunnel.name}", True, found.addresses[tunnel.name]))
        except UserError as error:
            lines.append(Line(f"way to {tunnel.name}", False, str(error)))
    return lines


def down(cluster: Cluster) -> None:
    """End all of it, MLflow first, which brings its database to the storage. The namespace and MLflow's volume stay."""
    kubectl = cluster.facts["kubectl"]
    close(cluster)
    gone = ["--ignore-not-found", "--cascade=foreground", "--timeout=180s"]
    _told(kubectl, "delete", "deployment/mlflow", *gone)
    _told(kubectl, "delete", _KINDS, "--selector=app.kubernetes.io/part-of=raymed", *gone)
    state.forget()


@contextmanager
def reached(cluster: Cluster) -> Iterator[str]:
    """Within: the URL of Ray's dashboard; the tunnels are opened again where they have ended."""
    opened(cluster, _tunnels(cluster))
    yield cluster.addresses["dashboard"]


def logs(cluster: Cluster) -> Mapping[str, Callable[[], str]]:
    """Of the head, its autoscaler and MLflow."""
    return {name: partial(_said, cluster, where) for name, where in _LOGS.items()}


def _said(cluster: Cluster, where: Sequence[str]) -> str:
    """The last lines of a container's log, or why there are none."""
    done = _run(cluster.facts["kubectl"], "logs", "--tail=40", *where)
    return done.stdout if done.returncode == 0 else done.stderr.strip()[-500:]


def _current_context() -> str:
    """Its name, by which the cluster is found again when another one is current; "" where kubectl has none, as in a
    pod."""
    done = _run(["kubectl"], "config", "current-context")
    return done.stdout.strip() if done.returncode == 0 else ""


def _kubectl(context: str, namespace: str) -> list[str]:
    return ["kubectl", f"--namespace={namespace}", *([f"--context={context}"] if context else [])]


def _check_operator(kubectl: Sequence[str]) -> None:
    """Raises UserError where Kubernetes does not answer, or has no KubeRay that knows of tokens."""
    done = _run(kubectl, "get", "--raw", _CRD, "--request-timeout=15s")
    if done.returncode:
        if "NotFound" in done.stderr or "could not find" in done.stderr:
            raise UserError(f"this Kubernetes has no KubeRay: {_HELM}")
        raise UserError(
            f"kubectl cannot ask Kubernetes for KubeRay ({_last(done.stderr)}): see `kubectl config get-contexts`, and "
            "give --context"
        )
    versions = json.loads(done.stdout)["spec"]["versions"]
    schemas = [v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"]
    options = [s["properties"]["spec"]["properties"].get("authOptions", {}).get("properties", {}) for s in schemas]
    if not any("secretName" in known for known in options):
        raise UserError(f"this KubeRay does not know authOptions.secretName, and needs to be 1.6 or newer: {_HELM}")


def _lasting(config: Config, before: Cluster | None) -> dict[str, str]:
    """Storage, and image and size: those that are given, else those of the last `up`: a flag left out resizes
    nothing."""
    facts = before.facts if before else {}
    others = {name: getattr(config, name) or facts.get(name) or first for name, first in _FIRST.items()}
    return {"storage": config.storage.rstrip("/"), **others}


def _check_same(kubectl: Sequence[str], namespace: str, lasting: Mapping[str, str]) -> bool:
    """Whether the cluster is there. Raises UserError where it was brought up with other flags, and where nobody can
    say."""
    path = f"/apis/ray.io/v1/namespaces/{namespace}/rayclusters/raymed"
    there = _found(kubectl, path, f"the RayCluster raymed of namespace {namespace}")
    was = there["metadata"].get("annotations", {}) if there else {}
    if changed := [f"--{name}" for name, value in lasting.items() if was.get(f"raymed/{name}", value) != value]:
        raise UserError(
            f"the cluster runs, and was brought up with other {', '.join(changed)}; to change that ends what runs: "
            "python -m raymed.cluster down, then up"
        )
    return there is not None


def _kept(kubectl: Sequence[str], namespace: str) -> dict[str, str]:
    """The secrets that the namespace has already. Raises UserError where it cannot be said which: others would take
    their place."""
    kept: dict[str, str] = {}
    for name in ("raymed", "raymed-token"):
        path = f"/api/v1/namespaces/{namespace}/secrets/{name}"
        found = _found(kubectl, path, f"the secret {name} of namespace {namespace}") or {}
        kept |= {key: base64.b64decode(value).decode() for key, value in (found.get("data") or {}).items()}
    return kept


def _found(kubectl: Sequence[str], path: str, what: str) -> dict[str, Any] | None:
    """A thing of Kubernetes, None where it is not there. Raises UserError where that cannot be said."""
    done = _run(kubectl, "get", "--raw", path)
    if done.returncode and "NotFound" not in done.stderr:
        raise UserError(f"kubectl cannot read {what}: {_last(done.stderr)}")
    return None if done.returncode else json.loads(done.stdout)


def _secrets(config: Config, kept: Mapping[str, str]) -> dict[str, str]:
    """All that the namespace is to have: the user's, of the file or else as they are, and raymed's own."""
    given = read_variables(config.secrets, "--secrets") if config.secrets else kept
    return {**given, **_made(kept)}


def _digest(own: Mapping[str, str]) -> str:
    """Tells nobody what they are: the token among them cannot be guessed."""
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _made(kept: Mapping[str, str]) -> dict[str, str]:
    """Every secret that raymed makes, new where it is not kept."""
    made = {"MLFLOW_TRACKING_USERNAME": "raymed", _TOKEN: kept.get(_TOKEN) or secrets.token_hex(32)}
    for name in ("MLFLOW_TRACKING_PASSWORD", "RAYMED_SERVE_TOKEN"):
        made[name] = kept.get(name) or secrets.token_urlsafe(24)
    return made


def _annotated(kind: str, where: str, values: Mapping[str, str]) -> dict[str, Any]:
    """A patch that annotates what has no annotations yet."""
    add = {"op": "add", "path": f"{where}/annotations", "value": dict(values)}
    return {"target": {"kind": kind}, "patch": json.dumps([add])}


def _write_kustomization(folder: Path, base: Path, content: Mapping[str, Any]) -> None:
    """What makes something else of `base`."""
    import yaml

    kind = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    resources = {"resources": [os.path.relpath(base.resolve(), folder.resolve())]}
    write_private(folder / "kustomization.yaml", yaml.safe_dump(kind | resources | dict(content), sort_keys=False))


def _settings(config: Config) -> dict[str, str]:
    """Of every pod, for anybody to see."""
    return {
        "RAYMED_HOME": config.storage.rstrip("/"),
        "RAYMED_LOCAL": "/home/raymed/local",
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "raymed.serve.on_ray:around_proxy",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _of_clients(config: Config, mlflow_port: int) -> dict[str, str]:
    folder = state.folder() / "kuberay"
    lines = (folder / "secret.env").read_text().splitlines()
    shared = {name: value for name, _, value in (line.partition("=") for line in lines) if name.startswith("MLFLOW_")}
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "ray.token")}
    mlflow = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mlflow_port}"}
    return {"RAYMED_HOME": config.storage.rstrip("/")} | shared | ray | mlflow


def _apply(kubectl: Sequence[str], folder: Path, namespace: str) -> None:
    """First as a trial, by the schemas that this Kubernetes has; then for good. What the autoscaler has set is set
    back, and asked for again by it."""
    if _run(kubectl, "get", "namespace", namespace).returncode:
        _told(kubectl, "create", "namespace", namespace)
    apply = ["apply", "--server-side", "--force-conflicts", "--field-manager=raymed", f"--kustomize={folder}"]
    trial = _run(kubectl, *apply, "--dry-run=server")
    if trial.returncode:
        raise UserError(f"this Kubernetes does not take {folder}:\n{trial.stderr.strip()[-2000:]}")
    _told(kubectl, *apply)


def _tunnels(cluster: Cluster) -> list[Tunnel]:
    kubectl, found = cluster.facts["kubectl"], cluster.facts["tunnels"]
    return [
        Tunnel(name, found[name], [*kubectl, "port-forward", "--address=127.0.0.1", service, f"{found[name]}:{port}"])
        for name, (service, port) in _FAR.items()
    ]


def _ray_line(found: Mapping[str, Any] | str) -> Line:
    if isinstance(found, str):
        return Line("head", False, f"{found}: {_AGAIN}")
    told = found.get("status", {})
    ready = {c["type"]: c["status"] == "True" for c in told.get("conditions", ())}
    workers = f"{told.get('readyWorkerReplicas', 0)} of {told.get('desiredWorkerReplicas', 0)} workers"
    advice = "" if ready.get("HeadPodReady") else ", no head: kubectl --namespace NAMESPACE describe raycluster raymed"
    return Line("head", ready.get("HeadPodReady", False), workers + advice)


def _mlflow_line(found: Mapping[str, Any] | str) -> Line:
    if isinstance(found, str):
        return Line("mlflow", False, f"{found}: {_AGAIN}")
    is_up = bool(found.get("status", {}).get("availableReplicas"))
    return Line("mlflow", is_up, "" if is_up else "its pod is not ready: python -m raymed.cluster logs mlflow")


def _json(kubectl: Sequence[str], *words: str) -> dict[str, Any] | str:
    """What kubectl finds, or the last line of what it says."""
    done = _run(kubectl, *words, "--output=json", "--request-timeout=15s")
    return json.loads(done.stdout) if done.returncode == 0 else _last(done.stderr)


def _last(said: str) -> str:
    """The last line of what kubectl says."""
    return (said.strip().splitlines() or [""])[-1]


def _run(kubectl: Sequence[str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*kubectl, *words], capture_output=True, text=True)


def _told(kubectl: Sequence[str], *words: str) -> None:
    """Run it for the user to see. Raises UserError where it fails."""
    if subprocess.run([*kubectl, *words]).returncode:
        raise UserError(f"`kubectl {words[0]}` failed, as it says above: mend that and run the same command again")
