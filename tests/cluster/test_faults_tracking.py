"""The MLflow server is killed while a job trains, and comes back with the same store."""

import os
import random
import sys
from pathlib import Path

import psutil
import pytest
import requests
from faults import (
    JOB,
    PATIENCE,
    TWO,
    Training,
    at_work,
    check_survived,
    check_tracked,
    images,
    kill,
)
from nodes import Nodes, free_port, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS = 1200  # longer than a server takes to start


class Server:
    """A real MLflow server on one port, with its store in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: psutil.Popen | None = None

    def start(self) -> None:
        """Returns when it answers."""
        words = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={self.port}", "--workers=1"]
        words += [f"--backend-store-uri=sqlite:///{self.folder}/server.db", f"--artifacts-destination={self.folder}/a"]
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # it would start ten processes more
        with (self.folder / "server.log").open("a") as log:
            self.process = psutil.Popen(words, cwd=self.folder, env=env, stdout=log, stderr=log)
        wait_for(self._answers, PATIENCE, "an answer of MLflow")

    def kill(self) -> None:
        """SIGKILL to all its processes."""
        if self.process is not None:
            for process in [self.process, *self.process.children(recursive=True)]:
                kill(process)
            self.process = None

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.uri}/health", timeout=2).ok
        except requests.RequestException:
            return False


@pytest.fixture
def server(tmp_path):
    """A server that runs, and is killed at the end."""
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def test_the_mlflow_server_is_down_for_a_while(server, tmp_path, tmp_path_factory):
    """No record is lost and none is there twice."""
    flags = (TWO, f"--tracking={server.uri}")
    training = Training(tmp_path / "storage", images(tmp_path_factory), None, flags, STEPS)
    with Nodes(tmp_path / "cluster", cpus=2) as nodes:
        driver = nodes.driver(JOB, *training.arguments)
        training.reaches(random.Random("mlflow").randrange(STEPS // 12, STEPS // 4), driver)
        server.kill()
        driver.says("does not take records", PATIENCE)
        server.start()
        assert max(training.losses()) < STEPS, "training was over before the server came back"
        assert driver.wait(PATIENCE) == 0, driver.said()
        wait_for(lambda: not at_work(nodes.head), PATIENCE, "the actors go")

    assert "takes records again" in driver.said() and "Traceback" not in driver.said()
    check_survived(training, tmp_path_factory)
    check_tracked(training, server.uri)
