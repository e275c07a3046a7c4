"""`up` on an on-prem cluster that is up: what goes on, what starts again, what is remembered. Hosts answer from memory;
what they would run is looked at. Real ones are in test_onprem_cluster.py."""

import io
import json
import shlex
import subprocess
import tarfile
from collections.abc import Mapping

import pytest

from raymed.cluster import state
from raymed.cluster.logs import logs
from raymed.cluster.providers import onprem, onprem_host, ssh
from raymed.config import UserError


class Hosts:
    """Machines as far as scripts tell: what lies in /etc, and whose services were stopped."""

    def __init__(self):
        self.etc: dict[str, dict[str, str]] = {}
        self.names: dict[str, str] = {}
        """Other names of hosts -> theirs."""
        self.ended: list[str] = []
        self.stopped: list[str] = []
        self.unreachable: set[str] = set()
        self.bad_keys: set[str] = set()
        self.unreadable: set[str] = set()
        self.projects: dict[str, str] = {}
        """What was installed on hosts."""
        self.installed: list[str] = []
        self.pythons: dict[str, str] = {}
        """Of hosts that have another one than this machine."""

    def run(self, host: ssh.Host, script: str, data: bytes = b"", seconds: float = 0.0) -> str:
        name = self.names.get(host.name, host.name)
        files = self.etc.setdefault(name, {})
        if host.name in self.unreachable:
            raise ssh.Failed(f"{host.name}: cannot be reached")
        if "uname" in script:
            return "\n".join(f"{name}={value}" for name, value in self.found(name).items())
        if "SSH_CONNECTION" in script:
            return f"{name}\n"
        if "journalctl" in script:
            return f"{name} wrote as {script.rpartition('--unit=')[2].rstrip(chr(39))}"
        if "[ -r" in script:
            return "AWS_CA_BUNDLE=/etc/house.pem\n" if name in self.unreadable else ""
        if "-m pip install" in script:
            self.projects[name] = script.rpartition("echo ")[2].split()[0]
            self.installed.append(name)
            return ""
        if "systemd-run" in script:
            environment = data.decode() or files["raymed/environment"]
            if any(f'"{key}"' in environment for key in self.bad_keys):
                raise ssh.Failed(f"{host.name}: the bucket does not take these keys")
        elif "rm -rf /etc/raymed" in script and _goes_on(script, files.get("raymed/cluster", "")):
            files.clear()
            self.ended.append(name)
        elif "tar -x" in script:
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                files |= {entry.name: archive.extractfile(entry).read().decode() for entry in archive}  # pyright: ignore
            self.stopped.append(name)
            assert 0 < script.index("systemctl stop") < script.index("systemctl start")
        elif "is-active" in script:
            return "\n".join(f"{service} active" for service in sorted(self.services(name)))
        return ""

    def found(self, name: str) -> Mapping[str, object]:
        mark, owner = (*self.etc[name].get("raymed/cluster", "").splitlines(), "", "")[:2]
        own = onprem_host.own_versions()
        versions = json.dumps(own | {"flask-wtf": "1", "python": self.pythons.get(name, own["python"])})
        machine = {"system": "Linux", "systemd": "yes", "root": "yes", "user": "root", "uid": 0, "gid": 0}
        own = {"mark": mark, "owner": owner, "versions": versions, "project": self.projects.get(name, "")}
        return machine | {"address": name} | own

    def services(self, name: str) -> set[str]:
        units = {path.rpartition("/")[2] for path in self.etc.get(name, {})}
        return {service for service in onprem_host.SERVICES if f"{service}.service" in units}

    def nodes(self, *_) -> dict[str, dict]:
        workers = [name for name in self.etc if "raymed-worker" in self.services(name) and name not in self.unreachable]
        return {name: {} for name in ("head", *(f"worker-{name}" for name in workers))}


