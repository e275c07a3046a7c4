import os
import subprocess
import sys

import pytest

from raymed.config import UserError
from raymed.storage import lock

HOLD = """
import sys
from raymed.storage import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/run/lock."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run/lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path, holder):
    expected = rf"{tmp_path / 'run'} is in use by process {holder.pid} on "
    with pytest.raises(UserError, match=expected), lock(tmp_path / "run/lock"):
        pytest.fail("two processes hold one lock")


def test_a_killed_process_holds_nothing(tmp_path, holder):
    holder.kill()
    holder.wait()
    with lock(tmp_path / "run/lock"):
        assert f"process {os.getpid()} " in (tmp_path / "run/lock.pid").read_text()


def test_it_is_free_again_after_the_block_also_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), lock(tmp_path / "lock"):
        raise ZeroDivisionError
    expected = f"process {os.getpid()} "
    with lock(tmp_path / "lock"), pytest.raises(UserError, match=expected), lock(tmp_path / "lock"):
        pytest.fail("one process holds a lock twice")
