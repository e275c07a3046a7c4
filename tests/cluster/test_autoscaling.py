"""A cluster whose workers come and go: what has room there, and that they do come and go.

Each driver is a process of its own, since Ray reads its token only once."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from raymed.cluster.autoscaled import Autoscaled

pytestmark = pytest.mark.ray
REPO = Path(__file__).resolve().parents[2]
ASK = """
    import json, sys, time, ray
    from raymed.config import UserError
    from raymed.train.places.cluster import connected, gpus_of, require

    def tried(**needs):
        try:
            return require(**needs, advice="lower --this")
        except UserError as error:
            return str(error)

    def workers():
        return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())

    with connected():
        answer = {"before": workers(), "gpus": gpus_of("auto")}
        answer["room"] = [tried(**needs) for needs in json.loads(sys.argv[1])]
        if sys.argv[2] == "grow":
            class Holder:
                def hold(self):
                    return True

            both = [ray.remote(num_cpus=1)(Holder).remote() for _ in range(2)]
            assert ray.get([holder.hold.remote() for holder in both], timeout=120)
            answer["most"], until = workers(), time.monotonic() + 120
            answer["room"] += [tried(cpus=1)]
            for holder in both:
                ray.kill(holder)
            while workers() and time.monotonic() < until:
                time.sleep(0.2)
            answer["after"] = workers()
        print("answer:", json.dumps(answer))
"""


@pytest.fixture(scope="module")
def untold(tmp_path_factory):
    """A cluster that does not say how far it may grow."""
    with Autoscaled(tmp_path_factory.mktemp("autoscaled"), idle_seconds=3, told=False) as running:
        yield running
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(running.temporary) in str(p.info["cmdline"])]
    assert not running.temporary.exists()


def asked(cluster: Autoscaled, *needs: dict, how: str = "look") -> tuple[dict, str]:
    """What a driver on the cluster found, and what it said."""
    words = [sys.executable, "-c", textwrap.dedent(ASK), json.dumps(needs), how]
    done = subprocess.run(words, env=cluster.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    [answer] = re.findall(r"^answer: (.*)$", done.stdout, re.MULTILINE)
    return json.loads(answer), done.stdout


@pytest.fixture(scope="module")
def cluster(untold):
    """The same, once its head has said it."""
    assert tell(untold, "autoscaler.json").returncode == 0
    return untold


def tell(cluster: Autoscaled, *given: str) -> subprocess.CompletedProcess:
    """What a head does when Ray has started."""
    words = [sys.executable, "-m", "raymed.train.places.growth", *given]
    return subprocess.run(
        words, env=cluster.environment, cwd=cluster.folder, capture_output=True, text=True, timeout=120
    )


def test_what_nobody_knows_of_has_no_room(untold):
    answer, _ = asked(untold, {"cpus": 1})
    assert re.search(r"the cluster has 0 CPUs, 0 GPUs on 1 node\(s\) \(its CPU is enough for 0\)", answer["room"][0])


def test_what_could_come_has_room_and_what_could_not_is_refused(cluster):
    needs = [{"cpus": 1}, {"cpus": 1, "at_most": 1}, {"cpus": 1, "workers": 2}, {"cpus": 1, "memory": 10**12}]
    answer, said = asked(cluster, *needs, {"cpus": 1, "at_least": 3}, {"cpus": 2})
    assert answer["before"] == answer["gpus"] == 0
    assert answer["room"][:4] == [2, 1, 1, 2]
    has = r"0 CPUs, 0 GPUs on 1 node\(s\), and may get 2 more: 2 of 1 CPUs, 0 GPUs \(its CPU is enough for"
    assert re.search(f"^this needs 3 x 1 CPUs, 0 GPUs at a time, and the cluster has {has} 2", answer["room"][4])
    assert re.search(f"^this needs 1 x 2 CPUs, 0 GPUs at a time, and the cluster has {has} 0", answer["room"][5])
    assert "waiting: only 0 of 0 CPU is free now, this cluster may start 2 more node(s)" in said


@pytest.mark.slow
def test_workers_come_with_the_work_and_go(cluster):
    answer, _ = asked(cluster, {"cpus": 1}, how="grow")
    assert [answer[name] for name in ("before", "most", "after")] == [0, 2, 0]
    assert answer["room"] == [2, 2]


def test_a_file_that_is_none_is_refused(untold):
    (untold.folder / "words.yaml").write_text("just words")
    for given, said in ((["words.yaml"], "this is no configuration of an autoscaler"), ([], "usage: ")):
        done = tell(untold, *given)
        assert done.returncode == 2 and f"error: {said}" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_sweep_makes_workers_come_and_go():
    words = [sys.executable, str(REPO / "jobs" / "rehearse_autoscaling.py"), "--trials=4"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [int(count) for count in re.findall(r"^ *\d+ s  (\d) worker\(s\)$", done.stdout, re.MULTILINE)]
    assert counts[0] == 0 and 2 in counts and counts[-1] == 0, done.stdout
    assert "(4 of 4)" in done.stdout and "the sweep has ended" in done.stdout


@pytest.mark.parametrize("flag", ["--workers=0", "--trials=1", "--idle-seconds=0"])
def test_flags_out_of_range_are_refused(flag):
    words = [sys.executable, str(REPO / "jobs" / "rehearse_autoscaling.py"), flag]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and f"error: {flag[2:].partition('=')[0].replace('-', '_')} must" in done.stderr