def _goes_on(script: str, mark: str) -> bool:
    """Whether a script gets as far as systemctl, by a real shell, on a host with this mark."""
    first = shlex.split(script)[-1].partition("systemctl")[0].replace("/etc/raymed/cluster", "-")
    return (
        subprocess.run(["sh", "-c", f"{first}\necho on"], input=mark, capture_output=True, text=True).stdout == "on\n"
    )


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMED_CLUSTER", str(tmp_path / "cluster"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "good")
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    hosts = Hosts()
    monkeypatch.setattr(ssh.Host, "run", lambda host, *words, **how: hosts.run(host, *words, **how))
    monkeypatch.setattr(onprem, "check_here", lambda *_: None)
    monkeypatch.setattr(onprem.tunnels, "opened", lambda cluster, _: cluster)
    monkeypatch.setattr(onprem.mlflow, "ask", lambda _: "")
    monkeypatch.setattr(onprem.ray, "nodes", hosts.nodes)
    monkeypatch.setattr(onprem.ray, "ask_dashboard", lambda *_: "")
    monkeypatch.setattr(onprem.ray, "describe", lambda _: "")
    monkeypatch.setattr(onprem, "START_SECONDS", -1.0)
    return hosts


def up(*names: str, **flags) -> state.Cluster:
    return onprem.up(onprem.Config("s3://bucket/raymed", names, **flags))


@pytest.mark.parametrize("install", [False, True])
def test_hosts_with_another_python_than_the_heads_are_told_of(hosts, install):
    """Ray compares the last number too, and would join none of them. This machine's own does not matter."""
    minor = onprem_host.own_versions()["python"].rpartition(".")[0]
    hosts.pythons = dict.fromkeys("abc", f"{minor}.77")
    up("a", "b", install=install)
    hosts.stopped.clear()
    hosts.pythons["b"] = hosts.pythons["c"] = f"{minor}.78"
    said = f"a, the head, has {minor}.77, b has {minor}.78, c has {minor}.78: bring the same one to all"
    with pytest.raises(UserError, match=said):
        up("a", "b", "c", install=install)
    assert hosts.stopped == [] and "c" not in hosts.ended


def test_keys_that_the_bucket_does_not_take_stop_no_service(hosts, monkeypatch):
    up("a", "b")
    before, lay = state.required(), json.dumps(hosts.etc)
    hosts.stopped.clear()
    hosts.bad_keys = {"bad"}
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "bad")
    with pytest.raises(UserError, match="does not take these keys"):
        up("a", "b")
    assert hosts.stopped == [] and json.dumps(hosts.etc) == lay
    assert state.required().environment == before.environment, "clients go on with the keys that work"


def test_certificates_that_a_host_does_not_have_change_nothing(hosts, tmp_path):
    """Nor does the next `up` without the file bring them."""
    up("a", "b")
    before, lay = state.required(), json.dumps(hosts.etc)
    hosts.stopped.clear()
    hosts.unreadable = {"b"}
    (tmp_path / "variables").write_text("AWS_CA_BUNDLE=/etc/house.pem")
    with pytest.raises(UserError, match="^b: root cannot read AWS_CA_BUNDLE=/etc/house.pem there"):
        up("a", "b", environment=tmp_path / "variables")
    assert hosts.stopped == [] and json.dumps(hosts.etc) == lay and state.required() == before


def test_variables_with_which_the_storage_fails_are_forgotten(hosts, tmp_path):
    up("a", "b")
    hosts.stopped.clear()
    hosts.bad_keys = {"/etc/other.pem"}
    (tmp_path / "variables").write_text("AWS_CA_BUNDLE=/etc/other.pem")
    with pytest.raises(UserError, match="does not take"):
        up("a", "b", environment=tmp_path / "variables")
    assert state.required().facts["variables"] == {}
    up("a", "b")
    assert hosts.stopped == []
    hosts.bad_keys = set()
    up("a", "b", environment=tmp_path / "variables")
    up("a", "b")
    assert hosts.stopped == ["a", "b"]
    assert all('AWS_CA_BUNDLE="/etc/other.pem"' in hosts.etc[name]["raymed/environment"] for name in ("a", "b"))


def test_a_shell_without_keys_stops_no_service(hosts, monkeypatch):
    up("a", "b")
    hosts.stopped.clear()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    up("a", "b")
    assert hosts.stopped == []


