"""KubeRay's provider by the real kubectl: what it applies, and what it says where it cannot. No Kubernetes runs here; a
server on this machine answers the two questions that come before anything is made."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from nodes import free_port

from raymed.cluster import state
from raymed.cluster.providers import kuberay
from raymed.cluster.providers.tunnels import close
from raymed.config import UserError

CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/rayclusters.ray.io"


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    beside = str(Path(sys.executable).parent)  # where the extra `dev` installs it
    monkeypatch.setenv("PATH", f"{beside}{os.pathsep}{os.environ['PATH']}")
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on this machine")
    monkeypatch.setenv("RAYMED_CLUSTER", str(tmp_path / "cluster"))


@pytest.fixture
def kubernetes(tmp_path, monkeypatch):
    """answers: path -> JSON, with its status in "code"; all else is 404. kubectl's current context leads to it."""
    answers: dict[str, dict] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.split("?")[0]
            missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            answer = answers.get(path, missing | {"message": f"{path} not found"})
            body = json.dumps(answer).encode()
            self.send_response(answer.get("code", 200))
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use(tmp_path, monkeypatch, server.server_port)
    yield answers
    server.shutdown()
    server.server_close()


def use(tmp_path, monkeypatch, port: int) -> None:
    """kubectl asks this port."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "users": [{"name": "me", "user": {}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))


def definition(**options: object) -> dict:
    schema = {"properties": {"spec": {"properties": {"authOptions": {"properties": options}} if options else {}}}}
    return {"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]}}


def config(**changes: Any) -> kuberay.Config:
    return kuberay.Config(**{"storage": "s3://bucket/prefix", **changes})


def written(given: kuberay.Config, kept: dict[str, str]) -> Path:
    """The folder of a first `up`."""
    return kuberay.written(given, kuberay._lasting(given, None), kuberay._secrets(given, kept))


def test_a_kubernetes_that_does_not_answer(tmp_path, monkeypatch):
    use(tmp_path, monkeypatch, 9)
    with pytest.raises(UserError, match="kubectl cannot ask Kubernetes for KubeRay.*--context"):
        kuberay.up(config())
    assert state.load() is None


def test_one_without_kuberay(kubernetes):
    with pytest.raises(UserError, match="no KubeRay: helm install"):
        kuberay.up(config())
    assert state.load() is None


@pytest.mark.parametrize("options", [{}, {"mode": {}}])
def test_a_kuberay_that_knows_no_tokens(kubernetes, options):
    kubernetes[CRD] = definition(**options)
    with pytest.raises(UserError, match="1.6 or newer"):
        kuberay.up(config())
    assert state.load() is None


def test_no_kubectl(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="kubectl is not on this machine's PATH"):
        kuberay.up(config())


@pytest.mark.parametrize(
    ("changes", "said"), [({"storage": "/mnt/x"}, "--storage must be s3://"), ({"image": "raymed"}, "NAME:TAG")]
)
def test_flags_that_cannot_be(kubernetes, changes, said):
    kubernetes[CRD] = definition(secretName={})
    with pytest.raises(UserError, match=said):
        kuberay.up(config(**changes))
    assert state.load() is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"context": "there"}, "in context 'here', not in context 'there'"),
        ({"namespace": "other"}, "in namespace 'raymed', not in namespace 'other'"),
    ],
)
def test_a_cluster_elsewhere_is_another_one(kubernetes, changes, said):
    """The first one would be forgotten, and go on costing."""
    kubernetes[CRD] = definition(secretName={})
    with pytest.raises(UserError, match="`kubectl create` failed"):  # what was begun is remembered
        kuberay.up(config())
    first = state.required()
    assert first.facts["kubectl"] == ["kubectl", "--namespace=raymed", "--context=here"], "also when another is current"
    with pytest.raises(UserError, match=said):
        kuberay.up(config(**changes))
    assert state.load() == first
    with pytest.raises(UserError, match="`kubectl create` failed"):
        kuberay.up(config(context="here"))


def test_kubectl_without_a_context(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert kuberay._current_context() == ""
    assert kuberay._kubectl("", "raymed") == ["kubectl", "--namespace=raymed"]


def test_secrets_of_the_namespace_stay(kubernetes):
    kubernetes["/api/v1/namespaces/raymed/secrets/raymed-token"] = {"data": {"auth_token": "dG9rZW4="}}
    kubernetes["/api/v1/namespaces/raymed/secrets/raymed"] = {"data": {"RAYMED_SERVE_TOKEN": "c2VydmU="}}
    kept = kuberay._kept(["kubectl"], "raymed")
    assert kept == {"auth_token": "token", "RAYMED_SERVE_TOKEN": "serve"}
    folder = written(config(), kept)
    assert (folder / "ray.token").read_text() == "token"
    assert "RAYMED_SERVE_TOKEN=serve\n" in (folder / "secret.env").read_text()


def secret(**values: str) -> dict:
    """As Kubernetes has it."""
    return {"data": {name: base64.b64encode(value.encode()).decode() for name, value in values.items()}}


def applied(folder: Path) -> tuple[dict[str, str], list[str], str]:
    """(the secret of all pods, worker groups, image of the head), as kubectl would apply them."""
    things = list(yaml.safe_load_all(kustomized(folder)))
    [data] = [t["data"] for t in things if t["kind"] == "Secret" and t["metadata"]["name"] == "raymed"]
    [cluster] = [t["spec"] for t in things if t["kind"] == "RayCluster"]
    [head] = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    groups = [group["groupName"] for group in cluster["workerGroupSpecs"]]
    return {name: base64.b64decode(value).decode() for name, value in data.items()}, groups, head["image"]


def test_an_up_without_flags_changes_nothing(kubernetes, tmp_path):
    """What is applied takes the place of the whole secret, and of all worker groups."""
    kubernetes[CRD] = definition(secretName={})
    (tmp_path / "keys").write_text("AWS_ACCESS_KEY_ID=ours\nAWS_SECRET_ACCESS_KEY=a=b\n")
    (tmp_path / "none").write_text("# no key\n")
    there = "/api/v1/namespaces/raymed/secrets/raymed"

    def up(**flags: Any) -> tuple[dict[str, str], list[str], str]:
        with pytest.raises(UserError, match="`kubectl create` failed"):  # all is written, and remembered, before
            kuberay.up(config(**flags))
        found = applied(Path(state.required().facts["folder"]))
        kubernetes[there] = secret(**found[0])
        return found

    first = up(secrets=tmp_path / "keys", size="large", image="registry.example/raymed:7")
    assert first[0]["AWS_SECRET_ACCESS_KEY"] == "a=b" and first[1:] == (["gpu", "gpu8"], "registry.example/raymed:7")
    assert up() == first
    keyless, groups, image = up(size="small", secrets=tmp_path / "none")
    assert keyless == {name: value for name, value in first[0].items() if not name.startswith("AWS_")}
    assert (groups, image) == (["cpu"], first[2])


@pytest.fixture
def runs(kubernetes, monkeypatch):
    """Brings a cluster up. Whatever kubectl would apply is there then; returns that, by kind and name."""
    kubernetes[CRD] = definition(secretName={})
    monkeypatch.setattr(kuberay, "_told", lambda *words: None)
    monkeypatch.setattr(kuberay, "opened", lambda cluster, tunnels: cluster)

    def up(**flags: Any) -> dict[tuple[str, str], dict]:
        found = {}

        def apply(kubectl: list[str], folder: Path, namespace: str) -> None:
            for thing in yaml.safe_load_all(kustomized(folder)):
                found[thing["kind"], thing["metadata"]["name"]] = thing
            at = f"namespaces/{namespace}"
            kubernetes[f"/apis/ray.io/v1/{at}/rayclusters/raymed"] = found["RayCluster", "raymed"]
            for name in ("raymed", "raymed-token"):
                kubernetes[f"/api/v1/{at}/secrets/{name}"] = found["Secret", name]

        monkeypatch.setattr(kuberay, "_apply", apply)
        kuberay.up(config(**flags))
        return found

    return up


def test_what_pods_that_run_would_not_get_is_refused(runs):
    """KubeRay gives a new image to new workers alone, and leaves the head as it is."""
    runs(image="registry.example/raymed:7")
    first, folder = state.required(), state.folder() / "kuberay"
    lay = {path: path.read_text() for path in folder.rglob("*") if path.is_file()}
    for changes, told in {
        ("image", "registry.example/raymed:8"): "--image",
        ("size", "large"): "--size",
        ("storage", "s3://other/prefix"): "--storage",
    }.items():
        with pytest.raises(
            UserError, match=f"brought up with other {told}; to change that ends what runs: .*down, then"
        ):
            runs(**dict([changes]))
    with pytest.raises(UserError, match="with other --storage, --size"):
        runs(storage="s3://other", size="large")
    assert state.required() == first and all(path.read_text() == text for path, text in lay.items())
    again = runs(storage="s3://bucket/prefix/", image="registry.example/raymed:7", size="small")
    assert again and runs(), "the same, or none"
    state.forget()
    with pytest.raises(UserError, match="with other --image"):  # another machine's, which is known there alone
        runs()


def test_rotated_secrets_reach_mlflow_at_once_and_for_the_others_it_is_told_how(runs, tmp_path, capsys):
    def mlflow(found: dict[tuple[str, str], dict]) -> dict:
        return found["Deployment", "mlflow"]["spec"]["template"]["metadata"]["annotations"]

    (tmp_path / "keys").write_text("AWS_ACCESS_KEY_ID=ours\nAWS_SECRET_ACCESS_KEY=old\n")
    first = runs(secrets=tmp_path / "keys")
    assert mlflow(runs()) == mlflow(runs(secrets=tmp_path / "keys")) == mlflow(first), "it goes on"
    assert "secrets" not in capsys.readouterr().out
    (tmp_path / "keys").write_text("AWS_ACCESS_KEY_ID=ours\nAWS_SECRET_ACCESS_KEY=new\n")
    second = runs(secrets=tmp_path / "keys")
    assert mlflow(second) != mlflow(first)
    delete = "kubectl --namespace=raymed --context=here delete pod --selector=ray.io/cluster=raymed"
    assert f"keep the old secrets until they start again, which ends what runs: {delete}" in capsys.readouterr().out
    passwords = [base64.b64decode(f["Secret", "raymed"]["data"]["MLFLOW_TRACKING_PASSWORD"]) for f in (first, second)]
    assert passwords[0] == passwords[1]


def test_a_cluster_that_cannot_be_looked_for_is_not_changed(kubernetes):
    kubernetes[CRD] = definition(secretName={})
    refused = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Forbidden", "message": "no"}
    kubernetes["/apis/ray.io/v1/namespaces/raymed/rayclusters/raymed"] = refused | {"code": 403}
    with pytest.raises(UserError, match="cannot read the RayCluster raymed of namespace raymed: .*Forbidden"):
        kuberay.up(config())
    assert state.load() is None


def test_secrets_that_cannot_be_read_are_not_replaced(kubernetes):
    kubernetes[CRD] = definition(secretName={})
    kubernetes["/api/v1/namespaces/raymed/secrets/raymed"] = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": "Forbidden",
        "code": 403,
        "message": "no",
    }
    with pytest.raises(UserError, match="cannot read the secret raymed of namespace raymed: .*Forbidden"):
        kuberay.up(config())
    assert state.load() is None


def test_status_opens_the_ways_again(tmp_path, monkeypatch):
    """Without an `up`; a kubectl of this test stands for the cluster's."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "kubectl").write_text(KUBECTL.format(python=sys.executable))
    (programs / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    ports = {"dashboard": free_port(), "mlflow": free_port()}
    addresses = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    cluster = state.Cluster("kuberay", addresses, facts={"kubectl": ["kubectl"], "tunnels": ports})
    state.save(cluster)
    try:
        lines = {line.name: line for line in kuberay.status(cluster)}
        assert lines["way to dashboard"].is_up and lines["way to dashboard"].detail == addresses["dashboard"]
        assert not lines["way to mlflow"].is_up and "no pod of mlflow" in lines["way to mlflow"].detail
        opened = [process for process in state.required().processes if process.name == "dashboard"]
        assert kuberay.status(state.required())[2].is_up
        assert [process for process in state.required().processes if process.name == "dashboard"] == opened
    finally:
        close(state.required())


KUBECTL = """#!{python}
import json, socket, sys
if sys.argv[1] == "get":
    print(json.dumps({{"status": {{}}}}))
elif "service/mlflow" in sys.argv:
    sys.exit("error: no pod of mlflow")
else:
    with socket.create_server(("127.0.0.1", int(sys.argv[-1].split(":")[0]))) as way:
        while True:
            way.accept()[0].close()
"""


def kustomized(folder: Path) -> str:
    """What kubectl makes of it."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "kind", "cluster"), [("job", "RayJob", "rayClusterSpec"), ("serve", "RayService", "rayClusterConfig")]
)
def test_a_job_and_a_service_of_their_own_have_the_image_and_namespace_of_this_up(name, kind, cluster):
    given = config(image="registry.example:5000/raymed:7", namespace="other")
    text = kustomized(written(given, {}) / name)
    [thing] = yaml.safe_load_all(text)
    assert (thing["kind"], thing["metadata"]["namespace"]) == (kind, "other")
    groups = [thing["spec"][cluster]["headGroupSpec"], *thing["spec"][cluster]["workerGroupSpecs"]]
    images = [group["template"]["spec"]["containers"][0]["image"] for group in groups]
    assert images == ["registry.example:5000/raymed:7"] * 2 and "raymed:0.1.0" not in text


@pytest.mark.parametrize("size", ["small", "large"])
def test_what_is_applied(size, tmp_path):
    keys = (
        "# of the bucket\nAWS_ACCESS_KEY_ID=ours\n\nAWS_SECRET_ACCESS_KEY=a=b\nAWS_ENDPOINT_URL=http://s3.house:9000\n"
    )
    (tmp_path / "keys").write_text(keys)
    given = config(size=size, image="registry.example:5000/raymed:7", secrets=tmp_path / "keys", namespace="other")
    folder = written(given, {})
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.rglob("*") if path.is_file())
    text = kustomized(folder)
    things = list(yaml.safe_load_all(text))
    assert {thing["metadata"]["namespace"] for thing in things} == {"other"}
    assert all(thing["metadata"]["labels"]["app.kubernetes.io/part-of"] == "raymed" for thing in things)
    assert text.count(" image: registry.example:5000/raymed:7") == {"small": 3, "large": 4}[size]
    settings = next(thing["data"] for thing in things if thing["kind"] == "ConfigMap")
    assert settings["RAYMED_HOME"] == "s3://bucket/prefix" and not [name for name in settings if "PASSWORD" in name]
    secret, token = (
        next(thing["data"] for thing in things if thing["kind"] == "Secret" and thing["metadata"]["name"] == name)
        for name in ("raymed", "raymed-token")
    )
    assert set(token) == {"auth_token"}
    assert base64.b64decode(secret["AWS_ENDPOINT_URL"]) == b"http://s3.house:9000"
    assert secret["AWS_SECRET_ACCESS_KEY"] == "YT1i" and "MLFLOW_TRACKING_PASSWORD" in secret

    clients = kuberay._of_clients(given, 1234)
    assert clients["RAY_AUTH_MODE"] == "token" and clients["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:1234"


def test_a_file_of_secrets_that_is_none_is_not_told(tmp_path):
    (tmp_path / "keys").write_text("NAME=value\nmy-very-secret\n")
    with pytest.raises(UserError, match="line 2") as error:
        written(config(secrets=tmp_path / "keys"), {})
    assert "my-very-secret" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        written(config(secrets=tmp_path / "none"), {})


def test_how_parts_are_told_of():
    ready = {"status": {"conditions": [{"type": "HeadPodReady", "status": "True"}], "readyWorkerReplicas": 1}}
    assert kuberay._ray_line(ready | {}).is_up and not kuberay._ray_line({}).is_up
    assert not kuberay._ray_line("not found").is_up
    assert kuberay._mlflow_line({"status": {"availableReplicas": 1}}).is_up and not kuberay._mlflow_line({}).is_up
