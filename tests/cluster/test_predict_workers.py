"""Predictions that Ray's workers share: the bytes of one process, also when a worker is lost on the way."""

import threading
import time

import psutil
import pytest
from predict_example import make_bundle, origin_of, read_rows, write_images

from raymed.data.manifest import DataConfig
from raymed.results.predict import asked_cases, predict
from raymed.results.predict_cases import ImageFolder

pytestmark = pytest.mark.ray
TASK = "ray::_answers_of"


@pytest.fixture(scope="module")
def bundle():
    return make_bundle()


@pytest.fixture(scope="module")
def alone(bundle, tmp_path_factory):
    """(cases, what one process writes of them)."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 50)
    (folder / "020_left.png").write_bytes(b"")
    cases = asked_cases(bundle, ImageFolder(), DataConfig(manifest=str(folder / "manifest.csv"))).cases
    done = predict(bundle, origin_of(bundle), cases, folder / "found.csv")
    return cases, (done.path.read_bytes(), done.image_path.read_bytes())


def test_workers_write_what_one_process_writes(ray_cluster, bundle, alone, tmp_path):
    cases, expected = alone
    done = predict(bundle, origin_of(bundle), cases, tmp_path / "found.csv", workers=2)
    assert (done.path.read_bytes(), done.image_path.read_bytes()) == expected
    assert (done.cases, done.problems) == (50, 1)
    # Whatever part of it one process has left, workers add.
    done.path.write_bytes(expected[0][: len(expected[0]) // 3])
    again = predict(bundle, origin_of(bundle), cases, done.path, workers=2)
    assert 0 < again.before < 50 and (done.path.read_bytes(), done.image_path.read_bytes()) == expected


def test_a_lost_worker_costs_nothing_but_time(ray_cluster, bundle, alone, tmp_path):
    cases, expected = alone
    killed = []

    def kill_one() -> None:
        until = time.monotonic() + 60
        while not killed and time.monotonic() < until:
            for process in psutil.process_iter(["name", "cmdline"]):
                if TASK in " ".join(process.info["cmdline"] or [process.info["name"]]) and _is_mine(process):
                    process.kill()
                    killed.append(process.pid)
                    break

    thread = threading.Thread(target=kill_one)
    thread.start()
    done = predict(bundle, origin_of(bundle), cases, tmp_path / "found.csv", workers=2)
    thread.join()
    assert killed and (done.path.read_bytes(), done.image_path.read_bytes()) == expected
    assert read_rows(done.path)["case"].is_unique


def _is_mine(process: psutil.Process) -> bool:
    return psutil.Process() in process.parents()
