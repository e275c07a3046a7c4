"""The on-prem provider before there is a cluster: its files, and hosts that cannot be used (`onprem_hosts`)."""

import dataclasses
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from onprem_hosts import Hosts, check_possible, make_venv

from raymed.cluster import state
from raymed.cluster.providers import onprem, onprem_environment, onprem_host, ssh
from raymed.cluster.state import Cluster
from raymed.config import UserError

WORDS = {"user": "root", "venv": "/usr", "head": "10.0.0.1", "address": "10.0.0.2", "name": "worker", "logs": "true"}
SECRETS = {"MLFLOW_TRACKING_PASSWORD": 'p"a\\ss $HOME'}


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    """No cluster is known, and no connection of another test is used again."""
    monkeypatch.setenv("RAYMED_CLUSTER", str(tmp_path / "cluster"))
    with tempfile.TemporaryDirectory(prefix="ssh-") as sockets:
        monkeypatch.setattr(ssh, "_sockets", lambda: Path(sockets))
        yield


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    check_possible()
    folder = tmp_path_factory.mktemp("hosts")
    make_venv(folder)
    with Hosts(folder) as hosts:
        yield hosts


@pytest.fixture
def password():
    """Skips where MLflow could not ask for one."""
    pytest.importorskip("flask_wtf", reason="needs mlflow[auth]")


def config(hosts: Hosts, *names: str, **changes) -> onprem.Config:
    own = {
        "hosts": tuple(hosts.address(name) for name in names),
        "storage": "/shared/store",
        "key": hosts.key,
        "ssh_config": hosts.config,
        "venv": str(hosts.folder / "venv"),
    }
    return onprem.Config(**(own | changes))


def refused(config: onprem.Config) -> str:
    """What `up` says; it must leave no cluster behind."""
    with pytest.raises(UserError) as error:
        onprem.up(config)
    assert state.load() is None
    return str(error.value)


def test_units_are_what_systemd_takes(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: apt install systemd")
    paths = []
    for name, (text, _) in onprem_host.contents(onprem_host.SERVICES, WORDS, "token", SECRETS).files.items():
        if name.startswith("systemd/"):
            paths.append(tmp_path / Path(name).name)
            paths[-1].write_text(text.replace("/usr/bin/python ", "/usr/bin/env python "))
    assert len(paths) == 5
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *map(str, paths)], capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "raymed" in line]
    assert done.returncode == 0 and not complaints, done.stderr


def lines_of(unit: str, setting: str, root: Path) -> list[list[str]]:
    """The commands of a unit, with another folder in the place of /var/lib/raymed/ray."""
    text, _ = onprem_host.contents(("raymed-head", "raymed-worker"), WORDS, "token", {}).files[f"systemd/system/{unit}"]
    found = [line.removeprefix(f"{setting}=-") for line in text.splitlines() if line.startswith(f"{setting}=-")]
    return [shlex.split(line.replace("/var/lib/raymed/ray", str(root))) for line in found]


@pytest.mark.parametrize("unit", ["raymed-head.service", "raymed-worker.service"])
def test_three_sessions_stay_when_a_node_starts(tmp_path, unit):
    for age, name in enumerate(("session_2026-03", "session_2026-01", "session_2026-04", "session_2026-02")):
        (tmp_path / name / "logs").mkdir(parents=True)
        os.utime(tmp_path / name, (10**9 - age, 10**9 - age))
    (tmp_path / "session_latest").symlink_to("session_2026-03")
    (tmp_path / "kept").mkdir()
    [command] = lines_of(unit, "ExecStartPre", tmp_path)
    subprocess.run(command, check=True)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"session_2026-03", "session_2026-01", "session_2026-04", "session_latest", "kept"}
    subprocess.run(command, check=True)
    assert {path.name for path in tmp_path.iterdir()} == left


def test_logs_that_nobody_writes_go_while_a_node_runs(tmp_path):
    """Not those that a process has open, however silent it is; nor anything beside the logs."""
    logs = tmp_path / "session_2026-01" / "logs"
    old = ["logs/worker-ended.out", "logs/serve/replica.log", "logs/raylet.out"]
    others = ["logs/worker-new.out", "sockets/kept", "logs/old/.keep"]
    for name in (*old, *others):
        path = logs.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    month = time.time() - 32 * 86400
    for name in (*old, "sockets/kept"):
        os.utime(logs.parent / name, (month, month))
    with (logs / "raylet.out").open("a"):
        commands = lines_of("raymed-logs.service", "ExecStart", tmp_path)
        for command in commands:
            subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
    assert len(commands) == 2
    left = {str(path.relative_to(logs.parent)) for path in logs.parent.rglob("*") if path.is_file()}
    assert left == {"logs/raylet.out", *others}
    assert (logs / "serve").is_dir() and abs((logs / "raylet.out").stat().st_mtime - month) < 1