def test_new_keys_start_services_again_and_that_is_said(hosts, monkeypatch, capsys):
    up("a", "b")
    assert "start again" not in capsys.readouterr().out
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "newer")
    up("a", "b")
    said = capsys.readouterr().out
    assert all(f"{name}: what its services start with has changed" in said for name in ("a", "b"))
    assert state.required().environment["AWS_SECRET_ACCESS_KEY"] == "newer"
    assert all('"newer"' in hosts.etc[name]["raymed/environment"] for name in ("a", "b"))


def test_a_host_that_joins_a_single_one_stops_nothing_there(hosts, capsys):
    up("a")
    assert hosts.services("a") == {"raymed-head", "raymed-mlflow", "raymed-worker"}
    hosts.stopped.clear()
    up("a", "b")
    assert hosts.stopped == ["b"]
    assert "a stays a worker too" in capsys.readouterr().out
    up("a", "b", "c")
    assert hosts.stopped == ["b", "c"]
    onprem.down(state.required())
    up("a", "b")
    assert hosts.services("a") == {"raymed-head", "raymed-mlflow"}


def test_a_host_that_was_left_out_while_it_could_not_be_reached_is_ended_later(hosts, capsys):
    up("a", "b", "c")
    hosts.unreachable = {"b"}
    up("a", "c")
    assert "no longer in the list, but not ended: b: cannot be reached" in capsys.readouterr().err
    [line] = [line for line in onprem.status(state.required()) if line.name == "b"]
    assert not line.is_up and "was not ended" in line.detail
    hosts.unreachable = set()  # it boots, with its service and a token that holds
    assert "worker-b" in hosts.nodes()
    up("a", "c")
    assert hosts.etc["b"] == {} and state.required().facts["left"] == []
    assert "b" not in {line.name for line in onprem.status(state.required())}


def test_what_status_names_has_a_log_also_where_the_head_is_down(hosts, monkeypatch, capsys):
    """One host cannot be reached, and is called as jobs are."""
    cluster = up("me@a", "me@ws-100234")
    hosts.unreachable = {"me@ws-100234"}

    def no_way(_: state.Cluster) -> state.Cluster:
        raise UserError("no way to the dashboard")

    monkeypatch.setattr(onprem, "_through_tunnels", no_way)
    shown = [line.name for line in onprem.status(cluster)]
    assert shown == ["raymed-head@me@a", "raymed-mlflow@me@a", "me@ws-100234", "dashboard", "mlflow"]
    capsys.readouterr()
    assert [logs(cluster, name) for name in (*shown[:3], "mlflow")] == [0] * 4
    of_mlflow, unreachable = "me@a wrote as raymed-mlflow", "me@ws-100234: cannot be reached"
    assert capsys.readouterr().out.splitlines() == ["me@a wrote as raymed-head", of_mlflow, unreachable, of_mlflow]
    with pytest.raises(UserError, match="no way to the dashboard\nparts .*: .*, raymed-worker@me@ws-100234$"):
        logs(cluster, "dashboard")


def test_another_node_takes_the_place_of_none_that_is_awaited(hosts, monkeypatch):
    """One that was left out joins by itself before it can be ended."""
    up("a", "b")
    hosts.unreachable = {"b"}
    monkeypatch.setattr(onprem.ray, "nodes", lambda *_: {"head": {}, "worker-b": {}, "worker-c": {}})
    up("a", "c")
    monkeypatch.setattr(onprem.ray, "nodes", lambda *_: {"head": {}, "worker-b": {}})
    with pytest.raises(UserError, match="there is no node worker-c"):
        up("a", "c")


def test_down_reaches_a_host_that_was_left(hosts):
    up("a", "b")
    hosts.unreachable = {"b"}
    up("a")
    with pytest.raises(UserError, match="b: cannot be reached"):
        onprem.down(state.required())
    hosts.unreachable = set()
    onprem.down(state.required())
    assert state.load() is None and hosts.etc == {"a": {}, "b": {}}


