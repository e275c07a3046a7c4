"""The rehearsal of faults as a stranger runs it, and what it would refuse."""

import importlib.util
import re
import sys

import pytest
from home import REPO, wait_for

from raymed.config import UserError
from raymed.report.survival import Event

WANTED = {step: 1 / step for step in range(1, 101)}
EVENTS = [Event(0, "", "2 workers"), Event(30, "a worker killed", "2 workers"), Event(75, "stopped", "1 worker")]


@pytest.fixture(scope="module")
def job():
    """The job's module, which does nothing when it is imported."""
    spec = importlib.util.spec_from_file_location("rehearse_faults", REPO / "jobs" / "rehearse_faults.py")
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_and_moved_run_has_the_curve_of_one_left_in_peace(home, tmp_path):
    figure = tmp_path / "figure.png"
    output = home.run("rehearse_faults", "--steps=100", "--size=32", f"--out={figure}")
    said = re.search(r"^100 steps; the losses differ by (\S+) at most \(relative\)$", output, re.MULTILINE)
    assert said and 0 < float(said[1]) < 1e-3  # it has been on other numbers of workers, and sums in another order
    assert output.rstrip().endswith(f"figure: {figure}") and figure.read_bytes().startswith(b"\x89PNG")
    flags = ["", "--compute.workers=2 --compute.zero-stage=2", "--compute.workers=1"]
    flags += ["--compute.workers=2 --compute.zero-stage=3"]
    assert re.findall(r"^\$ python jobs/train_classifier.py --name=rehearsal (.*)$", output, re.MULTILINE) == flags
    wait_for(lambda: not home.processes(), 60, "end of what was started")


def test_a_rehearsal_too_short_is_refused(home):
    assert "error: steps must be" in home.run("rehearse_faults", "--steps=99", expect=2)


def test_equal_curves_pass_and_are_drawn(job, tmp_path, capsys):
    config = job.Rehearsal(out=tmp_path / "figure.png")
    found = WANTED | {60: WANTED[60] * (1 + 5e-5), 101: 3.0}
    assert job._compared(config, WANTED, found, EVENTS) == config.out and config.out.stat().st_size > 10_000
    assert "100 steps; the losses differ by 5.0e-05 at most (relative)" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [1.002, 0.998, -1])
def test_another_curve_is_refused(factor, job, tmp_path):
    found = WANTED | {77: WANTED[77] * factor}
    with pytest.raises(UserError, match=r"the killed run is another one: its losses differ by more than 0\.001"):
        job._compared(job.Rehearsal(out=tmp_path / "figure.png"), WANTED, found, EVENTS)


@pytest.mark.parametrize(("lost", "message"), [({40, 41}, "2 steps, the first of them 40"), (set(WANTED), "100 steps")])
def test_missing_records_are_refused(lost, message, job, tmp_path):
    found = {step: loss for step, loss in WANTED.items() if step not in lost}
    with pytest.raises(UserError, match=f"the killed run has no record of {message}"):
        job._compared(job.Rehearsal(out=tmp_path / "figure.png"), WANTED, found, EVENTS)
