"""AWS and Google Cloud, a cluster that is up: what a second `up`, `status` and `logs` do to it. `ray` is a program
that writes down its words."""

import sys
from pathlib import Path

import pytest
import yaml
from nodes import free_port

from raymed.cluster import processes, state
from raymed.cluster.providers import launcher
from raymed.cluster.state import Cluster
from raymed.config import UserError

pytestmark = pytest.mark.usefixtures("nobody")
THERE = ("ray-raymed-head-1",)


class Ray:
    """What `ray` was asked, and how it answers.

    heads: processes of Ray on the head, as it says; None: it does not answer. fails: `ray up` does.
    """

    def __init__(self, folder: Path) -> None:
        self._words, self._heads, self._fails = folder / "words", folder / "heads", folder / "fails"
        self.program = folder / "ray"
        self.program.write_text(
            f'#!/bin/sh\necho "$@" >> {self._words}\n[ "$1" != up ] || exec test ! -e {self._fails}\n'
            f'case "$*" in *ray-heads*) echo fetched; exec cat {self._heads} ;; esac\n'
        )
        self.program.chmod(0o755)
        self.answers(heads=1)

    def answers(self, *, heads: int | None) -> None:
        self._heads.unlink(missing_ok=True)
        if heads is not None:
            self._heads.write_text(f"ray-heads: {heads}\r\n")

    def fails(self) -> None:
        self._fails.touch()

    def asked(self) -> list[str]:
        """What has been asked since the last time, but for whether Ray runs."""
        lines = self._words.read_text().splitlines() if self._words.is_file() else []
        self._words.unlink(missing_ok=True)
        return [line for line in lines if "ray-heads" not in line]


@pytest.fixture
def ray(tmp_path, monkeypatch) -> Ray:
    folder = tmp_path / "programs"
    folder.mkdir()
    ray = Ray(folder)
    monkeypatch.setattr(launcher, "_ray", lambda: str(ray.program))
    monkeypatch.setattr(launcher, "opened", lambda cluster, tunnels: cluster)
    return ray


@pytest.fixture
def first(ray, on_google) -> Cluster:
    """A cluster that runs."""
    cluster = launcher.up(on_google())
    assert ray.asked() == [f"up --yes --disable-usage-stats {cluster.facts['file']}"]
    return cluster


def test_a_second_up_leaves_alone_what_runs(ray, first, on_google):
    written = Path(first.facts["file"]).read_text()
    assert launcher.up(on_google(there=THERE)) == first
    assert ray.asked() == [] and Path(first.facts["file"]).read_text() == written and state.load() == first


def test_limits_change_without_a_restart(ray, first, on_google, capsys):
    file = first.facts["file"]
    assert launcher.up(on_google(there=THERE, max_workers=8)) == first
    assert "other limits; Ray is not started again" in capsys.readouterr().out
    told = f"exec --disable-usage-stats {file} bash ~/raymed/cluster/node.sh limits"
    limits = state.folder() / "limits.yaml"
    assert ray.asked() == [f"up --yes --disable-usage-stats --no-restart {limits}", told]
    asked, now = yaml.safe_load(limits.read_text()), launcher.last("gcp")
    assert now["max_workers"] == 8 and asked == now | {"head_setup_commands": []}, "setup is not for a head with jobs"
    launcher.up(on_google(there=THERE))
    assert ray.asked() == [] and launcher.last("gcp")["max_workers"] == 8, "a flag left out changes nothing"


def test_limits_that_did_not_arrive_are_tried_again(ray, first, on_google):
    ray.fails()
    for _ in range(2):
        with pytest.raises(UserError, match="`ray up` failed"):
            launcher.up(on_google(there=THERE, max_workers=8))
        assert len(ray.asked()) == 1 and launcher.last("gcp")["max_workers"] == 4 and state.load() == first


def test_what_would_end_jobs_is_refused(ray, first, on_google, tmp_path):
    """Another type of machine, another storage: Ray would start again, on another head even."""
    written = Path(first.facts["file"]).read_text()
    with pytest.raises(UserError, match="brought up with other RAYMED_HOME; .* ends what runs: .*down, then up"):
        launcher.up(on_google(there=THERE, home="/elsewhere"))
    template = tmp_path / "template.yaml"
    other = template.read_text().replace("n2-standard-8", "n2-standard-16").replace("user: ubuntu", "user: me")
    template.write_text(other)
    with pytest.raises(UserError, match="with other auth, available_node_types.head; "):
        launcher.up(on_google(there=THERE, max_workers=8))
    assert ray.asked() == [] and Path(first.facts["file"]).read_text() == written and state.load() == first
    assert "RAYMED_HOME=/mnt\n" in (state.folder() / "node.env").read_text()


def test_a_head_without_ray_is_started_again(ray, first, on_google):
    ray.answers(heads=0)
    again = launcher.up(on_google(there=THERE))
    assert ray.asked() == [f"up --yes --disable-usage-stats {first.facts['file']}"]
    assert again.facts != first.facts, "`up` does not say that it was up already"


