"""A server under load for long: every request is answered, and its memory stays as it is.

RAYMED_LOAD_SECONDS says how long; `make test-load` holds it for ten minutes.
"""

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from waiting import until

JOBS = Path(__file__).resolve().parents[2] / "jobs"
SECONDS = float(os.environ.get("RAYMED_LOAD_SECONDS", "60"))
SHARE = 0.8
"""Of the capacity."""
GROWTH_MIB = 16.0
"""That the memory may vary by, however long it takes."""


@pytest.fixture
def address(bundle_folder, tmp_path):
    """Of a server in a process of its own, and the process."""
    command = [sys.executable, str(JOBS / "serve_models.py"), "--models", f"hsg={bundle_folder}", "--access.open"]
    command += ["--port", "0", "--hardware.device", "cpu"]
    with (tmp_path / "log").open("w") as log:
        environment = os.environ | {"RAYMED_HOME": str(tmp_path)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving on "), (tmp_path / "log").read_text()
        yield line.removeprefix("serving on ").strip(), process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def bodies(tmp_path) -> list[str]:
    """PNG images of 16 to 400 pixels a side."""
    random, paths = np.random.default_rng(0), []
    for number, side in enumerate((16, 64, 150, 400)):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (side, side), np.uint8)).save(file, "PNG")
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(file.getvalue())
    return list(map(str, paths))


def loaded(address: str, bodies: list[str], seconds: float, **how: float) -> list[tuple[int, float]]:
    """(status, seconds) of the requests of a client in a process of its own."""
    out = Path(bodies[0]).with_name("told.json")
    task = {"out": str(out), "url": f"{address}/v1/models/hsg:predict", "headers": {}, "bodies": bodies}
    script = JOBS / "bench_serve_peers" / "http_load.py"
    line = json.dumps(task | {"warm_up": 2.0, "seconds": seconds} | how)
    subprocess.run([sys.executable, str(script)], input=line, stdout=subprocess.DEVNULL, text=True, check=True)
    return json.loads(out.read_text())["ended"]


@contextmanager
def watched(process: subprocess.Popen):
    """Within: (seconds, MiB) of a process's memory, ten times a second."""
    seen: list[tuple[float, float]] = []
    enough, started = threading.Event(), time.monotonic()

    def watch() -> None:
        while not enough.wait(0.1):
            seen.append((time.monotonic() - started, psutil.Process(process.pid).memory_info().rss / 2**20))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        enough.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 240)
def test_memory_stays_flat_at_four_fifths_of_the_capacity(address, bodies):
    import httpx

    where, process = address
    capacity = len(loaded(where, bodies, 5.0, at_once=8)) / 5
    with watched(process) as memory:
        # "most": where others take the processors meanwhile, it is still no more than the server can answer.
        ended = loaded(where, bodies, SECONDS, rate=SHARE * capacity, seed=1, most=64)
    at, mib = np.array(memory).T
    second_half = at > at[-1] / 2
    slope, _ = np.polyfit(at[second_half], mib[second_half], 1)
    waited = np.quantile([seconds for _, seconds in ended], (0.5, 0.99))
    found = Counter(status for status, _ in ended)
    print(
        f"\n{SHARE * capacity:.0f} requests a second for {SECONDS:.0f} s, answered {dict(found)}: p50 "
        f"{1e3 * waited[0]:.1f} ms, p99 {1e3 * waited[1]:.1f} ms; memory {mib[-1]:.0f} MiB, in the second half "
        f"{60 * slope:+.2f} MiB a minute"
    )
    assert found.keys() == {200}
    assert slope * at[-1] / 2 < GROWTH_MIB
    until(lambda: 'raymed_queue_images{model="hsg"} 0.0' in httpx.get(f"{where}/metrics").text)
