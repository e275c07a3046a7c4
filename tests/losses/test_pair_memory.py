"""Memory of losses over pairs, in a fresh process: it grows with the number of pairs, not with its square."""

import subprocess
import sys

import pytest

SCRIPT = """
import re, torch
from raymed.losses import PAIR_LOSSES, _pairs
torch.set_num_threads(1)

def peak(name, num):
    image, text = torch.randn(2, num, 16).requires_grad_()
    PAIR_LOSSES[name]()(image, text, torch.arange(num)).backward()
    # ru_maxrss would begin with the peak of whoever started this process.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

before = max(peak(name, 64) for name in PAIR_LOSSES)
print(*(peak("dhn_nce", num) - before for num in (4096, 8192)))

class Kept:
    def apply(anchors, candidates, shift, values):
        blocks = _pairs._blocks(anchors)
        return torch.cat([values(_pairs._block(anchors[:, at], candidates, shift), start) for start, at in blocks], 1)

_pairs._InBlocks = Kept
print(*(peak("info_nce", num) - before for num in (4096, 8192)))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@pytest.fixture(scope="module")
def megabytes():
    """Peaks of forward and backward pass beyond those of 64 pairs. Of one process: no peak is below one before it."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [[float(word) for word in line.split()] for line in done.stdout.splitlines()]


def linear(small: float, large: float) -> bool:
    """Whether memory follows the number of pairs when it doubles."""
    return 0 < small and large < 2.2 * small and large < 250  # a single matrix of similarities has 256 MB


def test_memory_is_linear(megabytes):
    assert linear(*megabytes[0])


def test_a_version_that_keeps_the_logits_is_found_out(megabytes):
    assert not linear(*megabytes[1])
    assert megabytes[1][1] > 512  # the logits and what comes of them, 256 MB each