def test_a_head_that_does_not_answer_is_left_alone(ray, first, on_google):
    ray.answers(heads=None)
    with pytest.raises(UserError, match="its head does not say whether Ray runs .*No such file.*: try again, or"):
        launcher.up(on_google(there=THERE))
    assert ray.asked() == [] and state.load() == first


def test_a_cluster_elsewhere_is_another_one(ray, first, on_google):
    """The first one would be forgotten, and go on costing."""
    written = Path(first.facts["file"]).read_text()
    with pytest.raises(UserError, match="in zone 'europe-west4-a', not in zone 'us-east1-b': .* down first"):
        launcher.up(on_google(zone="us-east1-b"))
    with pytest.raises(UserError, match="in project 'ours', not in project 'theirs'"):
        launcher.up(on_google(project="theirs"))
    assert ray.asked() == [] and state.load() == first and Path(first.facts["file"]).read_text() == written
    launcher.up(on_google())
    assert len(ray.asked()) == 1, "no machine is left: it starts anew"


HEAD = """#!{python}
import http.server, sys

if sys.argv[1] == "get-head-ip":
    sys.exit(print("10.0.0.1"))
[port] = [word.partition("=")[2] for word in sys.argv if word.startswith("--port=")]

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{{"data": {{"summary": [{{"raylet": {{"state": "ALIVE"}}}}]}}}}')

http.server.HTTPServer(("127.0.0.1", int(port)), Answer).serve_forever()
"""


def test_status_opens_tunnels_again(tmp_path, monkeypatch):
    program, token, ports = tmp_path / "ray", tmp_path / "token", {"dashboard": free_port(), "mlflow": free_port()}
    program.write_text(HEAD.format(python=sys.executable))
    program.chmod(0o755)
    token.write_text("word")
    monkeypatch.setattr(launcher, "_ray", lambda: str(program))
    cluster = Cluster(
        "gcp",
        {name: f"http://127.0.0.1:{port}" for name, port in ports.items()},
        {"RAY_AUTH_TOKEN_PATH": str(token)},
        facts={"file": "gcp.yaml", "tunnels": ports},
    )
    state.save(cluster)
    try:
        lines = launcher.status(cluster)
        assert [(line.name, line.is_up) for line in lines] == [("head", True), ("dashboard", True), ("mlflow", True)]
        assert lines[1].detail.endswith("1 machine(s) with the head")
        assert {process.name for process in state.required().processes} == set(ports)
    finally:
        processes.end(state.required().processes, "")


def test_parts_that_do_not_answer_are_said_to_be_down(tmp_path, monkeypatch):
    program = tmp_path / "ray"
    monkeypatch.setattr(launcher, "_ray", lambda: str(program))
    cluster = Cluster("aws", facts={"file": "aws.yaml", "tunnels": {"dashboard": free_port(), "mlflow": free_port()}})
    state.save(cluster)
    program.write_text("#!/bin/sh\n[ $1 = get-head-ip ] && echo 10.0.0.1 && exit\necho no route to it\nexit 1\n")
    program.chmod(0o755)
    lines = launcher.status(cluster)
    assert [line.is_up for line in lines] == [True, False, False] and "no route to it" in lines[2].detail
    program.write_text("#!/bin/sh\nexit 1\n")
    lines = launcher.status(cluster)
    assert [line.is_up for line in lines] == [False] * 3 and "there is no head" in lines[1].detail
    program.write_text("#!/bin/sh\necho 10.0.0.1\n")
    state.forget()
    assert [line.is_up for line in launcher.status(cluster)] == [True, False, False]
    assert state.load() is None, "what has been ended meanwhile is not brought back"


def test_the_autoscalers_log_says_why_no_worker_comes(tmp_path, monkeypatch):
    """What a cloud answers stands in monitor.log, and what is done to a machine in monitor.out."""
    there = tmp_path / "ray" / "session_latest" / "logs"
    there.mkdir(parents=True)
    (there / "monitor.log").write_text("old\n" * 100 + "InsufficientInstanceCapacity: no g6.4xlarge\n")
    (there / "monitor.err").touch()
    (there / "monitor.out").write_text("node.sh: no route to pypi.org\n")
    (tmp_path / "exec").write_text(  # ray exec --disable-usage-stats FILE COMMAND, on the head
        f'#!/bin/bash\n[[ $4 == tail* ]] || exit 1\nexec bash -c "${{4//\\/tmp\\/ray/{tmp_path}/ray}}"\n'
    )
    (tmp_path / "exec").chmod(0o755)
    monkeypatch.setattr(launcher, "_ray", lambda: str(tmp_path / "exec"))
    told = launcher.logs(Cluster("aws", facts={"file": "aws.yaml"}))["autoscaler"]()
    assert "InsufficientInstanceCapacity" in told and "no route to pypi.org" in told
    assert told.count("old") == 39
