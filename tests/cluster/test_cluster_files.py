"""The files of cluster/, each by the validator of the tool that reads it, where this machine has that."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from raymed.cluster.providers.launcher import PROJECT, checked, filled
from raymed.config import UserError, from_dict
from raymed.serve.config import ServeConfig

CLUSTER = PROJECT / "cluster"
WORDS = {
    "token": "/t",
    "variables": "/v",
    "project": "/p",
    "region": "eu-x-1",
    "zone": "eu-x-1a",
    "google_project": "g",
}
KUSTOMIZATIONS = ["overlays/small", "overlays/large", "job", "serve"]
SECRET = re.compile(r"(?i)(password|secret|token|key)\w*['\"]?\s*[:=]\s*['\"]?(?!/etc/)[A-Za-z0-9+/_-]{16,}")


def program(name: str) -> str:
    """Beside this interpreter or on the PATH; the test is skipped where it is missing."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on this machine")
    return found


@pytest.mark.parametrize("name", ["aws", "gcp"])
class TestLauncher:
    """Files of `ray up`."""

    def content(self, name: str) -> dict:
        path = CLUSTER / f"{name}.yaml"
        content = yaml.safe_load(filled(path.read_text(), WORDS))
        checked(content, path)
        return content

    def test_ray_takes_it_and_not_a_misspelt_one(self, name):
        content = self.content(name)
        content["idle_timeout_minuts"] = content.pop("idle_timeout_minutes")
        with pytest.raises(UserError, match="not what `ray up` takes.*idle_timeout_minuts"):
            checked(content, CLUSTER / f"{name}.yaml")

    def test_drivers_have_a_place_on_a_head_that_stays_and_trainings_have_none(self, name):
        content = self.content(name)
        head = content["available_node_types"][content["head_node_type"]]
        assert head["resources"] == {"CPU": 0, "raymed_driver": 1000}
        told = yaml.safe_dump(head["node_config"])
        assert "spot" not in told.lower() and "IamInstanceProfile: None" not in told

    def test_workers_are_spot_machines_that_go_when_idle_and_watch_for_notices(self, name):
        content = self.content(name)
        workers = [kind for key, kind in content["available_node_types"].items() if key != content["head_node_type"]]
        for kind in workers:
            config = kind["node_config"]
            market = config.get("InstanceMarketOptions", {}).get("MarketType")
            assert market == "spot" or config.get("scheduling", {}).get("provisioningModel") == "SPOT"
            assert kind["min_workers"] == 0
        assert content["idle_timeout_minutes"] <= 15
        assert content["worker_start_ray_commands"] == [f"bash ~/raymed/cluster/node.sh worker {name}"]

    def test_there_is_no_way_in_but_the_clouds_own_proxy(self, name):
        content = self.content(name)
        assert content["provider"]["use_internal_ips"] and content["auth"]["ssh_proxy_use_node_id"]
        assert re.match("aws ssm start-session|gcloud compute start-iap-tunnel", content["auth"]["ssh_proxy_command"])
        assert "accessConfigs" not in json.dumps(content) and "IpPermissions" not in json.dumps(content)

    def test_machines_get_the_token_and_variables_as_files(self, name):
        content = self.content(name)
        assert content["file_mounts"]["~/.ray/auth_token"] == "/t" and content["file_mounts"]["~/raymed.env"] == "/v"
        assert "chmod 600 ~/raymed.env ~/.ray/auth_token" in content["setup_commands"]
        commands = [command for key, value in content.items() if key.endswith("_commands") for command in value]
        assert not re.search("(?i)password|auth_token=", " ".join(commands))


def test_a_word_that_nobody_gives_is_named():
    with pytest.raises(UserError, match="<reggion> is none of what a cluster file may name: region"):
        filled("region: <reggion>\n", {"region": "x"})
    assert filled("# a <word> of comment\n<<: *x\n", {}) == "# a <word> of comment\n<<: *x\n"


