"""The sweep of test_tune_asl.py, killed in every one of its phases."""

import pytest
from sweeps import PHASES, check_nothing_repeated, killed_sweep

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_sweep_killed_in_every_phase_repeats_nothing(home):
    killed, output = killed_sweep(home, tuple(PHASES))

    assert not [e for e in killed["features"]["events"] if "status" in e]
    assert 1 <= len([e for e in killed["heads"]["events"] if "status" in e])
    finals = {phase: [path for path in there["finished"] if "finals" in path.parts] for phase, there in killed.items()}
    assert 1 <= len(finals["finals"]) < 4 and len(finals["report"]) == 4
    check_nothing_repeated(home, killed)
    assert output.strip().splitlines()[-1].startswith("summary: ")
