"""The on-prem provider before there is a cluster: its files, and hosts that cannot be used (`onprem_hosts`)."""

import dataclasses
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from onprem_hosts import Hosts, check_possible, make_venv

from raymed.cluster import state
from raymed.cluster.providers import onprem, onprem_host, ssh
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
        if name.endswith(".service"):
            paths.append(tmp_path / Path(name).name)
            paths[-1].write_text(text.replace("/usr/bin/python ", "/usr/bin/env python "))
    assert len(paths) == 3
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *map(str, paths)], capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "raymed" in line]
    assert done.returncode == 0 and not complaints, done.stderr


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
        return {name for name in onprem._of_services(config, cluster) if name.startswith("AWS_")}

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