def test_what_the_account_needs_is_what_cloudformation_takes():
    done = subprocess.run([program("cfn-lint"), CLUSTER / "aws-once.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["node.sh", "gcp-once.sh", "docker/secrets.sh"])
def test_scripts_are_what_bash_takes(name):
    done = subprocess.run(["bash", "-n", CLUSTER / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["node.sh", "gcp-once.sh"])
def test_scripts_say_how_they_are_used(name):
    done = subprocess.run(["bash", CLUSTER / name], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"usage: {name}")


def test_passwords_of_compose_are_made_once_and_for_one_pair_of_eyes(tmp_path):
    shutil.copy(CLUSTER / "docker" / "secrets.sh", tmp_path)
    for _ in range(2):
        subprocess.run(["bash", tmp_path / "secrets.sh"], check=True, capture_output=True)
        made = (tmp_path / ".env").read_text()
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600
    variables = dict(line.split("=") for line in made.splitlines())
    assert len(variables["RAY_AUTH_TOKEN"]) == 48 and len(set(variables.values())) == 5
    assert set(re.findall(r"\$\{(\w+):\?", (CLUSTER / "docker" / "compose.yaml").read_text())) == set(variables)


def test_no_secret_stands_in_a_file():
    for path in [p for p in CLUSTER.rglob("*") if p.is_file() and p.name != ".env"]:
        assert not SECRET.search(path.read_text()), f"{path}: {SECRET.search(path.read_text())}"


class TestDocker:
    """What builds and joins images. Nothing here needs Docker."""

    def test_hadolint_finds_nothing(self):
        done = subprocess.run([program("hadolint"), CLUSTER / "docker" / "Dockerfile"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout

    def test_what_is_copied_is_there_and_sent_to_the_builder(self):
        text = (CLUSTER / "docker" / "Dockerfile").read_text()
        ignored = (CLUSTER / "docker" / "Dockerfile.dockerignore").read_text().split()
        for line in re.findall(r"^COPY (.+)$", text, re.M):
            for source in line.split()[:-1]:
                assert (PROJECT / source).exists() and f"!{source}" in ignored

    def test_nobody_is_root_and_extras_are_those_of_the_project(self):
        text = (CLUSTER / "docker" / "Dockerfile").read_text()
        stages = re.split(r"^FROM ", text, flags=re.M)[1:]
        finals = {name: s for s in stages if (name := s.split()[2]) in ("cpu", "cuda", "serve", "s3")}
        assert len(finals) == 4
        for name, stage in finals.items():
            assert re.findall(r"^USER (.+)$", stage, re.M)[-1] == "1000:1000", name
        assert '".[train,cluster,serve]"' in finals["cpu"] and '".[train,cluster,serve]"' in finals["cuda"]
        assert re.search(r"pip install .* \.$", finals["serve"], re.M), "no extra: neither Ray nor DeepSpeed"

    def test_parts_of_compose_name_each_other_and_listen_on_this_machine_alone(self):
        content = yaml.safe_load((CLUSTER / "docker" / "compose.yaml").read_text())
        stages = re.findall(r"^FROM \S+ AS (\w+)", (CLUSTER / "docker" / "Dockerfile").read_text(), re.M)
        for name, service in content["services"].items():
            assert service["build"]["target"] in stages
            assert (CLUSTER / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
            assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
            for other in service.get("depends_on", {}):
                assert "healthcheck" in content["services"][other], name
            for volume in service.get("volumes", ()):
                assert volume.split(":")[0] in content["volumes"]
        head = content["services"]["head"]["command"]
        assert "--num-cpus=0" in head and '--resources={"raymed_driver": 1000}' in head

    def test_a_job_in_the_head_of_compose_runs_on_its_cluster(self):
        """As the file's head says to start it; without an address it would start a Ray of its own, in there."""
        text = (CLUSTER / "docker" / "compose.yaml").read_text()
        services = yaml.safe_load(text)["services"]
        [name] = re.findall(r"^#   docker compose .* exec (\S+) python jobs/", text, re.M)
        head, address = services[name], services[name]["environment"]["RAY_ADDRESS"]
        assert address == f"{name}:6379" and f"--address={address}" in services["worker"]["command"]
        assert head["environment"].keys() - {"RAY_ADDRESS"} == services["worker"]["environment"].keys()
        assert "--port=6379" in head["command"]

        before = head["command"][: head["command"].index("ray")]  # Ray's head itself looks for no other
        seen = subprocess.run([*before, "env"], env=os.environ | head["environment"], capture_output=True, text=True)
        assert seen.returncode == 0 and "RAY_ADDRESS" not in seen.stdout and "RAY_AUTH_MODE=token" in seen.stdout

    def test_object_stores_of_compose_have_room_in_shared_memory(self, monkeypatch):
        services = yaml.safe_load((CLUSTER / "docker" / "compose.yaml").read_text())["services"]
        for name in ("head", "worker"):
            given = [word.partition("=")[2] for word in services[name]["command"] if "object-store-memory" in word]
            room = size(services[name]["shm_size"])
            assert object_store(next(iter(given), None), 64 * 2**30, room, monkeypatch) <= room, name

    def test_compose_takes_it(self):
        docker = program("docker")
        if subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
            pytest.skip("this Docker has no compose")
        environment = os.environ | {name: "x" for name in ("RAY_AUTH_TOKEN", "AWS_ACCESS_KEY_ID")}
        environment |= {"MLFLOW_TRACKING_USERNAME": "x", "MLFLOW_TRACKING_PASSWORD": "x", "AWS_SECRET_ACCESS_KEY": "x"}
        words = [docker, "compose", "-f", CLUSTER / "docker" / "compose.yaml", "config", "--quiet"]
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr


def size(told: str) -> int:
    """Bytes of 2Gi, as Kubernetes writes it, or 2gb, as Docker does."""
    return int(told.rstrip("Gigb")) * 2**30


def object_store(given: str | None, memory: int, room: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How large Ray makes it, on a disk where /dev/shm has less room."""
    from ray._private import utils

    monkeypatch.setattr(utils, "get_shared_memory_bytes", lambda: room)
    return utils.resolve_object_store_memory(memory, int(given) if given else None)


@cache
def rendered(name: str) -> list[dict]:
    """What kubectl makes of a kustomization."""
    done = subprocess.run([program("kubectl"), "kustomize", CLUSTER / "kuberay" / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def cluster_of(name: str) -> dict:
    """The specification of the Ray cluster in it, wherever it stands."""
    where = {"RayCluster": ("spec",), "RayJob": ("spec", "rayClusterSpec"), "RayService": ("spec", "rayClusterConfig")}
    [found] = [thing for thing in rendered(name) if thing["kind"] in where]
    for key in where[found["kind"]]:
        found = found[key]
    return found


def pods_of(name: str) -> dict[str, dict]:
    """The pod templates in it."""
    cluster = cluster_of(name)
    pods = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    pods["head"] = cluster["headGroupSpec"]["template"]
    pods |= {t["metadata"]["name"]: t["spec"]["template"] for t in rendered(name) if t["kind"] == "Deployment"}
    return pods


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
class TestKubernetes:
    """What kubectl makes of cluster/kuberay."""

    def test_ray_demands_the_token_and_drivers_have_a_place(self, name):
        cluster = cluster_of(name)
        assert cluster["authOptions"] == {"mode": "token", "secretName": "raymed-token"}
        start = cluster["headGroupSpec"]["rayStartParams"]
        assert start["num-cpus"] == "0" and json.loads(json.loads(start["resources"])) == {"raymed_driver": 1000}
        assert cluster["enableInTreeAutoscaling"]

    def test_pods_are_nobody_in_particular_and_have_shared_memory(self, name):
        for pod in pods_of(name).values():
            assert pod["spec"]["securityContext"]["runAsNonRoot"]
            [container] = pod["spec"]["containers"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]
            places = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) == set(places)
            if container["name"] == "ray":
                assert places[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
            else:
                assert container["readinessProbe"] and container["livenessProbe"]

    def test_object_stores_have_room_in_shared_memory(self, name, monkeypatch):
        cluster = cluster_of(name)
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            [container] = group["template"]["spec"]["containers"]
            [shm] = [v["emptyDir"] for v in group["template"]["spec"]["volumes"] if v["name"] == "shm"]
            given = group["rayStartParams"].get("object-store-memory")
            room, memory = size(shm["sizeLimit"]), size(container["resources"]["limits"]["memory"])
            assert object_store(given, memory, room, monkeypatch) <= room, group.get("groupName", "head")

    def test_pods_are_what_kubernetes_takes(self, name):
        validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
        things = [thing for thing in rendered(name) if not thing["apiVersion"].startswith("ray.io")]
        pods = [
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **pod} for pod in pods_of(name).values()
        ]
        for thing in things + [{**pod, "metadata": {"name": "pod"}} for pod in pods]:
            validator.validate(thing, "1.33", strict=True)

    @pytest.mark.slow  # the definitions are 1.4 MB each
    def test_the_cluster_is_what_kuberay_takes(self, name):
        folder = os.environ.get("RAYMED_KUBERAY_CRDS")
        if not folder:
            pytest.skip(
                "RAYMED_KUBERAY_CRDS names no folder with KubeRay's ray.io_*.yaml (helm-chart/kuberay-operator/crds)"
            )
        import jsonschema

        quick = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        definitions = [yaml.load(path.read_text(), quick) for path in Path(folder).glob("ray.io_*.yaml")]
        known = {
            (d["spec"]["names"]["kind"], f"ray.io/{version['name']}"): version["schema"]["openAPIV3Schema"]
            for d in definitions
            for version in d["spec"]["versions"]
        }
        things = [thing for thing in rendered(name) if thing["apiVersion"].startswith("ray.io")]
        assert things
        for thing in things:
            schema = strict(known[thing["kind"], thing["apiVersion"]]["properties"]["spec"])
            jsonschema.Draft7Validator(schema).validate(thing["spec"])


def strict(schema: Any) -> Any:
    """A schema of Kubernetes that refuses fields it does not know, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {}
    closed = schema.get("type") == "object" and "properties" in schema and "additionalProperties" not in schema
    return {key: strict(part) for key, part in schema.items()} | ({"additionalProperties": False} if closed else {})


def test_small_needs_no_gpu_and_large_has_two_kinds():
    assert "nvidia.com/gpu" not in json.dumps(cluster_of("overlays/small"))
    groups = {group["groupName"]: group for group in cluster_of("overlays/large")["workerGroupSpecs"]}
    gpus = {
        name: group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        for name, group in groups.items()
    }
    assert gpus == {"gpu": "1", "gpu8": "8"} and groups["gpu"]["maxReplicas"] == 16


def test_a_job_and_a_service_have_clusters_of_their_own_and_make_no_other():
    for name, kind in (("job", "RayJob"), ("serve", "RayService")):
        assert [thing["kind"] for thing in rendered(name)] == [kind]
        assert cluster_of(name)["headGroupSpec"] == cluster_of("overlays/small")["headGroupSpec"] | {
            "template": cluster_of(name)["headGroupSpec"]["template"]
        }
    [container] = pods_of("job")["head"]["spec"]["containers"]
    assert container["image"] == "raymed:0.1.0"


def test_a_service_beside_the_cluster_leaves_that_its_head():
    """KubeRay names a head's Service after the cluster, or after the service that the cluster is of."""
    [service] = rendered("serve")
    [cluster] = [thing for thing in rendered("overlays/small") if thing["kind"] == "RayCluster"]
    name = service["metadata"]["name"]
    assert name != cluster["metadata"]["name"]
    told = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]["access"]["hosts"]
    assert f"{name}-serve-svc" in told
    assert f"{name}-serve-svc:8000" in (CLUSTER / "kuberay" / "serve" / "kustomization.yaml").read_text()


def test_the_service_is_what_serve_and_raymed_expect():
    from ray.serve.schema import ServeDeploySchema

    [service] = rendered("serve")
    told = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(told).applications
    config = from_dict(ServeConfig, application.args)
    assert application.import_path == "raymed.serve.on_ray:build" and not config.access.open
    assert service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplicas"] == 1