def test_a_left_host_that_is_in_the_list_again_is_a_host(hosts):
    up("a", "b")
    hosts.unreachable = {"b"}
    up("a")
    hosts.unreachable = set()
    cluster = up("a", "b")
    assert (cluster.facts["hosts"], cluster.facts["left"]) == (["a", "b"], [])
    assert hosts.services("b") == {"raymed-worker"}


def of_others(hosts, name: str) -> dict[str, str]:
    """A host that was set up anew, and joined another cluster."""
    etc = {"raymed/cluster": "other 1234\nkim at desk\n", "systemd/system/raymed-worker.service": "theirs"}
    hosts.etc[name] = dict(etc)
    return etc


def test_a_left_host_that_joined_another_cluster_is_left_alone(hosts):
    up("a", "b", "c")
    hosts.unreachable = {"b"}
    up("a", "c")
    hosts.unreachable = set()
    theirs = of_others(hosts, "b")
    cluster = up("a", "c")
    assert hosts.etc["b"] == theirs and cluster == state.required() and "b" not in hosts.ended
    assert state.required().facts["left"] == []


def test_down_leaves_a_host_of_another_cluster_alone(hosts):
    up("a", "b")
    theirs = of_others(hosts, "b")
    onprem.down(state.required())
    assert hosts.etc == {"a": {}, "b": theirs} and state.load() is None


@pytest.mark.parametrize("reached", [True, False])
def test_a_host_of_another_users_name_in_the_list_goes_on(hosts, reached):
    """Though the name of before may lead there no more."""
    hosts.names = {"b": "10.0.0.2", "root@b": "10.0.0.2"}
    up("a", "b")
    hosts.stopped.clear()
    hosts.unreachable = set() if reached else {"b"}
    up("a", "root@b")
    assert hosts.services("10.0.0.2") == {"raymed-worker"} and hosts.stopped == hosts.ended == []
    assert (state.required().facts["hosts"], state.required().facts["left"]) == (["a", "root@b"], [])


def test_a_host_of_another_name_in_the_list_goes_on(hosts):
    """One that only the host itself can tell to be the same."""
    hosts.names = {"node-2": "10.0.0.2", "second": "10.0.0.2"}
    up("a", "node-2")
    hosts.stopped.clear()
    up("a", "second")
    assert hosts.services("10.0.0.2") == {"raymed-worker"} and hosts.stopped == hosts.ended == []
    assert state.required().facts["left"] == []


def test_hosts_that_were_left_go_on_until_the_storage_is_good(hosts, monkeypatch):
    up("a", "b", "c")
    hosts.bad_keys = {"bad"}
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "bad")
    with pytest.raises(UserError, match="does not take these keys"):
        up("a", "c")
    assert hosts.services("b") == {"raymed-worker"} and state.required().facts["left"] == ["b"]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "good")
    up("a", "c")
    assert hosts.ended == ["b"] and state.required().facts["left"] == []


def test_new_code_is_installed_on_every_host_and_services_start_with_it(hosts, monkeypatch, capsys):
    """The version's number stays what it is. A host that has this code is left as it is."""
    project = onprem_host.Project(b"", "first")
    monkeypatch.setattr(onprem_host, "project", lambda: project)

    def changed(*names: str, **flags) -> tuple[list[str], list[str]]:
        hosts.installed, hosts.stopped = [], []
        up(*names, **flags)
        return sorted(hosts.installed), sorted(hosts.stopped)

    assert changed("a", "b") == ([], ["a", "b"]), "somebody else has installed it"
    assert changed("a", "b", install=True) == (["a", "b"], ["a", "b"])
    assert changed("a", "b", install=True) == changed("a", "b") == ([], [])
    assert changed("a", "b", "c", install=True) == (["c"], ["c"])
    project = onprem_host.Project(b"", "second")
    assert changed("a", "b", "c") == ([], [])
    capsys.readouterr()
    assert changed("a", "b", "c", install=True) == (["a", "b", "c"], ["a", "b", "c"])
    assert capsys.readouterr().out.count("what its services start with has changed") == 3
    assert changed("a", "b", "c") == ([], [])
