"""A cluster of two hosts, each with its own systemd, sshd and network (`onprem_hosts`): up, a job, crashes, a reboot,
down. One test after the other, on one cluster."""

import io
from contextlib import redirect_stdout
from pathlib import Path

import httpx
import pytest
from nodes import wait_for
from onprem_hosts import Hosts, check_possible, make_venv

from raymed.cluster import state
from raymed.cluster.providers import onprem, onprem_host
from raymed.cluster.state import Cluster
from raymed.config import UserError

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PATIENCE = 300.0
JOB = """
import os, socket, mlflow, ray

ray.init(log_to_driver=False)

@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def write(name):
    with open(os.path.join(os.environ["RAYMED_HOME"], name), "w") as file:
        file.write(socket.gethostname())
    return os.environ["RAYMED_LOCAL"]

print("local", set(ray.get([write.remote(f"part-{i}") for i in range(4)])), "driver", socket.gethostname())
with mlflow.start_run():
    mlflow.set_tag("origin", "job")
raise SystemExit(3)
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    check_possible()
    pytest.importorskip("flask_wtf", reason="needs mlflow[auth]")
    folder = tmp_path_factory.mktemp("hosts")
    make_venv(folder)
    with pytest.MonkeyPatch.context() as patch, Hosts(folder) as hosts:
        patch.setenv("RAYMED_CLUSTER", str(folder / "cluster"))
        yield hosts


@pytest.fixture(scope="module")
def config(hosts):
    names = tuple(map(hosts.address, ("alpha", "beta")))
    own = {"key": hosts.key, "ssh_config": hosts.config, "venv": str(hosts.folder / "venv"), "head_works": True}
    return onprem.Config("/shared/store", names, **own)


@pytest.fixture(scope="module")
def cluster(config) -> Cluster:
    return onprem.up(config)


@pytest.fixture(scope="module", autouse=True)
def taken_down(hosts):
    """What a failed test leaves here: tunnels."""
    yield
    if (left := state.load()) is not None:
        onprem.tunnels.close(left)


def down(cluster: Cluster) -> dict[str, str]:
    """What is not up, and why."""
    return {line.name: line.detail for line in onprem.status(cluster) if not line.is_up}


def nodes(cluster: Cluster) -> set[str]:
    return {line.name for line in onprem.status(cluster) if line.name.startswith("node ") and line.is_up}


def all_nodes(hosts: Hosts) -> set[str]:
    return {"node head", *(f"node worker-{hosts.address(name)}" for name in ("alpha", "beta"))}


def runs(cluster: Cluster) -> int:
    """Of the job, that MLflow knows."""
    user = (cluster.environment["MLFLOW_TRACKING_USERNAME"], cluster.environment["MLFLOW_TRACKING_PASSWORD"])
    asked = {"experiment_ids": ["0"], "filter": "tags.origin = 'job'"}
    url = f"{cluster.addresses['mlflow']}/api/2.0/mlflow/runs/search"
    answer = httpx.post(url, json=asked, auth=user, trust_env=False).raise_for_status()
    return len(answer.json().get("runs", []))


def test_it_is_up(hosts, cluster):
    assert down(cluster) == {}
    assert nodes(cluster) == all_nodes(hosts)
    services = {line.name for line in onprem.status(cluster) if line.name.startswith("raymed-")}
    head, worker = hosts.address("alpha"), hosts.address("beta")
    assert services == {f"raymed-{s}@{head}" for s in ("head", "mlflow", "worker")} | {f"raymed-worker@{worker}"}


def test_a_head_that_a_host_cannot_reach(hosts, config, cluster):
    names = [hosts.address("alpha"), hosts.address("beta")]
    beta = onprem._usable(config, names, cluster.facts["id"])[1]
    onprem_host.check_reaches(beta, config.venv, names[0], 6379, 5000)
    with pytest.raises(UserError, match=f"{names[1]}: cannot reach the head at {names[0]}:9 .*refused"):
        onprem_host.check_reaches(beta, config.venv, names[0], 9)


def test_nobody_gets_in_without_token_or_password(hosts, cluster):
    assert httpx.get(f"{cluster.addresses['dashboard']}/api/v0/nodes", trust_env=False).status_code == 401
    experiments = f"{cluster.addresses['mlflow']}/api/2.0/mlflow/experiments/search?max_results=1"
    assert httpx.get(experiments, trust_env=False).status_code == 401
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{hosts.address('alpha')}:8265", trust_env=False)


def test_secrets_are_seen_by_their_owner_alone(hosts, cluster):
    secrets = [Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()]
    secrets += [cluster.environment["MLFLOW_TRACKING_PASSWORD"]]
    for name in ("alpha", "beta"):
        modes = hosts.inside(name, "stat", "-c", "%a", "/etc/raymed/token", "/etc/raymed/environment").split()
        assert modes == ["600", "600"]
        seen = hosts.inside(name, "sh", "-c", "ps -eww -o args; cat /etc/systemd/system/raymed-*; journalctl -o cat")
        assert not [secret for secret in secrets if secret in seen]


def test_a_job_runs_on_both_hosts(hosts, cluster, tmp_path, monkeypatch):
    from raymed.cluster.submit import submit

    (tmp_path / "job.py").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with redirect_stdout(said):
        assert submit(cluster, "job.py") == 3
    assert "local {'/var/lib/raymed/local'} driver alpha" in said.getvalue()
    assert {path.read_text() for path in (hosts.shared / "store").glob("part-*")} == {"alpha", "beta"}
    assert runs(cluster) == 1


def test_what_is_up_is_left_as_it_is(hosts, config, cluster):
    def started() -> list[str]:
        words = ("systemctl", "show", "--property=ExecMainStartTimestamp,NRestarts", "raymed-head", "raymed-worker")
        return [hosts.inside(name, *words) for name in ("alpha", "beta")]

    before = started()
    again = onprem.up(config)
    assert started() == before
    assert (again.addresses, again.environment) == (cluster.addresses, cluster.environment)


def test_logs_are_in_the_journal(hosts, cluster):
    logs = onprem.logs(cluster)
    assert "Ray runtime started" in logs[f"raymed-head@{hosts.address('alpha')}"]()
    assert logs[f"raymed-worker@{hosts.address('beta')}"]()


def test_a_worker_that_crashed_comes_back(hosts, cluster):
    hosts.inside("beta", "pkill", "-9", "raylet")  # of that host alone
    wait_for(lambda: "1" in restarts(hosts, "beta", "raymed-worker"), PATIENCE, "systemd starts it again")
    wait_for(lambda: nodes(cluster) == all_nodes(hosts), PATIENCE, "the node is back")


def restarts(hosts: Hosts, name: str, service: str) -> str:
    return hosts.inside(name, "systemctl", "show", "--property=NRestarts", "--value", service)


def test_a_reboot_is_survived(hosts, cluster):
    """The head's: power off and on again. The other host's worker finds the new head by itself."""
    hosts.cut_power("alpha")
    told = down(cluster)
    assert "cannot be reached" in told[hosts.address("alpha")] and "dashboard" in told
    hosts.boot("alpha")
    wait_for(lambda: not down(cluster) and nodes(cluster) == all_nodes(hosts), PATIENCE, "all of it is back")
    assert hosts.inside("alpha", "systemctl", "is-active", onprem_host.TIMER) == "active\n"
    assert runs(cluster) == 1


def test_it_goes_down_with_nothing_left(hosts, cluster):
    hosts.unplug("beta")
    with pytest.raises(ValueError, match=rf"(?s){hosts.address('beta')}: cannot be reached.*`down` again"):
        onprem.down(state.required())
    hosts.unplug("beta", "up")
    assert state.required().facts["hosts"] == [hosts.address("beta")]
    onprem.down(state.required())
    assert state.load() is None
    for name in ("alpha", "beta"):
        units = hosts.inside(name, "systemctl", "list-units", "--all", "--plain", "--no-legend", "raymed-*")
        assert units == ""
        assert hosts.inside(name, "sh", "-c", "ls -d /etc/raymed /etc/systemd/system/raymed* 2>/dev/null || true") == ""
        assert hosts.inside(name, "sh", "-c", "pgrep -f '[r]aylet|[g]cs_server|[m]lflow_server' || true") == ""
    assert (hosts.shared / "store" / "mlflow" / "mlflow.db").is_file()
    assert not [url for url in cluster.addresses.values() if answers(url)]


def answers(url: str) -> bool:
    try:
        httpx.get(url, trust_env=False)
    except httpx.HTTPError:
        return False
    return True