def test_secrets_are_in_files_of_their_owner_alone():
    files = onprem_host.contents(("raymed-head",), WORDS, "the-token", SECRETS).files
    secret = {name for name, (text, _) in files.items() if "the-token" in text or 'p\\"a\\\\ss' in text}
    assert (
        secret == {"raymed/token", "raymed/environment"} == {name for name, (_, mode) in files.items() if mode == 0o600}
    )


def test_a_change_of_anything_changes_the_digest():
    def digest(token="t", **environment):
        return onprem_host.contents(("raymed-head",), WORDS, token, environment).digest()

    assert digest() == digest()
    assert len({digest(), digest("other"), digest(A="1"), digest(A="2")}) == 4
    with pytest.raises(UserError, match="more than one line"):
        digest(A="1\n2")


@pytest.mark.parametrize(
    "given, told",
    [
        ({"storage": "shared"}, "absolute path or s3://"),
        ({"storage": "/shared", "venv": "~/venv"}, "--venv must be"),
        ({"storage": "/shared", "wheels": "/wheels"}, "--install"),
    ],
)
def test_flags_that_cannot_be(given, told):
    with pytest.raises(UserError, match=told):
        onprem.Config(**given)


def test_keys_of_a_bucket_go_along_and_a_profile_does_not(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.setenv(name, name)

    def environment(storage: str) -> set[str]:
        config = onprem.Config(storage, ("a",))
        machine = onprem_host.Machine(ssh.Host("a"), "root", 0, 0, "10.0.0.1")
        cluster = onprem._planned(config, None, [machine], "id")
        return {name for name in onprem_environment.of_services(config.venv, cluster) if name.startswith("AWS_")}

    assert environment("s3://bucket/raymed") == {"AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL"}
    assert environment("/shared") == set()


def environment_of_before(monkeypatch, storage: str, now: dict[str, str]) -> dict[str, str]:
    """The bucket's part of what a cluster has that was brought up with keys, a session and an endpoint, in a shell that
    has others now."""
    first = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_SESSION_TOKEN": "t", "AWS_ENDPOINT_URL": "e"}
    machine = onprem_host.Machine(ssh.Host("a"), "root", 0, 0, "10.0.0.1")
    before = None
    for bucket, shell in (("s3://bucket/raymed", first), (storage, now)):
        for name in first:
            monkeypatch.delenv(name, raising=False)
        for name, value in shell.items():
            monkeypatch.setenv(name, value)
        before = onprem._planned(onprem.Config(bucket, ("a",)), before, [machine], "id")
    assert before is not None
    return {name: value for name, value in before.environment.items() if name in first}


def test_a_shell_without_the_keys_leaves_the_clusters_own(monkeypatch):
    same = "s3://bucket/raymed/"
    had = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_SESSION_TOKEN": "t", "AWS_ENDPOINT_URL": "e"}
    assert environment_of_before(monkeypatch, same, {}) == had
    lasting = {"AWS_ACCESS_KEY_ID": "k2", "AWS_SECRET_ACCESS_KEY": "s2"}
    assert environment_of_before(monkeypatch, same, lasting) == lasting | {"AWS_ENDPOINT_URL": "e"}, "no old session"
    assert environment_of_before(monkeypatch, "s3://other/raymed", {}) == {}, "they were for another bucket"


def planned(before: Cluster | None, **flags) -> Cluster:
    machine = onprem_host.Machine(ssh.Host("a"), "root", 0, 0, "10.0.0.1")
    return onprem._planned(onprem.Config("s3://bucket/raymed", ("a",), **flags), before, [machine], "id")


def test_variables_of_a_file_reach_services_and_no_client(tmp_path):
    """Paths and proxies are the hosts'. They stay until another file is given."""
    path = tmp_path / "variables"
    path.write_text("# ours\nAWS_CA_BUNDLE=/etc/ssl/house.pem\n\nNO_PROXY=10.0.0.1,10.0.0.2\n")

    def added(cluster: Cluster) -> dict[str, str]:
        text, _ = onprem_host.contents((), WORDS, "t", onprem_environment.of_services("/v", cluster)).files[
            "raymed/environment"
        ]
        lines = dict(line.split("=", 1) for line in text.splitlines())
        return {name: lines[name] for name in ("AWS_CA_BUNDLE", "NO_PROXY") if name in lines}

    cluster = planned(None, environment=path)
    assert added(cluster) == {"AWS_CA_BUNDLE": '"/etc/ssl/house.pem"', "NO_PROXY": '"10.0.0.1,10.0.0.2"'}
    assert not {"AWS_CA_BUNDLE", "NO_PROXY"} & cluster.environment.keys()
    assert added(planned(cluster)) == added(cluster)
    path.write_text("")
    assert added(planned(cluster, environment=path)) == {}


@pytest.mark.parametrize(
    "line, told",
    [
        ("MLFLOW_TRACKING_PASSWORD=mine", "may not set MLFLOW_TRACKING_PASSWORD: raymed does so itself"),
        ("PATH=/bin\nRAYMED_HOME=/there", "may not set PATH, RAYMED_HOME: "),
        ("RAY_API_SERVER_ADDRESS=http://there", "may not set RAY_API_SERVER_ADDRESS: "),
        ("MLFLOW_SERVER_ENABLE_JOB_EXECUTION=true", "may not set MLFLOW_SERVER_ENABLE_JOB_EXECUTION: "),
        ("AWS_REGION=here", "may not set AWS_REGION: .*this shell's variables"),
        ("SSL_CERT_FILE=house.pem", "SSL_CERT_FILE must be an absolute path on the hosts, got 'house.pem'"),
        ("HTTPS_PROXY", "--environment .*variables: line 1 of those with a value is not NAME=VALUE"),
    ],
)
def test_variables_that_cannot_be_added(tmp_path, line, told):
    (tmp_path / "variables").write_text(line)
    with pytest.raises(UserError, match=told):
        planned(None, environment=tmp_path / "variables")


def test_a_cluster_that_was_ended_meanwhile_is_not_brought_back(monkeypatch):
    """`status` asks the hosts first, which takes long where one does not answer."""
    monkeypatch.setattr(onprem.tunnels, "opened", lambda *_: pytest.fail("a tunnel to nowhere"))
    with pytest.raises(UserError, match="no cluster is up"):
        onprem._through_tunnels(Cluster("onprem", facts={"tunnels": {}}))
    assert state.load() is None


def test_the_list_of_hosts(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# ours\nadmin@10.0.0.1  # head\n\ngpu-2\n")
    assert onprem.Config("/s", hosts_file=path).names() == ["admin@10.0.0.1", "gpu-2"]
    for wrong, told in {
        (): "--hosts-file",
        ("a", "a"): "each of them once",
        ("-oProxyCommand=touch x",): "a host is",
    }.items():
        with pytest.raises(UserError, match=told):
            onprem.Config("/s", hosts=wrong).names()
    with pytest.raises(UserError, match="cannot be read"):
        onprem.Config("/s", hosts_file=tmp_path / "none").names()


def test_keys_that_ssh_would_not_take(tmp_path):
    key = tmp_path / "key"
    with pytest.raises(UserError, match="is not there"):
        ssh.check_here(key, None)
    key.write_text("key")
    key.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        ssh.check_here(key, None)


def test_a_host_is_found_as_it_is(hosts, password):
    name = hosts.address("alpha")
    machine = onprem_host.survey(ssh.Host(name, str(hosts.key), str(hosts.config)), str(hosts.folder / "venv"))
    assert (machine.user, machine.address, machine.mark) == ("root", name, "")
    onprem_host.check_versions(machine, "venv")


def test_all_hosts_that_cannot_be_reached_are_told_of_at_once(hosts):
    known = hosts.known.read_text()
    alpha, beta = hosts.address("alpha"), hosts.address("beta")
    try:
        hosts.known.write_text("".join(line for line in known.splitlines(True) if not line.startswith(alpha)))
        hosts.unplug("beta")
        said = refused(config(hosts, "alpha", "beta"))
    finally:
        hosts.known.write_text(known)
        hosts.unplug("beta", "up")
    assert f"{alpha}: its host key is not known here" in said and f"{beta}: cannot be reached" in said


def test_a_host_whose_key_changed(hosts):
    known = hosts.known.read_text()
    try:
        other = hosts.known.read_text().splitlines()[1].split(" ", 1)[1]
        hosts.known.write_text(f"{hosts.address('alpha')} {other}\n")
        assert "another one than before" in refused(config(hosts, "alpha"))
    finally:
        hosts.known.write_text(known)


def test_a_key_that_the_host_does_not_take(hosts, tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    assert "it does not take the key" in refused(config(hosts, "beta", key=tmp_path / "other"))


def test_no_python_there(hosts):
    assert "there is no Python at /opt/none/bin/python" in refused(config(hosts, "alpha", venv="/opt/none"))
    said = refused_after_start(config(hosts, "alpha", venv="/opt/none", install=True, python="python2.4"))
    assert "there is no python2.4" in said


def refused_after_start(config: onprem.Config) -> str:
    """What `up` says where something was begun: `down` ends it."""
    with pytest.raises(UserError) as error:
        onprem.up(config)
    onprem.down(state.required())
    assert state.load() is None
    return str(error.value)


def test_packages_that_cannot_be_had(hosts):
    """The environment is really made; what pip says reaches the caller."""
    (hosts.shared / "wheels").mkdir(exist_ok=True)
    said = refused_after_start(config(hosts, "alpha", venv="/opt/raymed/venv", install=True, wheels="/shared/wheels"))
    assert "No matching distribution found" in said
    hosts.inside("alpha", "test", "-x", "/opt/raymed/venv/bin/python")


def test_another_ray_there(hosts, tmp_path):
    venv = make_venv(tmp_path)
    metadata = next(venv.glob("lib/python*/site-packages")) / "ray-2.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: ray\nVersion: 2.1.0\n")
    said = refused(config(hosts, "alpha", venv=str(venv)))
    assert f"ray 2.1.0, here {onprem_host.own_versions()['ray']}" in said


def test_a_user_who_may_not_install_services(hosts):
    hosts.inside("beta", "useradd", "--create-home", "plain")
    hosts.inside("beta", "cp", "-r", "/root/.ssh", "/home/plain/.ssh")
    hosts.inside("beta", "chown", "-R", "plain", "/home/plain/.ssh")
    named = dataclasses.replace(config(hosts), hosts=(f"plain@{hosts.address('beta')}",))
    assert "plain may not use sudo without a password" in refused(named)


def test_a_bundle_that_hosts_do_not_have(hosts, tmp_path):
    """Nothing is written to a host then, and all are told of."""
    (tmp_path / "variables").write_text("AWS_CA_BUNDLE=/srv/house's.pem\nREQUESTS_CA_BUNDLE=/etc/hostname")
    said = refused(config(hosts, "alpha", "beta", environment=tmp_path / "variables"))
    told = "root cannot read AWS_CA_BUNDLE=/srv/house's.pem there: put the file on every host, at the same path"
    assert said.splitlines() == [f"{hosts.address(name)}: {told}" for name in ("alpha", "beta")]


def test_a_host_cleans_its_logs_each_day_until_it_is_ended(hosts):
    """By its own systemd; no service is there but the timer's."""
    host = ssh.Host(hosts.address("alpha"), str(hosts.key), str(hosts.config))
    machine = onprem_host.survey(host, str(hosts.folder / "venv"))
    onprem_host.write(machine, "id", onprem_host.contents((), WORDS, "t", {}))
    assert hosts.inside("alpha", "systemctl", "is-active", onprem_host.TIMER) == "active\n"
    logs = "/var/lib/raymed/ray/session_2026-01/logs"
    make = f"mkdir -p {logs} && cd {logs} && touch new && touch -d '32 days ago' old"
    hosts.inside("alpha", "sh", "-c", make)
    hosts.inside("alpha", "systemctl", "start", "raymed-logs.service")
    assert hosts.inside("alpha", "ls", logs) == "new\n"
    onprem_host.end(host, "other")
    onprem_host.end(host, "id", spared=[machine.address])
    assert hosts.inside("alpha", "systemctl", "is-active", onprem_host.TIMER) == "active\n"
    onprem_host.end(host, "id")
    assert hosts.inside("alpha", "systemctl", "list-units", "--all", "--plain", "--no-legend", "raymed-*") == ""
    left = "find /etc/raymed /var/lib/raymed/ray /etc/systemd -name 'raymed*' 2>/dev/null || true"
    assert hosts.inside("alpha", "sh", "-c", left) == ""


def test_a_host_of_another_cluster(hosts):
    hosts.inside("beta", "mkdir", "-p", "/etc/raymed")
    hosts.inside("beta", "sh", "-c", "printf 'abcd 1234\\nmeier at desk\\n' > /etc/raymed/cluster")
    try:
        assert "a cluster that meier at desk brought up" in refused(config(hosts, "alpha", "beta"))
    finally:
        hosts.inside("beta", "rm", "-r", "/etc/raymed")


def test_storage_that_hosts_do_not_share(hosts, password):
    """/mnt is each host's own."""
    said = refused_after_start(config(hosts, "alpha", "beta", storage="/mnt/store"))
    assert f"{hosts.address('beta')}: /mnt/store is not the folder that the head sees" in said
