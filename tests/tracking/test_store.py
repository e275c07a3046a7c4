"""A store that was being made when its process was killed."""

import signal
import subprocess
import sys
import time

import pytest

from raymed.tracking.upload import Store

MAKE = "import sys; from raymed.tracking.upload import Store; Store(sys.argv[1], None).experiment_id('raymed')"


@pytest.mark.parametrize("delay", [0.0, 0.1])
def test_a_kill_while_the_store_is_made_leaves_none_or_a_whole_one(tmp_path, delay):
    uri = f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    maker = subprocess.Popen([sys.executable, "-c", MAKE, uri], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("mlflow/*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)  # another moment of the making, not a wait for anything
    maker.send_signal(signal.SIGKILL)
    maker.wait()

    store = Store(uri, None)

    assert store.find("raymed", "key") is None
    assert store.client.create_run(store.experiment_id("raymed")).info.status == "RUNNING"
