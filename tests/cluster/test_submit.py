"""Jobs sent to a real Ray head that demands a token, by the command line as a user types it, from a project folder."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from nodes import RAY, Node, free_port, wait_for

pytestmark = pytest.mark.ray
REPO = Path(__file__).resolve().parents[2]
MODULE = [sys.executable, "-m", "raymed.cluster"]
JOBS = {
    "tell": """
        import os, sys, beside
        print("flags", sys.argv[1:])
        print("storage", os.environ["RAYMED_HOME"], "python", sys.executable)
        print("here", os.path.exists("jobs/tell.py"), os.path.exists("private/key"), os.path.exists("built/big"))
        """,
    "fail": "import sys; [print('line', i) for i in range(40)]; print('the reason', file=sys.stderr); sys.exit(7)",
    "parts": """
        import os, time
        print("part one", flush=True)
        while not os.path.exists(os.environ["RAYMED_HOME"] + "/go"):
            time.sleep(0.1)
        print("part two")
        """,
    "bytes": "import sys; print('before', flush=True); sys.stdout.buffer.write(b'\\xff\\n'); sys.exit(9)",
    "long": """
        import signal, sys, time
        def stop(*_):
            time.sleep(4)  # longer than Ray would wait
            print("checkpoint written"); sys.exit(0)
        signal.signal(signal.SIGTERM, stop)
        print("it began", flush=True)
        time.sleep(600)
        """,
}


@dataclass
class Head:
    """A running head with its token, and a user of it: a project folder and the state of the cluster."""

    url: str
    node: Node
    token: Path
    project: Path
    state: Path
    storage: Path

    def environment(self, **more: str) -> dict[str, str]:
        """Of the user: nothing of Ray but what the state says, a storage of his own, a proxy that leads nowhere."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RAYMED_"))}
        own = {
            "RAYMED_CLUSTER": str(self.state),
            "RAYMED_HOME": "/nowhere",
            "PYTHONPATH": str(REPO),
        }
        proxy = {name: "http://127.0.0.1:9" for name in ("HTTP_PROXY", "http_proxy")}
        return {**kept, **own, **proxy, "NO_PROXY": "", "no_proxy": "", **more}

    def remembered(self, **changes: object) -> None:
        """Write the state, as it is or changed."""
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token), "RAY_ADDRESS": "127.0.0.1:9"}
        cluster = {"provider": "local", "addresses": {"dashboard": self.url}, "environment": environment}
        cluster |= {"facts": {"temporary": "/nowhere"}}
        self.state.mkdir(exist_ok=True)
        (self.state / "cluster.json").write_text(json.dumps(cluster | changes))

    def run(self, *words: str, **more: str) -> subprocess.CompletedProcess:
        """python -m raymed.cluster WORDS."""
        return subprocess.run(
            [*MODULE, *words],
            cwd=self.project,
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=120,
        )

    def start(self, *words: str) -> subprocess.Popen:
        """The same, which is not waited for; stdout and stderr are one pipe."""
        return subprocess.Popen(
            [*MODULE, *words],
            cwd=self.project,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also where these tests ignore it
        )


