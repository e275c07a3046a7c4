"""Registered models, and MLflow as a process of its own."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import requests
from waiting import until

from raymed.bundle import Bundle
from raymed.registry.card import write_card
from raymed.registry.register import add
from raymed.tasks.golden import with_golden


def register_two(client, bundle: Bundle, folder: Path) -> None:
    """Versions 1 and 2 of hsg, of which the first is champion; they differ by their threshold."""
    for number in (1, 2):
        point = {**bundle.operating_point, "threshold": number / 4}
        place = with_golden(replace(bundle, operating_point=point)).save(folder / f"bundle{number}")
        write_card(place, "hsg")
        add(client, place, "hsg")
    client.set_registered_model_alias("hsg", "champion", "1")


def weights_of(client, version: int) -> Path:
    """The file of a registered version's weights, in a store on this machine."""
    place = client.get_model_version_download_uri("hsg", str(version)).removeprefix("file://")
    return Path(place, "artifacts", "bundle", "model.safetensors")


class MLflow:
    """A real MLflow server on one port, with its store in a folder and webhooks that reach this machine."""

    def __init__(self, folder: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.process: psutil.Popen | None = None

    def start(self) -> None:
        """Returns when it answers."""
        from cryptography.fernet import Fernet

        words = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={self.port}", "--workers=1"]
        words += [f"--backend-store-uri=sqlite:///{self.folder}/server.db", f"--artifacts-destination={self.folder}/a"]
        env = {
            **os.environ,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # it would start ten processes more
            "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
            "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
            "MLFLOW_WEBHOOK_CACHE_TTL": "1",
            "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
        }
        with (self.folder / "server.log").open("a") as log:
            self.process = psutil.Popen(words, cwd=self.folder, env=env, stdout=log, stderr=subprocess.STDOUT)
        until(self._answers, 120)

    def kill(self) -> None:
        """SIGKILL to all its processes."""
        if self.process is not None:
            for process in [self.process, *self.process.children(recursive=True)]:
                process.kill()
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.uri}/health", timeout=2).ok
        except requests.RequestException:
            return False
