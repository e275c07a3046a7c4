"""What jobs/bench_serve.py calls met; nothing is served here."""

import sys
from pathlib import Path

import numpy as np
import pytest

JOBS = Path(__file__).resolve().parents[2] / "jobs"
BLOCKS = 9


@pytest.fixture(scope="module")
def bench():
    """jobs/bench_serve.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        before = set(sys.modules)
        patch.syspath_prepend(str(JOBS))
        import bench_serve

        yield bench_serve
        for name in set(sys.modules) - before:
            if name.startswith("bench_"):
                del sys.modules[name]


def turns(bench, rate: int, slowest_s: float):
    """Of a server whose requests take 10 ms, one of ten longer."""
    made, random = bench.Turns(), np.random.default_rng(0)
    for _ in range(BLOCKS):
        seconds = np.where(np.arange(rate) % 10, 0.01, slowest_s) * random.uniform(0.99, 1.01, rate)
        made.add({"asked": rate, "seconds": 1.0, "ended": [(200, s) for s in seconds.tolist()]}, cpu_s=1.0)
    return made


def found(bench, group: str, clients: int, **ours) -> dict:
    """Twice the requests of the peer, unless stated."""
    reference, *_, name = bench.GROUPS[group]
    of = {reference: turns(bench, 100, 0.1), name: turns(bench, **{"rate": 200, "slowest_s": 0.1} | ours)}
    return {bench.Load("tiny", "224", clients): of}


def verdicts(bench, group: str, device: str, of: dict, busy: float = 0.0) -> list[tuple[str, str]]:
    return [(ratio["target"], ratio["verdict"]) for ratio in bench.ratios(group, device, of, busy).values()]


def test_a_gpu_must_bring_more_where_there_are_many_clients(bench):
    assert bench.ON_GPU.keys() < bench.TARGETS.keys()
    of = found(bench, "one process", 32, rate=120, slowest_s=0.05)
    assert verdicts(bench, "one process", "cpu", of) == [("at least 1", "met"), ("at most 1", "met")]
    assert verdicts(bench, "one process", "cuda", of) == [("at least 1.3", "not met"), ("at most 1", "met")]


@pytest.mark.parametrize(("slowest_s", "verdict"), [(0.05, "met"), (0.2, "not met")])
def test_more_answers_do_not_make_up_for_slow_ones(bench, slowest_s, verdict):
    for group in bench.GROUPS:
        told = verdicts(bench, group, "cpu", found(bench, group, 32, rate=300, slowest_s=slowest_s))
        assert told == [(f"at least {bench.TARGETS[group, 32]:g}", "met"), ("at most 1", verdict)]


def test_the_99th_percentile_is_judged_by_the_same_rule_and_not_of_a_lone_client(bench):
    (of_one,) = verdicts(bench, "one process", "cpu", found(bench, "one process", 1))
    assert of_one == ("at least 0.95", "met")
    of = found(bench, "one process", 32)
    assert {verdict[:12] for _, verdict in verdicts(bench, "one process", "cpu", of, busy=0.5)} == {"not resolved"}
    for one in next(iter(of.values())).values():
        one.rates, one.p99_s = one.rates[:3], one.p99_s[:3]
    assert {verdict[:12] for _, verdict in verdicts(bench, "one process", "cpu", of)} == {"not resolved"}


def test_a_turn_without_an_answer_has_no_percentile(bench):
    made = bench.Turns()
    made.add({"asked": 3, "seconds": 1.0, "ended": [(503, 0.1)] * 3}, cpu_s=1.0)
    assert np.isnan(made.p99_s[0]) and made.failed == 3


def test_the_table_says_what_the_small_network_stands_for(bench):
    of = found(bench, "one process", 32)
    loads = {load.name: {name: one.figures() for name, one in servers.items()} for load, servers in of.items()}
    figures = {"probabilities differ by": 0.0, "device": "cpu", "loads": loads}
    told = bench.table("one process", figures | {"ratios": bench.ratios("one process", "cpu", of, 0.0)})
    assert "tiny: a small network that stands for the identity" in told and "bare FastAPI, p99: 1.00" in told