class Relay:
    """Between the user and the dashboard: a network that can be cut, gone or frozen."""

    def __init__(self, port: int):
        self.frozen, self.opened, self.port, self._pairs = False, 0, port, []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Every connection that is there now."""
        while self._pairs:
            end = self._pairs.pop()
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Nobody listens any more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self.port))
                self._pairs += [here, there]
                self.opened += 1
                for one, other in ((here, there), (there, here)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    def _copy(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                while self.frozen:
                    time.sleep(0.1)
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)


@pytest.fixture
def relay(head) -> Iterator[Relay]:
    """The user reaches the dashboard through it."""
    relay = Relay(int(head.url.rsplit(":", 1)[1]))
    head.remembered(addresses={"dashboard": relay.url})
    yield relay
    relay.frozen = False
    with suppress(OSError):
        relay.close()
    head.remembered()


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    port, temp = free_port(), Path(f"/tmp/ray-b-{os.getpid()}")  # sockets need short paths
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RAYMED_"))}
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAYMED_HOME": str(folder / "storage")}
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    words = [str(RAY), "start", "--head", "--block", f"--port={free_port()}", f"--temp-dir={temp}", "--num-cpus=0"]
    words += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
    words += ["--dashboard-agent-listen-port=0", f"--ray-client-server-port={free_port()}"]
    words += [f"--object-store-memory={80 * 2**20}", "--include-log-monitor=false"]
    words += ['--resources={"raymed_driver": 1000}']
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, env={**kept, **own, **path}, stdout=log, stderr=log, start_new_session=True)
    node = Node("head", process)
    url = f"http://127.0.0.1:{port}"
    started = Head(url, node, token, project(folder / "project"), folder / "state", folder / "storage")
    try:
        wait_for(lambda: asks_for_token(url) or process.poll() is not None, 120, "the dashboard")
        started.remembered()
        yield started
    finally:
        node.kill()
        shutil.rmtree(temp, ignore_errors=True)


def asks_for_token(url: str) -> bool:
    """Whether the dashboard is up and refuses a caller without a token."""
    try:
        urlopen(f"{url}/api/jobs/", timeout=5).close()
    except HTTPError as error:
        return error.code == 401
    except OSError:
        return False
    return False


def project(folder: Path) -> Path:
    """A project folder with jobs, and with files that the cluster must not get."""
    for name, text in JOBS.items():
        (folder / "jobs").mkdir(parents=True, exist_ok=True)
        (folder / "jobs" / f"{name}.py").write_text(textwrap.dedent(text))
    for name in ("private/key", "built/big"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("x")
    (folder / "beside.py").touch()
    (folder / ".rayignore").write_text("private\n")
    (folder / ".gitignore").write_text("built/\n")
    return folder


def test_job_runs_in_the_uploaded_folder_with_the_storage_and_python_of_the_cluster(head):
    done = head.run("submit", "jobs/tell.py", "--a b", "--help", "--no-wait", "it's")
    assert done.returncode == 0, done.stderr
    assert "flags ['--a b', '--help', '--no-wait', \"it's\"]" in done.stdout
    assert f"storage {head.storage} python {sys.executable}" in done.stdout
    assert "here True False False" in done.stdout
    assert re.search(r"^tell-[0-9a-f]{6} is submitted", done.stdout)
    assert done.stderr == ""  # nothing of Ray's own


def test_exit_code_and_last_lines_of_a_job_that_fails_reach_the_caller(head):
    done = head.run("submit", "jobs/fail.py")
    assert done.returncode == 7
    assert done.stdout.splitlines()[-41:] == [*(f"line {i}" for i in range(40)), "the reason"]
    assert re.fullmatch(r"error: fail-[0-9a-f]{6} failed with exit code 7\n", done.stderr)


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_follow_and_to_stop_it(head):
    started = head.start("submit", "jobs/long.py")
    lines = iter(started.stdout)
    name = next(lines).split()[0]
    assert any("it began" in line for line in lines)
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=60)[0]
    assert started.returncode == 130 and "Traceback" not in said
    assert f"logs {name} --follow" in said and f"stop {name}" in said

    shown = head.run("logs")
    assert (shown.returncode, shown.stderr) == (0, f"{name}: running\n") and "it began" in shown.stdout
    follower = head.start("logs", name, "--follow")
    assert any("it began" in line for line in follower.stdout)
    assert head.run("stop", name).stdout == f"{name} is asked to stop\n"
    assert follower.communicate(timeout=60)[0].splitlines() == ["checkpoint written", f"{name} was stopped"]
    assert follower.returncode == 130
    assert head.run("stop", name).stdout == f"{name} had ended already\n"


@pytest.mark.slow
def test_without_waiting_the_job_runs_on(head):
    done = head.run("submit", "--no-wait", "jobs/tell.py")
    assert done.returncode == 0 and "flags" not in done.stdout
    [name] = re.findall(r"logs (tell-[0-9a-f]{6}) --follow", done.stdout)
    followed = head.run("logs", name, "--follow")
    assert followed.returncode == 0 and "flags []" in followed.stdout


def test_wrong_token_is_one_message(head):
    wrong = head.token.with_name("wrong")
    wrong.write_text("fedcba9876543210" * 4)
    head.remembered(environment={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(wrong)})
    try:
        for words in (["submit", "jobs/tell.py"], ["logs"], ["stop"]):
            done = head.run(*words)
            assert done.returncode == 2 and done.stdout == ""
            assert done.stderr.startswith("error: the dashboard at") and done.stderr.count("\n") == 1, done.stderr
            assert "does not take the token" in done.stderr
    finally:
        head.remembered()


def test_missing_token_file_is_one_message(head):
    head.remembered(environment={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nowhere/token"})
    try:
        done = head.run("submit", "jobs/tell.py")
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    finally:
        head.remembered()


def test_dashboard_that_is_gone_is_one_message(head):
    head.remembered(addresses={"dashboard": f"http://127.0.0.1:{free_port()}"})
    try:
        done = head.run("submit", "jobs/tell.py")
        assert done.returncode == 2 and "does not answer" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    finally:
        head.remembered()


def test_folder_that_is_too_large_is_refused_with_its_largest_places(head):
    big = head.project / "data" / "raw" / "scans" / "one.bin"
    big.parent.mkdir(parents=True)
    with big.open("wb") as file:
        file.truncate(101 * 2**20)
    try:
        done = head.run("submit", "jobs/tell.py")
        assert done.returncode == 2 and done.stdout == ""
        assert "101 MiB, at most 100" in done.stderr and "101 MiB  data/raw/" in done.stderr
        (head.project / "data" / ".rayignore").write_text("raw\n")
        assert head.run("submit", "--no-wait", "jobs/tell.py").returncode == 0
    finally:
        shutil.rmtree(head.project / "data")


def test_job_that_is_not_there(head):
    done = head.run("submit", "jobs/tel.py")
    assert done.returncode == 2 and "jobs/tell.py" in done.stderr
    done = head.run("submit", str(REPO / "jobs" / "tune_asl.py"))
    assert done.returncode == 2 and "lies outside" in done.stderr


def test_unknown_log_names_what_there_is(head):
    done = head.run("logs", "moon")
    assert done.returncode == 2 and "there is no 'moon'" in done.stderr and "tell-" in done.stderr


def test_a_connection_that_breaks_is_made_again_and_prints_nothing_twice(head, relay):
    head.storage.mkdir(exist_ok=True)
    started = head.start("submit", "jobs/parts.py")
    before = []
    while "part one" not in "".join(before):
        before.append(started.stdout.readline())
    opened = relay.opened
    relay.cut()
    wait_for(lambda: relay.opened >= opened + 3, 60, "another connection, behind two that ask how the job is")
    (head.storage / "go").touch()
    assert started.communicate(timeout=60)[0] == "part two\n"
    assert started.returncode == 0


@pytest.mark.slow
def test_dashboard_that_goes_while_a_job_is_followed_is_one_message(head, relay):
    started = head.start("submit", "jobs/long.py")
    assert any("it began" in line for line in started.stdout)
    relay.close()
    said = started.communicate(timeout=60)[0]
    assert started.returncode == 2 and said.startswith("error: Ray's dashboard") and said.count("\n") == 1
    head.remembered()
    head.run("stop")


@pytest.mark.slow
def test_dashboard_that_falls_silent_is_not_waited_for(head, relay):
    started = head.start("submit", "jobs/long.py")
    assert any("it began" in line for line in started.stdout)
    relay.frozen = True
    said = started.communicate(timeout=90)[0]
    assert started.returncode == 2 and "does not answer" in said
    assert "does not answer" in head.run("submit", "jobs/tell.py").stderr
    relay.frozen = False
    head.run("stop")


@pytest.mark.slow
def test_log_that_is_no_text_costs_no_exit_code(head):
    done = head.run("submit", "jobs/bytes.py")
    assert done.returncode == 9, done.stderr
    assert "the rest of its log cannot be read" in done.stderr and "Traceback" not in done.stderr
    shown = head.run("logs")
    assert shown.returncode == 2 and "Traceback" not in shown.stderr
